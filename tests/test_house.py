"""The house's arrows: a file imports only from files above it, and heavy extras stay optional."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

HOUSE = {
    "lily_diffusers": [
        "functional", "routers", "targets", "initialisation", "config", "bank", "processors", "inject", "files",
        "checkpoint", "pipeline", "analysis", "training",
    ],
    "lily_diffusers/training": ["config", "data", "cache", "loss", "checkpoints", "validation", "loop"],
    "benchmarks": [
        "BenchError", "intervals", "toyworld", "measure", "unets", "methods", "report", "speed", "contenders",
        "quality_score", "quality_cell", "quality_store", "quality_report", "quality",
    ],
    "benchmarks/toyworld": [
        "solids", "objects", "places", "world", "data", "subjects", "drawing", "model", "autoencoder", "diffusion",
        "pretrain", "scorer", "train_scorer", "validity",
    ],
}  # fmt: skip
"""Folder -> its rooms from top to bottom; a package among them stands for its files, a capital for a class."""
STRANGERS = {
    "lily_diffusers": {"app", "gradio", "matplotlib", "datasets", "benchmarks", "examples", "tests"},
    "lily_diffusers/training": {"app", "gradio", "benchmarks", "examples", "tests"},
    "benchmarks": {"app", "gradio", "tests"},
    "benchmarks/toyworld": {"app", "gradio", "tests", "peft"},
}
"""Folder -> packages that it does without."""


def imports(path: Path) -> set[str]:
    """Absolute dotted names that a file imports, relative ones resolved."""
    found = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def modules(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("folder", HOUSE)
def test_every_module_has_its_place(folder: str) -> None:
    rooms = {room for room in HOUSE[folder] if room.islower() and not (ROOT / folder / room).is_dir()}
    assert {path.stem for path in modules(folder)} == rooms


@pytest.mark.parametrize(("folder", "path"), [(folder, path) for folder in HOUSE for path in modules(folder)])
def test_a_file_imports_only_from_above(folder: str, path: Path) -> None:
    order, own = HOUSE[folder], folder.replace("/", ".") + "."
    for name in imports(path):
        assert name.split(".")[0] not in STRANGERS[folder], f"{path.stem} imports {name}"
        if name.startswith(own):
            room = name.removeprefix(own).split(".")[0]
            assert order.index(room) < order.index(path.stem), f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", modules("benchmarks/toyworld"), ids=lambda path: path.stem)
def test_the_toy_world_knows_nothing_of_the_benchmarks_but_intervals(path: Path) -> None:
    outside = [name for name in imports(path) if name.startswith("benchmarks.") and ".toyworld." not in name]
    assert all(name.startswith("benchmarks.intervals.") for name in outside), outside


def test_functional_imports_torch_only() -> None:
    allowed = {"torch", "collections", "__future__"}
    assert {name.split(".")[0] for name in imports(ROOT / "lily_diffusers" / "functional.py")} <= allowed


@pytest.mark.parametrize("path", modules("app"), ids=lambda path: path.stem)
def test_the_app_uses_the_public_api_and_no_training(path: Path) -> None:
    for name in imports(path):
        assert not name.startswith("lily_diffusers.training")
    if path.stem not in {"ui", "look", "__main__"}:
        assert not any(name.split(".")[0] == "gradio" for name in imports(path))


def test_importing_the_library_brings_no_optional_package() -> None:
    code = "import sys, lily_diffusers; print([m for m in ('gradio', 'matplotlib', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
