"""Write files so that a kill or a full disk never leaves half of one. Imports the standard library only."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then move it into place in one step.

    Args:
        path: the file to make or replace. Its folder is made if missing.
        write: called with the path to write to.

    Raises:
        OSError: naming the file, if it cannot be written (no permission, disk full); what stood at
            `path` before is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception as error:
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise OSError(f"cannot write {path}: {error}; free some space or choose another folder.") from error
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
