"""The bank: sole owner of one adapter's A's, B pools and routers.

A bank is registered once on the UNet; attention processors hold a reference to it and ask it for the
deltas of the slots they serve. Imports `functional`, `routers`, `targets`, `config` and `initialisation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .config import LilyConfig
from .initialisation import INITS, Start
from .routers import ROUTERS
from .targets import Layout, Read, Slot, make_layout


class LilyBank(nn.Module):
    """All parameters of one Lily adapter, each held once.

    Args:
        slots: what is adapted, in order (`targets.find_slots`).
        config: the adapter's configuration.
        generator: source of the random start (CPU), or None for torch's global one.

    Attributes:
        A: (r, i) each, one per run of slots. B: (e, r, o) each, one per pool.
        R: (e, r) each, one per router that reads its input. rho: (e,) each, one per router with a bias.
    """

    def __init__(self, slots: list[Slot], config: LilyConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.layout: Layout = make_layout(slots, config.stride_A, config.pool_scope, config.router_sharing)
        self.reads: dict[str, tuple[Read, ...]] = self.layout.reads
        self.router = ROUTERS[config.router]
        layout, r, e = self.layout, config.r, config.num_B
        routers = len(layout.router_names)
        start = Start(
            layout=layout,
            A=[torch.empty(r, width) for width in layout.A_widths],
            B=[torch.empty(e, r, width) for width in layout.pool_widths],
            R=[torch.empty(e, r) for _ in range(routers * config.has_R)],
            rho=[torch.empty(e) for _ in range(routers * config.has_rho)],
            generator=generator,
        )
        INITS[config.init].fill(start)
        self.A, self.B = nn.ParameterList(start.A), nn.ParameterList(start.B)
        self.R, self.rho = nn.ParameterList(start.R), nn.ParameterList(start.rho)
        self._routing_log: dict[int, Tensor] | None = None

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Return every parameter under its name in the adapter file.

        `A.{group}.{k}` (r, i), `B.{group}` (e, r, o), `router.{owner}` (e, r), `router_bias.{owner}` (e,);
        the owner is a slot's name, an A's, or a group's, as `router_sharing` says.
        """
        layout = self.layout
        named = {f"A.{name}": tensor for name, tensor in zip(layout.A_names, self.A, strict=True)}
        named |= {f"B.{name}": tensor for name, tensor in zip(layout.pools, self.B, strict=True)}
        named |= {f"router.{name}": tensor for name, tensor in zip(layout.router_names, self.R, strict=False)}
        named |= {f"router_bias.{name}": tensor for name, tensor in zip(layout.router_names, self.rho, strict=False)}
        return named

    def deltas(self, x: Tensor, read: Read, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Compute the two factors of the update of the slots that read `x`.

        Args:
            x: (b, n, i).
            read: the slots, one of `reads`.
            scale: strength of this call, times the configuration's `scaling`.

        Returns:
            h: (s, b, n, r) and M: (s, b or 1, r, o); h M is what is added to the base, slot by slot.
        """
        s = len(read.slots)
        h = functional.project_down(x, _take(self.A, read.A, x)).expand(s, -1, -1, -1)
        S = self._route(h, x, read)
        scale = scale * self.config.scaling
        if scale != 1.0:
            S = S * scale  # on a few routing weights rather than on all outputs
        if self.config.dropout and self.training:
            h = F.dropout(h, self.config.dropout)
        M = functional.mix_experts(S, functional.stack_slots(_take(self.B, read.pools, x)))
        return h, M.expand(s, -1, -1, -1)

    def _route(self, h: Tensor, x: Tensor, read: Read) -> Tensor:
        config = self.config
        R = functional.stack_slots(_take(self.R, read.routers, x)) if config.has_R else None
        rho = functional.stack_slots(_take(self.rho, read.routers, x)) if config.has_rho else None
        S = self.router.weights(h, R, rho, config.num_B)
        if self._routing_log is not None:
            self._routing_log.update(zip(read.slots, S.detach().expand(h.shape[0], -1, -1), strict=True))
        return S

    def tensors_of(self, read: Read) -> list[Tensor]:
        """Return every parameter that the slots of a read use."""
        lists = ((self.A, read.A), (self.B, read.pools), (self.R, read.routers), (self.rho, read.routers))
        return [tensors[i] for tensors, indices in lists if len(tensors) for i in indices]

    @property
    def is_recording(self) -> bool:
        """Whether a `record_routing` block is open."""
        return self._routing_log is not None

    @contextmanager
    def record_routing(self) -> Iterator[dict[int, Tensor]]:
        """Collect the routing weights of the forwards inside the block.

        Yields:
            slot index -> S of the last forward: (b or 1, e), float32.
        """
        self._routing_log = {}
        try:
            yield self._routing_log
        finally:
            self._routing_log = None


def _take(tensors: nn.ParameterList, indices: Sequence[int], x: Tensor) -> list[Tensor]:
    """Pick tensors in the dtype that `x` is computed in; under autocast the operators cast themselves."""
    if torch.is_autocast_enabled(x.device.type):
        return [tensors[i] for i in indices]
    return [tensors[i].to(x.dtype) for i in indices]
