"""`python -m app --base PATH-OR-ID --adapters DIR`: read the flags, load the base, open the page.

The door of `app`: it joins the generator to the page. Only here is anything printed, and only here
may Gradio be missing: then one sentence says how to install it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the flags (those of the command line where none are given)."""
    parser = argparse.ArgumentParser(prog="python -m app", description="Draw with SDXL and Lily adapters on a page.")
    parser.add_argument("--base", required=True, help="SDXL: a folder in diffusers' format, or a hub id")
    parser.add_argument("--adapters", required=True, type=Path, help="folder in which adapters are looked for")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", default=7860, type=int, help="port to listen on (default: 7860)")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: CUDA where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="number format of the base (default: float16 on CUDA, else float32)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--variant", help="file variant of the base, such as fp16")
    return parser.parse_args(arguments)


def main() -> None:
    """Serve the page until Ctrl-C."""
    args = parse_args()
    if importlib.util.find_spec("gradio") is None:
        sys.exit("the page needs Gradio, which is not installed; run: pip install 'lily-diffusers[app]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    from app.catalogue import GeneratorError, find_adapters
    from app.generator import Generator
    from app.look import CSS, THEME
    from app.ui import build_ui

    try:
        found = find_adapters(args.adapters)  # a missing folder is said before the base takes minutes to load
        print(f"adapters in {args.adapters}: {len(found.adapters)}", *found.problems, sep="\n", flush=True)
        print(f"loading {args.base} ...", flush=True)
        generator = Generator(args.base, args.device, args.dtype, args.revision, args.variant)
    except GeneratorError as error:
        sys.exit(str(error))
    page = build_ui(generator, args.adapters)
    try:
        _, address, _ = page.launch(
            server_name=args.host,
            server_port=args.port,
            share=False,
            quiet=True,
            show_error=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=THEME,
            css=CSS,
        )
    except OSError as error:
        sys.exit(f"cannot listen on {args.host}:{args.port} ({error}); choose another --port.")
    print(f"the page is at {address}  (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
