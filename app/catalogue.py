"""Find adapters in a folder by what their file headers say.

Stands at the beginning of the page's flow: the list from here is what can be chosen. It reads
headers only, through `lily_diffusers.checkpoint`, and must import neither Gradio nor a pipeline.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lily_diffusers.checkpoint import FORMAT, WEIGHT_NAME, LilyFileError, read_header

log = logging.getLogger(__name__)


class GeneratorError(ValueError):
    """Something the user asked for cannot be done; the text is one sentence to show to them."""


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter file, as its header describes it.

    Args:
        name: how lists show it: its folder relative to the adapters' folder.
        path: the safetensors file.
        instance_prompt: the prompt it was trained with; empty where the header does not say.
        base_model: the model it was trained on; empty where the header does not say.
        steps: optimiser steps it was trained for; empty where the header does not say.
        rank: the rank r of its matrices.
    """

    name: str
    path: Path
    instance_prompt: str
    base_model: str
    steps: str
    rank: int


@dataclass(frozen=True)
class Catalogue:
    """What a search for adapters found: the usable ones, and a sentence for each broken one."""

    adapters: list[AdapterInfo]
    problems: list[str]


def find_adapters(folder: Path) -> Catalogue:
    """Find the adapters in a folder and two levels below it, by file header rather than by name.

    Args:
        folder: usually the `--output_dir` of one or several trainings.

    Returns:
        The adapters in natural order of their names, and one sentence for each file that should be
        an adapter and cannot be read. Other people's safetensors files are left out without a word.

    Raises:
        GeneratorError: the folder does not exist.
    """
    if not folder.is_dir():
        raise GeneratorError(f"the adapters' folder '{folder}' does not exist; create it, or pass another one.")
    files = [file for depth in ("*", "*/*", "*/*/*") for file in folder.glob(f"{depth}.safetensors") if file.is_file()]
    adapters, problems = [], []
    for file in files:
        shown = file.relative_to(folder)
        if any(part.startswith(".") for part in shown.parts):
            continue
        try:
            if not _is_lily_file(file):
                log.info("'%s' is not a Lily adapter; left out", file)
                continue
            header = read_header(file)
        except (LilyFileError, OSError) as error:
            log.info("%s", error)
            problems.append(str(error).replace(str(file), f"'{shown}'"))
            continue
        told = header.metadata.get
        adapters.append(
            AdapterInfo(
                name=_short_name(folder, shown),
                path=file,
                instance_prompt=told("instance_prompt", ""),
                base_model=told("base_model", ""),
                steps=told("steps", ""),
                rank=header.config.r,
            )
        )
    return Catalogue(sorted(adapters, key=lambda adapter: _natural(adapter.name)), sorted(problems))


def _is_lily_file(file: Path) -> bool:
    """Read the header's format; a file whose header cannot be read passes, so that `read_header` names the fault."""
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("format") == FORMAT
    except SafetensorError:
        return True


def _short_name(folder: Path, file: Path) -> str:
    """Name a file by its folder ('duck/checkpoint-500'), or by its stem where the file was renamed."""
    inside = file.parent if file.name == WEIGHT_NAME else file.with_suffix("")
    return inside.as_posix() if inside.parts else folder.resolve().name


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts checkpoint-500 before checkpoint-1000."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]
