"""Compare what methods learn of a subject at equal trainable parameters, on the toy world.

    python -m benchmarks.quality --seeds 6 --jobs 2 --json quality.json --sheet quality.png --markdown quality.md

Subjects × seeds × contenders × budgets: each cell teaches the base one subject from five photos, draws
it in new places and colours, and scores the pictures by program. All contenders get the same photos,
steps, noise, timesteps and evaluation seeds; ranks are chosen so that all train as many parameters as a
LoRA of the budget's rank; the learning rate of each contender at each budget is chosen from one grid on
the tuning subjects, which are not reported on. Finished cells are kept in the work folder: repeating the
command runs what is missing.

May import the other files of this folder and the toy world.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lily_diffusers.files import write_atomically
from lily_diffusers.training.config import TrainingError

from . import BenchError
from .contenders import CONTENDERS, Fit, count_parameters, fit_budget
from .measure import describe_machine
from .methods import AdapterOptions
from .quality_cell import Bench, Cell, Settings, load_bench
from .quality_report import contact_sheet, format_report, summarise
from .quality_store import PROCEDURES, VERSIONS, Store, digest_folder, digest_scorer, run_cells
from .toyworld.scorer import WEIGHTS
from .toyworld.subjects import SUBJECTS, TUNING
from .toyworld.validity import identity_bounds
from .toyworld.world import Array

TUNING_SEED = 0
Key = tuple[int, str]
"""(budget, contender)."""


@dataclass(frozen=True)
class Choice:
    """The learning rate of a contender at a budget.

    Attributes:
        rate: the chosen one.
        tried: rate -> mean fidelity over the tuning subjects, None where a training failed; empty without a choice.
        at_edge: whether it is the lowest or the highest tried, so that a better one may lie outside the grid.
    """

    rate: float
    tried: dict[float, float | None]
    at_edge: bool


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; the fields of `Settings` are flags."""
    reported = [name for name in SUBJECTS if name not in TUNING]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Compare adapters by quality.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def flag(name: str, help: str, default: Any, **more: Any) -> None:
        parser.add_argument(f"--{name}", help=help, default=default, **more)

    flag("base", "folder of the toy base", Path("examples/toy-sdxl"), type=Path)
    flag("scorer", "file of the scorer's weights", WEIGHTS, type=Path)
    flag("subjects", "that are reported on", reported[:4], nargs="+", choices=reported, metavar="NAME")
    flag("seeds", "seeds of each subject: 0, 1, …", 6, type=int)
    flag("contenders", "base always runs", list(CONTENDERS), nargs="+", choices=list(CONTENDERS), metavar="NAME")
    flag("budgets", "ranks of the LoRAs whose parameter counts are the budgets", [1, 4], nargs="+", type=int)
    flag("rates", "grid of learning rates", [1e-3, 2e-3, 4e-3, 8e-3], nargs="+", type=float)
    flag("tuning_subjects", "that choose the learning rates", list(TUNING), nargs="+", choices=TUNING, metavar="NAME")
    flag("stride_A", "slots that share an A; more where a budget asks for it", 4, type=int)
    flag("num_B", "experts in a pool; fewer where a budget asks for it", 4, type=int)
    for item in dataclasses.fields(Settings):
        flag(item.name, item.metadata["help"], item.default, type=type(item.default))
    flag("jobs", "cells at a time, each in a process with one thread", 1, type=int)
    flag("work", "folder of the finished cells", Path("build/quality"), type=Path)
    flag("json", "file for all figures", None, type=Path)
    flag("markdown", "file for the tables", None, type=Path)
    flag("sheet", "PNG or JPEG file for the contact sheet of the first subject and seed", None, type=Path)
    args = parser.parse_args(argv)
    for name in ("seeds", "steps", "batch", "warmup", "pictures", "sampling_steps", "jobs", "stride_A", "num_B"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)} must be at least 1")
    for name in ("budgets", "rates"):
        if min(getattr(args, name)) <= 0:
            parser.error(f"--{name} {' '.join(map(str, getattr(args, name)))} must all be above 0")
    if args.sheet and args.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--sheet={args.sheet} must end in .png, .jpg or .jpeg")
    args.contenders = [name for name in CONTENDERS if name == "base" or name in args.contenders]
    args.subjects, args.budgets = list(dict.fromkeys(args.subjects)), sorted(set(args.budgets))
    args.rates = sorted(set(args.rates))
    return args


def fit_all(bench: Bench, args: argparse.Namespace) -> tuple[dict[int, int], dict[Key, Fit]]:
    """Fit every contender to every budget, and print the counts.

    Returns:
        budget -> its parameter count, and (budget, contender) -> fit.
    """
    sizes = {r: count_parameters(bench.pipe.unet, "lora", AdapterOptions(r)) for r in args.budgets}
    fits = {}
    for r, size in sizes.items():
        for name in args.contenders[1:]:
            fit = fits[r, name] = fit_budget(bench.pipe.unet, name, size, args.stride_A, args.num_B)
            shape = "" if name == "lora" else f", stride_A={fit.options.stride_A}, num_B={fit.options.num_B}"
            share = fit.parameters / size - 1
            print(f"LoRA r={r}: {name} r={fit.options.r}{shape}: {fit.parameters:,} parameters ({share:+.1%})")
    return sizes, fits


def choose_rate(fidelity: Mapping[float, Sequence[float | None]]) -> Choice:
    """Choose the rate of the highest mean fidelity; of equals the lowest.

    Args:
        fidelity: rate -> fidelity on each tuning subject, None where the training failed.

    Raises:
        ValueError: if a training failed at every rate.
    """
    tried = {
        rate: None if None in values else sum(value for value in values if value is not None) / len(values)
        for rate, values in sorted(fidelity.items())
    }
    whole = {rate: value for rate, value in tried.items() if value is not None}
    if not whole:
        raise BenchError(f"training failed at every learning rate of {list(tried)}; pass lower --rates.")
    rate = max(whole, key=lambda rate: (whole[rate], -rate))
    return Choice(rate, tried, rate in (min(tried), max(tried)))


def tune(
    bench: Bench, store: Store, args: argparse.Namespace, fits: Mapping[Key, Fit]
) -> tuple[dict[Key, Choice], dict[Cell, dict[str, Any]]]:
    """Run the tuning cells and choose a learning rate for every contender at every budget.

    Returns:
        The choices and the figures of the cells, none if there is one rate only.
    """
    if len(args.rates) == 1:
        return {key: Choice(args.rates[0], {}, False) for key in fits}, {}
    cells = {
        (key, rate): [Cell(subject, TUNING_SEED, key[1], key[0], rate, fit.options) for subject in args.tuning_subjects]
        for key, fit in fits.items()
        for rate in args.rates
    }
    records = run_cells(bench, store, chain.from_iterable(cells.values()), args.jobs, "learning rates")
    choices = {}
    for r, name in fits:
        tried = {rate: [records[c]["scores"].get("fidelity") for c in cells[(r, name), rate]] for rate in args.rates}
        choice = choices[r, name] = choose_rate(tried)
        figures = ", ".join(
            f"{rate:g}: {'failed' if f is None else format(f, '.3f')}" for rate, f in choice.tried.items()
        )
        edge = "; at the edge of the grid, so widen --rates" if choice.at_edge else ""
        print(f"LoRA r={r}: {name} learns at {choice.rate:g} (fidelity at {figures}{edge})")
    return choices, records


def draw_base(bench: Bench, store: Store, args: argparse.Namespace) -> dict[Cell, dict[str, Any]]:
    """Run the base's cells, which all others are compared with, and return those that are reported on."""
    tuning = [] if len(args.rates) == 1 else [Cell(subject, TUNING_SEED) for subject in args.tuning_subjects]
    records = run_cells(bench, store, [*tuning, *(Cell(*pair) for pair in _pairs(args))], args.jobs, "base")
    return {cell: record for cell, record in records.items() if cell not in tuning}


def compare(
    bench: Bench, store: Store, args: argparse.Namespace, fits: Mapping[Key, Fit], choices: Mapping[Key, Choice]
) -> dict[Cell, dict[str, Any]]:
    """Run the cells of every contender at every budget, seed by seed."""
    cells = [
        Cell(*pair, key[1], key[0], choices[key].rate, fit.options)
        for pair in _pairs(args)
        for key, fit in fits.items()
    ]
    return run_cells(bench, store, cells, args.jobs, "comparison")


def _pairs(args: argparse.Namespace) -> list[tuple[str, int]]:
    return [(subject, seed) for seed in range(args.seeds) for subject in args.subjects]


def make_report(
    bench: Bench,
    args: argparse.Namespace,
    sizes: Mapping[int, int],
    fits: Mapping[Key, Fit],
    choices: Mapping[Key, Choice],
    tuning: Mapping[Cell, dict[str, Any]],
    records: Mapping[Cell, dict[str, Any]],
) -> dict[str, Any]:
    """Put all figures together, ready for JSON: options, machine, digests, intervals, and every cell."""
    budgets = {}
    for r, size in sizes.items():
        results: dict[str, dict[tuple[str, int], dict[str, Any]]] = {name: {} for name in args.contenders}
        for cell, record in records.items():
            if cell.budget in (0, r):
                results[cell.contender][cell.subject, cell.seed] = record
        budgets[str(r)] = {
            "parameters": size,
            "fits": {
                name: {
                    **dataclasses.asdict(fits[r, name]),
                    "rate": choices[r, name].rate,
                    "tuning": {f"{rate:g}": figure for rate, figure in choices[r, name].tried.items()},
                    "at_edge": choices[r, name].at_edge,
                }
                for name in args.contenders[1:]
            },
            "summary": summarise(results),
        }
    paths = ("json", "markdown", "sheet", "work", "base", "scorer")
    bounds = identity_bounds(bench.scorer, bench.pipe.vae, args.subjects)

    def plain(cells: Mapping[Cell, dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"cell": dataclasses.asdict(cell)}
            | {name: record[name] for name in record if name not in ("cell", "settings")}
            for cell, record in cells.items()
        ]

    return {
        "options": {
            name: os.path.relpath(value) if name in paths and value else value for name, value in vars(args).items()
        },
        "machine": describe_machine(torch.device("cpu")),
        "versions": VERSIONS,
        "digests": {"base": digest_folder(args.base), "scorer": digest_scorer(bench.scorer)},
        "procedures": PROCEDURES,
        "bounds": {look: dataclasses.asdict(bound) for look, bound in bounds.items()},
        "budgets": budgets,
        "cells": plain(records),
        "tuning_cells": plain(tuning),
    }


def make_sheet(store: Store, args: argparse.Namespace, records: Mapping[Cell, dict[str, Any]]) -> Image.Image:
    """Lay out the pictures of the first subject and seed: the base, then every contender at every budget."""
    columns: dict[str, Array | None] = {}
    cells = sorted((c for c in records if (c.subject, c.seed) == (args.subjects[0], 0)), key=lambda c: c.budget)
    for cell in cells:
        heading = CONTENDERS[cell.contender].label.replace(" (", "\n(")
        heading += f"\nbudget: LoRA r={cell.budget}" if cell.budget else ""
        columns[heading] = None if records[cell]["failed"] else store.pictures(cell)
    return contact_sheet(args.subjects[0], 1, columns)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run whatever is missing and return the report; write the contact sheet if it is wanted."""
    torch.set_num_threads(1)
    bench = load_bench(args.base, args.scorer)
    settings = Settings(**{item.name: getattr(args, item.name) for item in dataclasses.fields(Settings)})
    store = Store(args.work, settings, digest_folder(args.base), digest_scorer(bench.scorer))
    sizes, fits = fit_all(bench, args)
    untrained = draw_base(bench, store, args)
    choices, tuning = tune(bench, store, args, fits)
    records = untrained | compare(bench, store, args, fits, choices)
    if args.sheet:
        sheet = make_sheet(store, args, records)
        kind = Image.registered_extensions()[args.sheet.suffix.lower()]
        write_atomically(args.sheet, lambda partial: sheet.save(partial, format=kind, quality=85))
    return make_report(bench, args, sizes, fits, choices, tuning, records)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison that the command line describes, print the tables and write the files."""
    args = parse_args(argv)
    given = [*(sys.argv[1:] if argv is None else argv)]
    try:
        report = {"command": shlex.join(["python", "-m", "benchmarks.quality", *given])} | run(args)
    except (BenchError, TrainingError, OSError) as error:
        raise SystemExit(f"benchmarks.quality: {error}") from error
    except BrokenProcessPool:
        raise SystemExit(
            "benchmarks.quality: a process died, most likely for want of memory; repeat with fewer --jobs"
        ) from None
    except KeyboardInterrupt:
        raise SystemExit(
            f"benchmarks.quality: interrupted; finished cells are in {args.work}, repeat the command to go on"
        ) from None
    text = format_report(report)
    print("\n" + text)
    if args.json:
        write_atomically(args.json, lambda file: file.write_text(json.dumps(report) + "\n"))
    if args.markdown:
        write_atomically(args.markdown, lambda file: file.write_text(text))


if __name__ == "__main__":
    main()
