"""Router kinds: how a slot weighs the experts of its pool.

A kind is one registered function. Configuration checks, the command line's choices, merge guards, the
tables in the documentation and the parametrised tests all read `ROUTERS`, so a new kind is one function
in this file.

Imports `functional` only, beside torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import functional


class Weigh(Protocol):
    """Signature of a router kind's function."""

    def __call__(self, h: Tensor, R: Tensor | None, rho: Tensor | None, num_B: int) -> Tensor:
        """Return S: (s, b, e), or (s, 1, e) if all samples share it; float32, rows sum to 1.

        Args:
            h: (s, b, n, r).
            R: (s, e, r) or (1, e, r); None for kinds that do not read their input.
            rho: (s, e) or (1, e), or None.
            num_B: e, the number of experts.
        """
        ...


@dataclass(frozen=True)
class RouterKind:
    """A way to weigh experts: what computes the weights, and what the rest of the package needs to know of it.

    Attributes:
        summary: one line for the documentation and `--help`.
        weights: the function.
        reads_input: whether the weights depend on the layer's input. Such a router owns R: (e, r) and cannot be
            merged into the base weights.
        has_bias: whether it always owns ρ: (e,); kinds that read their input may be given one by `router_bias`.
        warning: what to tell someone who trains with it, or None.
    """

    summary: str
    weights: Weigh
    reads_input: bool = True
    has_bias: bool = False
    warning: str | None = None


ROUTERS: dict[str, RouterKind] = {}


def _register(name: str, summary: str, **properties) -> Callable[[Weigh], Weigh]:
    def add(weights: Weigh) -> Weigh:
        ROUTERS[name] = RouterKind(summary, weights, **properties)
        return weights

    return add


@_register("token", "mean over the tokens of softmax(h Rᵀ), per sample")
def token(h: Tensor, R: Tensor | None, rho: Tensor | None, num_B: int) -> Tensor:
    """Each token votes with a softmax; a sample's weights are the mean of its tokens' votes."""
    assert R is not None
    return functional.route_token(h, R, rho)


@_register("sequence", "softmax of the sum over the tokens of h Rᵀ, per sample (the paper's Eq. 2)")
def sequence(h: Tensor, R: Tensor | None, rho: Tensor | None, num_B: int) -> Tensor:
    """The tokens' scores are summed, then one softmax: sharper the more tokens there are."""
    assert R is not None
    return functional.route_sequence(h, R, rho)


@_register(
    "batch",
    "mean over batch and tokens of softmax(h Rᵀ), as PEFT and the reference code",
    warning="router 'batch' averages over the batch, so the pictures of one batch change each other, and so do the "
    "two halves of classifier-free guidance; train with router='token' unless you need PEFT's exact behaviour.",
)
def batch(h: Tensor, R: Tensor | None, rho: Tensor | None, num_B: int) -> Tensor:
    """The reference code's and PEFT's routing, kept for imported adapters and parity tests."""
    assert R is not None
    return functional.route_batch(h, R, rho)


@_register("static", "softmax(ρ), learned, the same for every input", reads_input=False, has_bias=True)
def static(h: Tensor, R: Tensor | None, rho: Tensor | None, num_B: int) -> Tensor:
    """Learned weights per router, the same for every input; they can be merged into the base weights."""
    assert rho is not None
    return functional.route_static(rho)


@_register("uniform", "1 / num_B, nothing learned (the paper's appendix H)", reads_input=False)
def uniform(h: Tensor, R: Tensor | None, rho: Tensor | None, num_B: int) -> Tensor:
    """Every expert has the same weight: Lily without selectivity (paper, appendix H)."""
    return torch.full((h.shape[0], 1, num_B), 1.0 / num_B, dtype=torch.float32, device=h.device)
