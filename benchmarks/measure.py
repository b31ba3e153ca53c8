"""Timing and memory: interleaved rounds, ratios within a round, growth at the peak, the machine's name.

What every benchmark measures with. May import torch only.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

MEMORY_LABELS = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "the process's resident high-water mark (VmHWM), reset before the call: approximate",
}


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Return how long one call takes (seconds): CUDA events around it on a GPU, the wall clock elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Time every call once a round.

    The order turns by one place every second round and is reversed in between, so that a drifting machine, and
    whatever a call leaves in the caches for the next, are spread over all of them.

    Args:
        calls: what to time, by name.
        rounds: timings of each.
        warmup: untimed calls of each before the first round.
        device: that the calls run on.

    Returns:
        Seconds, one list of length `rounds` for each name; entry k of all lists is from the same round.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds):
        names = list(calls)
        turn = k // 2 % len(names)
        names = names[turn:] + names[:turn]
        gc.collect()  # now, and not in the middle of a timed call
        gc.disable()
        try:
            for name in reversed(names) if k % 2 else names:
                samples[name].append(time_call(calls[name], device))
        finally:
            gc.enable()
    return samples


def ratios(samples: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Summarise the ratios samples/reference of each round: median, quartiles (q1, q3), min and max."""
    values = sorted(a / b for a, b in zip(samples, reference, strict=True))
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3, "min": values[0], "max": values[-1]}


def _status(field: str) -> int | None:
    """Read a size from Linux's /proc/self/status (bytes)."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


def memory_growth(call: Callable[[], object], device: torch.device) -> int | None:
    """Return by how much memory grows at the peak of one call (bytes): activations, gradients and workspace.

    On the CPU the resident set is read from /proc, free heap pages are given back first, and the figure is
    approximate; None where the system has no resettable high-water mark.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # makes the high-water mark the present size
    except (OSError, AttributeError):
        return None
    resident = _status("VmRSS")
    call()
    peak = _status("VmHWM")
    return None if resident is None or peak is None else max(0, peak - resident)


def describe_machine(device: torch.device) -> dict[str, object]:
    """Name the processor, its cores, the threads in use and the GPU."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
    }
