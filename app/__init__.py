"""The page on which adapters are tried: `python -m app --base PATH-OR-ID --adapters DIR`.

`catalogue` finds adapters, `base` loads the model, `generator` makes the pictures and knows no page;
`ui` is the page and makes no pictures, `look` its theme; `__main__` reads the flags and joins them.
The library never imports this package.
"""
