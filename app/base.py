"""Load the base model the page draws with, and say in one sentence why it cannot be loaded.

Stands before `app.generator`, which owns the pipeline from then on. It must not import Gradio.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from app.catalogue import GeneratorError


def pick_device(device: str | None) -> torch.device:
    """Turn a device's name into a device that can be used; None takes CUDA where there is one.

    Raises:
        GeneratorError: this machine has no such device.
    """
    try:
        picked = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise GeneratorError(f"device '{device}' cannot be used here; try 'cpu' ({_first_line(error)}).") from error
    return picked


def load_base(base: str, dtype: torch.dtype, revision: str | None, variant: str | None) -> Any:
    """Load SDXL from a folder in diffusers' format or from the hub.

    Returns:
        The `StableDiffusionXLPipeline` (typed Any: diffusers' own types hide its methods).

    Raises:
        GeneratorError: with one sentence for each way in which that fails.
    """
    folder = Path(base).expanduser()
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise GeneratorError(
            f"base '{base}' has no model_index.json; give a folder that diffusers' save_pretrained wrote."
        )
    if not folder.exists() and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", base):
        raise GeneratorError(f"base '{base}' is neither a folder that exists nor a hub id such as 'owner/name'.")
    where = str(folder) if folder.exists() else base
    try:
        kind = StableDiffusionXLPipeline.load_config(where, revision=revision)["_class_name"]
        if not str(kind).startswith("StableDiffusionXL"):
            raise GeneratorError(f"base '{base}' is a {kind}; Lily's adapters are for SDXL, so give an SDXL model.")
        return StableDiffusionXLPipeline.from_pretrained(where, dtype=dtype, revision=revision, variant=variant)
    except GeneratorError:
        raise
    except (OSError, ValueError, KeyError) as error:
        missing = "" if folder.exists() else "is not a folder here and "
        raise GeneratorError(f"base '{base}' {missing}cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """The first line of an error that may span a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
