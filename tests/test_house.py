"""The house's arrows: a file imports only from files above it, and heavy extras stay optional."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = [
    "functional", "routers", "targets", "initialisation", "config", "bank", "processors", "inject", "files",
    "checkpoint", "pipeline", "analysis", "training",
]  # fmt: skip
TOYWORLD_ORDER = [
    "solids", "objects", "places", "world", "data", "subjects", "drawing", "model", "autoencoder", "diffusion",
    "pretrain", "scorer", "train_scorer", "validity",
]  # fmt: skip
TRAINING_ORDER = ["config", "data", "cache", "loss", "checkpoints", "validation", "loop"]


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


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in modules("lily_diffusers")} == set(ORDER) - {"training"}
    assert {path.stem for path in modules("lily_diffusers/training")} == set(TRAINING_ORDER)
    assert {path.stem for path in modules("benchmarks/toyworld")} == set(TOYWORLD_ORDER)


@pytest.mark.parametrize("path", modules("lily_diffusers"), ids=lambda path: path.stem)
def test_the_library_imports_only_from_above(path: Path) -> None:
    place = ORDER.index(path.stem)
    for name in imports(path):
        if name.startswith("lily_diffusers."):
            assert ORDER.index(name.split(".")[1]) < place, f"{path.stem} imports {name}"
        assert name.split(".")[0] not in {"app", "gradio", "matplotlib", "datasets", "benchmarks", "examples", "tests"}


@pytest.mark.parametrize("path", modules("lily_diffusers/training"), ids=lambda path: path.stem)
def test_training_imports_only_from_above(path: Path) -> None:
    place = TRAINING_ORDER.index(path.stem)
    for name in imports(path):
        assert name.split(".")[0] not in {"app", "gradio", "benchmarks", "examples", "tests"}
        if name.startswith("lily_diffusers.training."):
            assert TRAINING_ORDER.index(name.split(".")[2]) < place, f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", modules("benchmarks/toyworld"), ids=lambda path: path.stem)
def test_the_toy_world_imports_only_from_above(path: Path) -> None:
    place = TOYWORLD_ORDER.index(path.stem)
    for name in imports(path):
        assert name.split(".")[0] not in {"app", "gradio", "tests", "peft"}
        if name.startswith("benchmarks."):
            if name.startswith("benchmarks.intervals"):
                continue  # pure mathematics
            assert name.split(".")[1] == "toyworld", f"{path.stem} imports {name}"
            assert TOYWORLD_ORDER.index(name.split(".")[2]) < place, f"{path.stem} imports {name}"


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
