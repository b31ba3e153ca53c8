"""From finished cells to figures: intervals, paired differences, Markdown tables and a contact sheet.

    python -m benchmarks.quality_report docs/quality.json

prints the tables of a report that `benchmarks.quality --json` wrote. May import `intervals`, `contenders`,
`quality_score` and the toy world.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .contenders import CONTENDERS
from .intervals import Pair, by_subject, interval, paired_difference
from .quality_score import evaluation_prompts
from .toyworld.subjects import SUBJECTS, new_places, true_pictures
from .toyworld.world import SIZE, Array

Records = Mapping[Pair, Mapping[str, Any]]
"""The figures of one contender at one budget, by subject and seed."""

PEER = "lora"
"""The contender that the others are compared with."""
QUALITY = {
    "fidelity": "fidelity",
    "identity": "identity",
    "place": "place right",
    "colour": "colour edit right",
    "colour_identity": "identity, recoloured",
    "drift": "drift",
    "kind_kept": "kind kept",
    "diversity": "diversity",
}
TRAINING = {
    "final_loss": "final loss",
    "expert_similarity": "expert similarity",
    "routing_entropy": "routing entropy",
    "train_seconds": "training (s)",
    "eval_seconds": "evaluation (s)",
}
PAIRED = QUALITY | {"final_loss": TRAINING["final_loss"]}

_LEGEND = """\
Fidelity: the mean of identity and place, which chose the learning rates. Identity: mean cosine to the subject's true
renders, in six new places. Place and colour edit: share of pictures in which the scorer reads what the prompt asked;
colours are edited on snow. Drift: mean absolute pixel difference (0 to 1) to the base's pictures of other things, same
seeds; kind kept: share of them that still read as the base's. Diversity: mean absolute pixel difference between
pictures of one prompt, grain and pose included. Expert similarity: mean |cosine| between the experts of a pool (1:
copies). Routing entropy: 1 is an equal mix, 0 one expert (PEFT's Lily averages its weights over the batch first).
Times are wall clock beside other cells."""


def _figure(record: Mapping[str, Any], metric: str) -> float | None:
    if metric == "eval_seconds":
        return record["draw_seconds"] + record["score_seconds"]
    return record["scores"].get(metric) if metric in QUALITY else record.get(metric)


def figures(records: Records, metric: str) -> dict[Pair, float]:
    """Pick one metric out of the cells that trained to the end and have it."""
    picked = {pair: _figure(record, metric) for pair, record in records.items() if record["failed"] is None}
    return {pair: value for pair, value in picked.items() if value is not None}


def summarise(results: Mapping[str, Records]) -> dict[str, dict[str, Any]]:
    """Summarise the contenders of one budget.

    Args:
        results: contender -> its cells.

    Returns:
        contender -> 'metrics' (metric -> interval over the subjects' means), 'differences' to `PEER` (metric -> the
        two intervals of `paired_difference`, empty for the peer itself), 'cells' and 'failed' (how many, and the
        failures' sentences).
    """
    summary: dict[str, dict[str, Any]] = {}
    for name, records in results.items():
        metrics: dict[str, dict[str, Any] | None] = {}
        for metric in (*QUALITY, *TRAINING):
            means = by_subject(figures(records, metric))
            metrics[metric] = asdict(interval(means)) if means else None
        differences = {}
        if name != PEER and PEER in results:
            for metric in PAIRED:
                compared = paired_difference(figures(records, metric), figures(results[PEER], metric))
                differences[metric] = {over: asdict(value) for over, value in compared.items()}
        summary[name] = {
            "cells": len(records),
            "failed": {f"{s}, seed {n}": record["failed"] for (s, n), record in records.items() if record["failed"]},
            "metrics": metrics,
            "differences": differences,
        }
    return summary


def format_interval(value: Mapping[str, Any] | None, signed: bool = False) -> str:
    """Write an interval as '0.532 ± 0.021', a single value without the second part, none as '-'."""
    if value is None:
        return "-"
    digits = 1 if abs(value["mean"]) >= 10 else 3
    mean = f"{value['mean']:{'+' if signed else ''}.{digits}f}"
    return mean if value["half"] is None else f"{mean} ± {value['half']:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---|" + "---:|" * (len(head) - 1)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _format_adapters(fits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of one budget's adapters: shape, size, the rate and what it was chosen from."""
    rates = sorted({float(rate) for fit in fits.values() for rate in fit["tuning"]})
    rows = []
    for name, fit in fits.items():
        tried = {float(rate): value for rate, value in fit["tuning"].items()}
        cells = [("-" if value is None else f"{value:.3f}") for value in (tried.get(rate) for rate in rates)]
        o, sharing = fit["options"], CONTENDERS[name].method != "lora"
        rows.append([
            CONTENDERS[name].label, str(o["r"]), str(o["stride_A"]) if sharing else "-",
            str(o["num_B"]) if sharing else "-", f"{fit['parameters']:,}",
            f"{fit['rate']:g}{' (edge of the grid)' if fit['at_edge'] else ''}", *cells,
        ])  # fmt: skip
    tuned = [f"fidelity at {rate:g}" for rate in rates]
    return _table(["method", "r", "stride_A", "num_B", "parameters", "learning rate", *tuned], rows)


def format_report(report: Mapping[str, Any]) -> str:
    """Lay a report out as Markdown: what ran where, and for each budget its adapters, scores and differences."""
    options, machine = report["options"], report["machine"]
    cells = [*report["cells"], *report["tuning_cells"]]
    hours = sum(cell["train_seconds"] + cell["draw_seconds"] + cell["score_seconds"] for cell in cells) / 3600
    rates = (
        f"chosen on {', '.join(options['tuning_subjects'])} by fidelity, the mean of identity and place (one seed each)"
    )
    if len(options["rates"]) == 1:
        rates = f"{options['rates'][0]:g} throughout"
    lines = [
        f"    {report['command']}",
        "",
        f"{len(options['subjects'])} subjects ({', '.join(options['subjects'])}) × {options['seeds']} seeds; "
        f"{options['steps']} steps of batch {options['batch']}; {options['pictures']} pictures a prompt in "
        f"{options['sampling_steps']} denoising steps, guidance {options['guidance']:g}. Learning rates: {rates}.",
        f"{machine['cpu']}, {options['jobs']} cells at a time with one thread each; {len(cells)} cells, {hours:.1f} h "
        "of one thread; " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()) + ".",
        "",
        "Mean ± half of the 95 % interval (Student's t) over the subjects, their seeds averaged first. There are many "
        "intervals, and none is widened for that.",
        _LEGEND,
        "",
    ]
    lines += ["What identity means for these subjects, by six pictures of each that are not a contender's:", ""]
    rows = [[look, format_interval(value)] for look, value in report["bounds"].items()]
    lines += _table(["pictures", "identity"], rows)
    for budget, part in report["budgets"].items():
        lines += [f"## Budget: LoRA r={budget} ({part['parameters']:,} parameters)", ""]
        lines += _format_adapters(part["fits"])
        summary = part["summary"]
        for columns in (QUALITY, TRAINING):
            rows = [
                [_label(name, result), *(format_interval(result["metrics"][metric]) for metric in columns)]
                for name, result in summary.items()
            ]
            lines += _table(["method", *columns.values()], rows)
        rows = [
            [CONTENDERS[name].label, *(_format_difference(result["differences"][metric]) for metric in PAIRED)]
            for name, result in summary.items()
            if result["differences"]
        ]
        if rows:
            lines += [
                f"Differences to {CONTENDERS[PEER].label}, paired by subject and seed: mean ± half of the 95 % "
                "interval over the subjects; in brackets the half if all pairs were independent.",
                "",
                *_table(["method", *PAIRED.values()], rows),
            ]
        for name, result in summary.items():
            for cell, sentence in result["failed"].items():
                lines.append(f"- failed: {CONTENDERS[name].label}, {cell}: {sentence}")
    return "\n".join(lines).rstrip() + "\n"


def _format_difference(difference: Mapping[str, Mapping[str, Any]]) -> str:
    if not difference:
        return "-"
    text, half = format_interval(difference["subjects"], signed=True), difference["cells"]["half"]
    return text if half is None else f"{text} ({half:.3f})"


def _label(name: str, result: Mapping[str, Any]) -> str:
    lost = f" ({result['cells'] - len(result['failed'])} of {result['cells']} cells)" if result["failed"] else ""
    return CONTENDERS[name].label + lost


def contact_sheet(subject: str, seed: int, columns: Mapping[str, Array | None]) -> Image.Image:
    """Lay out one subject's pictures: a row for each prompt, a column for the true render and for each contender.

    Args:
        subject: key of `SUBJECTS`.
        seed: of the true renders, which stand only where the prompt asks for a place; 0 has the poses of the photos.
        columns: heading (lines broken by newlines) -> pictures (p·k, 64, 64, 3) uint8, of which each prompt's first
            is shown, twice as large; None where the training failed.
    """
    prompts = evaluation_prompts(subject)
    truth = true_pictures(SUBJECTS[subject], new_places(subject), seed)[0]
    tile, gap, margin, head = 2 * SIZE, 4, 190, 58
    width, height = margin + (len(columns) + 1) * (tile + gap), head + len(prompts) * (tile + gap)
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)

    def paste(row: int, column: int, pixels: Array) -> None:
        picture = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.BICUBIC)
        sheet.paste(picture, (margin + column * (tile + gap), head + row * (tile + gap)))

    for row, prompt in enumerate(prompts):
        words, half = prompt.text.split(), len(prompt.text.split()) // 2
        label = f"{' '.join(words[:half])}\n{' '.join(words[half:])}"
        pen.multiline_text((6, head + row * (tile + gap) + tile / 2 - 14), label, "black", font)
        if row < len(truth):
            paste(row, 0, truth[row])
    for column, (heading, pictures) in enumerate([("true render", None), *columns.items()]):
        pen.multiline_text((margin + column * (tile + gap) + 2, 6), heading, "black", font)
        if pictures is not None:
            for row, first in enumerate(pictures[:: len(pictures) // len(prompts)]):
                paste(row, column, first)
    return sheet


def main() -> None:
    """Print the tables of a report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_report", description="Print a report's tables.")
    parser.add_argument("report", type=Path, help="JSON file that benchmarks.quality wrote")
    file = parser.parse_args().report
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{file} cannot be read ({error}); name a file that benchmarks.quality --json wrote")
    print(format_report(report), end="")


if __name__ == "__main__":
    main()
