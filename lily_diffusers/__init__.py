"""Lily adapters (arXiv 2407.09946) for SDXL in diffusers: train, load, mix and prompt them."""

from .config import LilyConfig
from .inject import inject_lily, remove_lily
from .pipeline import (
    delete_lily_adapter,
    get_lily_adapters,
    lily_disabled,
    load_lily_weights,
    save_lily_weights,
    set_lily_adapters,
    unload_lily_weights,
)

__version__ = "0.1.0"

__all__ = [
    "LilyConfig",
    "delete_lily_adapter",
    "get_lily_adapters",
    "inject_lily",
    "lily_disabled",
    "load_lily_weights",
    "remove_lily",
    "save_lily_weights",
    "set_lily_adapters",
    "unload_lily_weights",
]
