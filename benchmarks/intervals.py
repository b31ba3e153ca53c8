"""Means with confidence intervals, and paired differences. Imports the standard library and numpy only."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

LEVEL = 0.95
"""Of all intervals."""
Pair = tuple[str, int]
"""What two methods are compared on: (subject, seed)."""


@dataclass(frozen=True)
class Interval:
    """A mean and how sure it is.

    Attributes:
        mean: of the values.
        half: half the width of the 95 % interval of the mean; None for a single value.
        n: how many values.
    """

    mean: float
    half: float | None
    n: int


@cache
def t_quantile(degrees: int) -> float:
    """Return t with P(|T| ≤ t) = `LEVEL` for Student's T.

    With T = √ν tan θ the density of θ is proportional to cos^(ν-1) θ, which is integrated by Gauss and
    Legendre's rule; θ is found by halving.

    Args:
        degrees: of freedom, ν ≥ 1.

    Raises:
        ValueError: without a degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"degrees={degrees} must be at least 1: an interval needs two values or more.")
    nodes, weights = np.polynomial.legendre.leggauss(80)
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2))
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        inside = theta / 2 * float(weights @ np.cos(theta / 2 * (nodes + 1)) ** (degrees - 1))
        low, high = (theta, high) if inside < LEVEL * whole else (low, theta)
    return math.sqrt(degrees) * math.tan(low)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values with its 95 % interval, taking them as independent.

    Raises:
        ValueError: without a value.
    """
    if not values:
        raise ValueError("an interval needs a value, and there is none.")
    n = len(values)
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Interval(statistics.fmean(values), half, n)


def by_subject(values: Mapping[Pair, float]) -> list[float]:
    """Return the mean over the seeds of each subject, in the order in which the subjects first appear."""
    seeds: dict[str, list[float]] = defaultdict(list)
    for (subject, _), value in values.items():
        seeds[subject].append(value)
    return [statistics.fmean(own) for own in seeds.values()]


def paired_difference(ours: Mapping[Pair, float], peer: Mapping[Pair, float]) -> dict[str, Interval]:
    """Compare two methods on the (subject, seed) pairs that both have.

    Args:
        ours: values of the one.
        peer: values of the other.

    Returns:
        The interval of ours - peer, twice: `cells` takes every pair as independent, `subjects` first averages
        over the seeds of a subject, which is the honest width if subjects differ in what suits them. Empty without
        a common pair.
    """
    differences = {pair: ours[pair] - peer[pair] for pair in ours if pair in peer}
    if not differences:
        return {}
    return {"cells": interval(list(differences.values())), "subjects": interval(by_subject(differences))}
