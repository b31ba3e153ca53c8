"""Router kinds: how a slot weighs the experts of its pool.

A kind is one subclass of `Router`, registered by name. Configuration checks, the command line's
choices, merge guards, the table in the documentation and the parametrised tests all read
`ROUTERS`, so a new kind is one class in this file.

Imports `functional` only, beside torch.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from . import functional


class Router:
    """What the rest of the package needs to know of a router kind.

    Attributes:
        summary: one line for the documentation and `--help`.
        reads_input: whether the weights depend on the layer's input. Such a router owns R: (e, r) and
            cannot be merged into the base weights.
        has_bias: whether it always owns ρ: (e,); kinds that read their input may be given one by
            `router_bias`.
        warning: what to tell someone who trains with it, or None.
    """

    summary: ClassVar[str]
    reads_input: ClassVar[bool] = True
    has_bias: ClassVar[bool] = False
    warning: ClassVar[str | None] = None

    @staticmethod
    def weights(h: Tensor, R: Tensor | None, rho: Tensor | None, num_B: int) -> Tensor:
        """Return S: (s, b, e), or (s, 1, e) if all samples share it; float32, rows sum to 1.

        Args:
            h: (s, b, n, r).
            R: (s, e, r) or (1, e, r); None for kinds that do not read their input.
            rho: (s, e) or (1, e) or None.
            num_B: e, the number of experts.
        """
        raise NotImplementedError


ROUTERS: dict[str, type[Router]] = {}


def _register(name: str):
    def add(kind: type[Router]) -> type[Router]:
        ROUTERS[name] = kind
        return kind

    return add


@_register("token")
class TokenRouter(Router):
    """Each token votes with a softmax; a sample's weights are the mean of its tokens' votes."""

    summary = "mean over the tokens of softmax(h Rᵀ), per sample"

    @staticmethod
    def weights(h: Tensor, R: Tensor | None, rho: Tensor | None, num_B: int) -> Tensor:
        """See `functional.route_token`."""
        assert R is not None
        return functional.route_token(h, R, rho)


@_register("sequence")
class SequenceRouter(Router):
    """The tokens' scores are summed, then one softmax: sharper the more tokens there are."""

    summary = "softmax of the sum over the tokens of h Rᵀ, per sample (the paper's Eq. 2)"

    @staticmethod
    def weights(h: Tensor, R: Tensor | None, rho: Tensor | None, num_B: int) -> Tensor:
        """See `functional.route_sequence`."""
        assert R is not None
        return functional.route_sequence(h, R, rho)


@_register("batch")
class BatchRouter(Router):
    """The reference code's and PEFT's routing, kept for imported adapters and parity tests."""

    summary = "mean over batch and tokens of softmax(h Rᵀ), as PEFT and the reference code"
    warning = (
        "router 'batch' averages over the batch, so the pictures of one batch change each other, and so do the two "
        "halves of classifier-free guidance; train with router='token' unless you need PEFT's exact behaviour."
    )

    @staticmethod
    def weights(h: Tensor, R: Tensor | None, rho: Tensor | None, num_B: int) -> Tensor:
        """See `functional.route_batch`."""
        assert R is not None
        return functional.route_batch(h, R, rho)


@_register("static")
class StaticRouter(Router):
    """Learned weights per router, the same for every input; can be merged into the base weights."""

    summary = "softmax(ρ), learned, the same for every input"
    reads_input = False
    has_bias = True

    @staticmethod
    def weights(h: Tensor, R: Tensor | None, rho: Tensor | None, num_B: int) -> Tensor:
        """See `functional.route_static`."""
        assert rho is not None
        return functional.route_static(rho)


@_register("uniform")
class UniformRouter(Router):
    """Every expert has the same weight: Lily without selectivity (paper, appendix H)."""

    summary = "1 / num_B, nothing learned (the paper's appendix H)"
    reads_input = False

    @staticmethod
    def weights(h: Tensor, R: Tensor | None, rho: Tensor | None, num_B: int) -> Tensor:
        """Return 1 / num_B for every expert: (s, 1, e)."""
        return torch.full((h.shape[0], 1, num_B), 1.0 / num_B, dtype=torch.float32, device=h.device)
