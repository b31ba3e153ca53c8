"""The page on which adapters are tried: `python -m app --base PATH-OR-ID --adapters DIR`.

`generator` makes the pictures and knows no page; `ui` is the page and makes no pictures;
`__main__` reads the flags and joins the two. The library never imports this package.
"""
