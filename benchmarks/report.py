"""From samples to figures: one method's summary, and the table that a person reads.

The last step of a benchmark. May import `measure`.
"""

from __future__ import annotations

import statistics
from typing import Any

from .measure import ratios


def summarise(samples: dict[str, list[float]], name: str, growth: int | None, own: int) -> dict[str, Any]:
    """Put one method's timings and memory together.

    Args:
        samples: seconds by method and round.
        name: the method.
        growth: of memory at the peak of one call (bytes), or None where it cannot be read.
        own: UNet weights, adapter weights and optimiser state (bytes).
    """
    return {
        "samples_s": samples[name],
        "median_s": statistics.median(samples[name]),
        "ratio": ratios(samples[name], samples["base"]),
        "memory_growth_bytes": growth,
        "memory_peak_bytes": None if growth is None else own + growth,
    }


def format_report(report: dict[str, Any]) -> str:
    """Lay the figures out as Markdown: what ran where, one table, the pairwise ratios."""
    options, machine = report["options"], report["machine"]
    phases = list(report["pairs"])
    lines = [
        f"{options['unet']} UNet ({report['unet_parameters']:,} parameters, {options['dtype']}), "
        f"latent {options['latent']}, batch {options['batch']} (step: {options['train_batch']}), "
        f"r={options['r']} stride_A={options['stride_A']} num_B={options['num_B']} router={options['router']}, "
        f"{options['rounds']} rounds",
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads; "
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        "",
        "| method |"
        + "".join(f" {phase} (s) | / base | quartiles | memory (GB) |" for phase in phases)
        + " trained | stored (MB) |",
        "|---|" + "---:|---:|---:|---:|" * len(phases) + "---:|---:|",
    ]
    for name, result in report["methods"].items():
        row = f"| {name} |"
        for phase in phases:
            timed, ratio = result[phase], result[phase]["ratio"]
            peak = timed["memory_peak_bytes"]
            row += f" {timed['median_s']:.4g} | {ratio['median']:.3f} | {ratio['q1']:.3f}-{ratio['q3']:.3f} |"
            row += f" {'?' if peak is None else format(peak / 1e9, '.2f')} |"
        lines.append(row + f" {result['parameters']:,} | {result['stored_bytes'] / 1e6:.1f} |")
    lines += ["", f"Memory: {report['memory']}."]
    for phase, pairs in report["pairs"].items():
        for pair, ratio in pairs.items():
            lines.append(f"{phase} {pair}: {ratio['median']:.3f} (quartiles {ratio['q1']:.3f}-{ratio['q3']:.3f})")
    return "\n".join(lines)
