"""Run the cells that have not been run, and keep what was.

A finished cell is a JSON file with the training's figures and a PNG strip of its pictures, both named
after the cell and a digest of everything they follow from. The scores are a second JSON file, named
after the scorer's digest as well: a new scorer reads the old pictures. May import `quality_cell` and
what that may.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from lily_diffusers.files import write_atomically

from . import BenchError
from .contenders import CONTENDERS
from .quality_cell import Bench, Cell, Settings, load_bench, run_cell
from .quality_score import evaluation_prompts, score_pictures
from .toyworld.scorer import Scorer
from .toyworld.subjects import photos
from .toyworld.world import SIZE, Array

PROCEDURES = {"base": 1, "lora": 1, "peft_lily": 2, "lily": 1}
"""Raise a method's number when its cells are run in another way, so that old ones are not mixed with new ones."""

SCORING = 1
"""Raise it when pictures are scored in another way."""

VERSIONS = {name: version(name) for name in ("torch", "diffusers", "peft")}


def digest_folder(folder: Path) -> str:
    """Digest the names and contents of a pipeline's weights and settings (its model card does not count)."""
    whole = hashlib.blake2b(digest_size=8)
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".txt")):
        whole.update(str(file.relative_to(folder)).encode() + b"\0" + hashlib.blake2b(file.read_bytes()).digest())
    return whole.hexdigest()


def digest_scorer(scorer: Scorer) -> str:
    """Digest a scorer's weights and how it is used."""
    whole = hashlib.blake2b(str(SCORING).encode(), digest_size=4)
    for name, tensor in scorer.state_dict().items():
        whole.update(name.encode() + tensor.numpy().tobytes())
    return whole.hexdigest()


@cache
def _digest_photos(subject: str) -> str:
    return hashlib.blake2b(photos(subject).tobytes(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Store:
    """Where finished cells are, and what their names are made from.

    Attributes:
        folder: of the files.
        settings: of the run.
        base: digest of the base's folder.
        scorer: digest of the scorer.
    """

    folder: Path
    settings: Settings
    base: str
    scorer: str

    def path(self, cell: Cell, suffix: str) -> Path:
        """Name one file of a cell; the digest covers all that its pictures follow from."""
        method = CONTENDERS[cell.contender].method
        inputs = {
            "cell": asdict(cell),
            "method": method,
            "settings": asdict(self.settings),
            "base": self.base,
            "photos": _digest_photos(cell.subject),
            "prompts": [prompt.text for prompt in evaluation_prompts(cell.subject)],
            "versions": VERSIONS,
            "procedure": PROCEDURES[method],
        }
        digest = hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=5).hexdigest()
        return self.folder / f"{cell.name}-{digest}{suffix}"

    def pictures(self, cell: Cell) -> Array:
        """Read the pictures (n, 64, 64, 3) uint8 of a finished cell from its strip.

        Raises:
            BenchError: if the strip is missing.
        """
        path = self.path(cell, ".png")
        if not path.exists():
            raise BenchError(f"{path} is missing, though it is needed here; remove {path.with_suffix('.json')}.")
        with Image.open(path) as strip:
            pixels = np.array(strip.convert("RGB"))
        return pixels.reshape(SIZE, -1, SIZE, 3).swapaxes(0, 1)

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """Read all figures of a cell, or None if it is not trained or not scored."""
        trained, scored = self.path(cell, ".json"), self.path(cell, f".scores-{self.scorer}.json")
        if not (trained.exists() and scored.exists()):
            return None
        return json.loads(trained.read_text()) | json.loads(scored.read_text())


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, lambda partial: partial.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n"))


def finish(bench: Bench, store: Store, cell: Cell) -> dict[str, Any]:
    """Train, draw and score a cell, as far as that is not done, and return its figures.

    A cell whose training failed has no scores. Drift is measured against the base's cell of the same subject and
    seed, which must be finished.
    """
    trained, scored = store.path(cell, ".json"), store.path(cell, f".scores-{store.scorer}.json")
    if not trained.exists():
        figures, pictures = run_cell(bench, cell, store.settings)
        if len(pictures):
            strip = Image.fromarray(pictures.swapaxes(0, 1).reshape(SIZE, -1, 3))
            write_atomically(trained.with_suffix(".png"), lambda partial: strip.save(partial, format="png"))
        _write_json(trained, {"cell": asdict(cell), "settings": asdict(store.settings), **figures})
    if not scored.exists():
        failed = json.loads(trained.read_text())["failed"]
        began, scores = time.perf_counter(), {}
        if failed is None:
            scores = score_pictures(bench.scorer, cell.subject, store.pictures(cell), store.pictures(cell.base))
        _write_json(scored, {"scores": scores, "score_seconds": time.perf_counter() - began})
    record = store.record(cell)
    assert record is not None
    return record


_worker: tuple[Bench, Store] | None = None


def _start_worker(base: Path, scorer_file: Path, store: Store) -> None:
    """Load the base once in a fresh process."""
    global _worker
    torch.set_num_threads(1)
    _worker = load_bench(base, scorer_file), store


def _finish_in_worker(cell: Cell) -> tuple[Cell, dict[str, Any]]:
    assert _worker is not None
    return cell, finish(*_worker, cell)


def _run_spawned(bench: Bench, store: Store, cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")
    sources = (bench.base, bench.scorer_file, store)
    with ProcessPoolExecutor(min(jobs, len(cells)), context, initializer=_start_worker, initargs=sources) as pool:
        try:
            heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: a worker finishes its cell on Ctrl-C
            try:
                futures = [pool.submit(_finish_in_worker, cell) for cell in cells]
            finally:
                signal.signal(signal.SIGINT, heard)
            for done in as_completed(futures):
                yield done.result()
        except BaseException:
            tqdm.write("stopping once the cells that are running are finished")
            pool.shutdown(cancel_futures=True)
            raise


def run_cells(bench: Bench, store: Store, cells: Iterable[Cell], jobs: int, title: str) -> dict[Cell, dict[str, Any]]:
    """Return the figures of all cells, running those that are not finished.

    Args:
        bench: runs the cells if there is one job; other processes load the same files.
        store: where finished cells are.
        cells: what to run; cells of the base must be finished before others of their subject and seed.
        jobs: cells at a time, each in its own process with one thread.
        title: of the progress bar.
    """
    records = {cell: store.record(cell) for cell in cells}
    missing = [cell for cell, record in records.items() if record is None]
    bar = tqdm(total=len(records), initial=len(records) - len(missing), desc=title, unit="cell", smoothing=0.1)
    results: Iterable[tuple[Cell, dict[str, Any]]]
    if jobs > 1 and len(missing) > 1:
        results = _run_spawned(bench, store, missing, jobs)
    else:
        results = ((cell, finish(bench, store, cell)) for cell in missing)
    with bar:
        for cell, record in results:
            records[cell] = record
            bar.set_postfix_str(cell.name)
            bar.update()
    return {cell: record for cell, record in records.items() if record is not None}
