"""How an adapter starts: one registered function per kind.

Every kind keeps ΔW at zero at step 0. With B = 0, equal routing and Adam all experts of a pool would
take the same step for ever; `zero_sum` and `staggered` are two ways out of that.

A kind fills the tensors of a fresh adapter in place. Imports `targets`, beside torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .targets import Layout

STAGGERED_WEIGHT = 0.7
"""Routing weight that `staggered` gives to the expert of a slot's stretch of depth."""


@dataclass(frozen=True)
class Start:
    """The tensors of a fresh adapter, to be filled.

    Attributes:
        layout: which slot uses which tensor.
        A: (r, i) each. B: (e, r, o) each. R: (e, r) each, or empty. rho: (e,) each, or empty.
        generator: source of all randomness, or None for torch's global one.
    """

    layout: Layout
    A: list[Tensor]
    B: list[Tensor]
    R: list[Tensor]
    rho: list[Tensor]
    generator: torch.Generator | None


@dataclass(frozen=True)
class InitKind:
    """A way to start: what fills the tensors, and what it needs.

    Attributes:
        summary: one line for the documentation and `--help`.
        fill: fills a `Start` in place.
        needs_bias: whether every router must own a bias ρ.
    """

    summary: str
    fill: Callable[[Start], None]
    needs_bias: bool = False


INITS: dict[str, InitKind] = {}


def _register(name: str, summary: str, needs_bias: bool = False):
    def add(fill: Callable[[Start], None]) -> Callable[[Start], None]:
        INITS[name] = InitKind(summary, fill, needs_bias)
        return fill

    return add


def _kaiming(tensor: Tensor, fan_in: int, generator: torch.Generator | None) -> None:
    """Kaiming-uniform with a = √5, which is uniform in ±1/√fan_in."""
    tensor.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)


def _fill(start: Start, *, B: Callable[[Tensor], object], random_routers: bool) -> None:
    """Kaiming A's, the given B's, R Kaiming or 0, ρ = 0."""
    for A in start.A:
        _kaiming(A, A.shape[1], start.generator)
    for pool in start.B:
        B(pool)
    for R in start.R:
        if random_routers:
            _kaiming(R, R.shape[1], start.generator)
        else:
            R.zero_()
    for rho in start.rho:
        rho.zero_()


@_register("zero", "A and routers random, every B zero (PEFT's)")
def zero(start: Start) -> None:
    """Start as PEFT does: A and R Kaiming-uniform, B = 0. Experts of equal routing stay copies."""
    _fill(start, B=Tensor.zero_, random_routers=True)


@_register("zero_sum", "experts random but summing to zero, routers uniform: they cancel until a router learns")
def zero_sum(start: Start) -> None:
    """Start with different experts that cancel under uniform routing; the router has a gradient at once.

    The experts have the scale of a Kaiming-uniform `Linear(o, num_B · r)`, PEFT's for a random B.
    """

    def centred(pool: Tensor) -> None:
        _kaiming(pool, pool.shape[2], start.generator)
        pool.sub_(pool.mean(dim=0, keepdim=True))

    _fill(start, B=centred, random_routers=False)


@_register("staggered", "every B zero, each expert preferred by one stretch of depth", needs_bias=True)
def staggered(start: Start) -> None:
    """Start with each expert as the expert of one stretch of depth (paper, A.1).

    A router whose slots lie at the fraction f of their pool's depth starts with weight
    `STAGGERED_WEIGHT` on expert ⌊f · num_B⌋ through its bias ρ; the other experts share the rest. A
    router that serves several slots takes the mean of their depths.
    """
    _fill(start, B=Tensor.zero_, random_routers=True)
    layout = start.layout
    for index, rho in enumerate(start.rho):
        e = len(rho)
        if e == 1:
            continue
        depths = [depth for depth, router in zip(layout.stage_of, layout.router_of, strict=True) if router == index]
        preferred = math.floor(sum(depths) / len(depths) * e)  # exact: depths are fractions
        rho.fill_(math.log((1 - STAGGERED_WEIGHT) / (e - 1)))
        rho[preferred] = math.log(STAGGERED_WEIGHT)
