"""From a UNet to ordered slots, and from slots to what they share.

A *slot* is one linear projection of one attention layer. Slots are put in forward order, grouped into
*groups* (the slots that share a pool of B experts), cut into runs that share an A, and given a router.
The result is a `Layout`: which tensors an adapter has, what they are called, and which slot uses which.

This is the only file that knows the module names of SDXL's UNet. It imports torch and diffusers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Attention projections that can carry an adapter, in the order in which attention computes them."""

_STAGES = ("down_blocks", "mid_block", "up_blocks")
"""Forward order of the UNet's parts; diffusers registers `up_blocks` before `mid_block`."""


@dataclass(frozen=True)
class Slot:
    """One linear projection of one attention layer.

    Attributes:
        attention: the attention module's name in the UNet.
        projection: one of `PROJECTIONS`.
        in_features, out_features: of the frozen `Linear`.
        reads_context: whether its input is the prompt embedding (to_k, to_v of cross-attention).
    """

    attention: str
    projection: str
    in_features: int
    out_features: int
    reads_context: bool

    @property
    def name(self) -> str:
        """The module name of the frozen projection."""
        return f"{self.attention}.{self.projection}"


POOL_SCOPES: dict[str, Callable[[Slot], str]] = {
    "shape": lambda slot: f"{_key(slot.projection)}-{slot.out_features}x{slot.in_features}",
    "output": lambda slot: f"{_key(slot.projection)}-{slot.out_features}",
    "width": lambda slot: f"{slot.out_features}",
}
"""`pool_scope` -> the name of the group that a slot belongs to. Group names hold no dots: they are part of keys."""

LAYER_ORDERS = ("forward", "registration")
ROUTER_SHARINGS = ("slot", "A", "pool")


def _key(projection: str) -> str:
    return projection.removesuffix(".0")


@dataclass(frozen=True)
class Read:
    """Slots of one attention layer that read the same input and so are computed together.

    Attributes:
        projections: which ones, in the order in which attention computes them.
        reads_context: whether the input is the prompt embedding.
        slots: their indices into `Layout.slots`.
        A, pools, routers: indices of the tensors they use: one per slot, or one that all of them share.
    """

    projections: tuple[str, ...]
    reads_context: bool
    slots: tuple[int, ...]
    A: tuple[int, ...]
    pools: tuple[int, ...]
    routers: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Which slots share what. All names are the keys of the adapter file without their prefix.

    Attributes:
        slots: every slot, in the chosen layer order.
        A_names: names of the A's, `{group}.{k}`; `A_of[j]` is slot j's index into them.
        pools: names of the groups; `pool_of[j]` is slot j's index into them.
        router_names: names of the routers; `router_of[j]` is slot j's index into them.
        stage_of: slot j's place in its pool's depth, from 0 to below 1.
    """

    slots: tuple[Slot, ...]
    A_names: tuple[str, ...]
    A_of: tuple[int, ...]
    pools: tuple[str, ...]
    pool_of: tuple[int, ...]
    router_names: tuple[str, ...]
    router_of: tuple[int, ...]
    stage_of: tuple[Fraction, ...]

    @cached_property
    def A_widths(self) -> tuple[int, ...]:
        """Input width of each A."""
        widths = {a: slot.in_features for a, slot in zip(self.A_of, self.slots, strict=True)}
        return tuple(widths[a] for a in range(len(self.A_names)))

    @cached_property
    def pool_widths(self) -> tuple[int, ...]:
        """Output width of each pool."""
        widths = {p: slot.out_features for p, slot in zip(self.pool_of, self.slots, strict=True)}
        return tuple(widths[p] for p in range(len(self.pools)))

    @cached_property
    def reads(self) -> dict[str, tuple[Read, ...]]:
        """Attention name -> its slots, put together where they read one input and have one shape.

        Self-attention has the reads (q, k, v) and (out); cross-attention (q), (k, v) and (out).
        """
        found: dict[str, dict[tuple, list[int]]] = defaultdict(lambda: defaultdict(list))
        for j, slot in enumerate(self.slots):
            is_output = slot.projection == "to_out.0"
            found[slot.attention][is_output, slot.reads_context, slot.in_features, slot.out_features].append(j)
        return {
            attention: tuple(
                Read(
                    projections=tuple(self.slots[j].projection for j in members),
                    reads_context=self.slots[members[0]].reads_context,
                    slots=tuple(members),
                    A=_once([self.A_of[j] for j in members]),
                    pools=_once([self.pool_of[j] for j in members]),
                    routers=_once([self.router_of[j] for j in members]),
                )
                for members in together.values()
            )
            for attention, together in found.items()
        }


def _once(indices: list[int]) -> tuple[int, ...]:
    """One index if all are the same: what is shared is then computed once."""
    return tuple(indices[:1] if len(set(indices)) == 1 else indices)


def attention_modules(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """Return the UNet's attention layers by name, in registration order."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def find_slots(unet: UNet2DConditionModel, target_modules: Iterable[str], layer_order: str = "forward") -> list[Slot]:
    """List the UNet's slots in order.

    Args:
        unet: an SDXL UNet (or another UNet2DConditionModel with plain transformer blocks).
        target_modules: a subset of `PROJECTIONS`.
        layer_order: "forward" (down, mid, up: the order of execution) or "registration" (the order of
            `named_modules`, which PEFT uses).

    Returns:
        The slots; inside one attention layer in the order of `PROJECTIONS`.

    Raises:
        ValueError: if the UNet has no attention layer, or one that Lily's processor cannot compute.
    """
    wanted = [projection for projection in PROJECTIONS if projection in set(target_modules)]
    attentions = list(attention_modules(unet).items())
    if not attentions:
        raise ValueError(
            f"{type(unet).__name__} has no attention layers, so there is nothing to adapt; pass an SDXL UNet."
        )
    if layer_order == "forward":
        attentions.sort(key=lambda item: _stage(item[0]))  # stable: keeps the order inside a stage
    slots = []
    for name, attention in attentions:
        _check_plain(name, attention)
        for projection in wanted:
            linear = attention.get_submodule(projection)
            context = attention.is_cross_attention and projection in ("to_k", "to_v")
            slots.append(Slot(name, projection, linear.in_features, linear.out_features, context))
    return slots


def make_layout(slots: list[Slot], stride_A: int, pool_scope: str, router_sharing: str) -> Layout:
    """Decide which slots share an A, a pool and a router.

    Inside a pool, consecutive `stride_A` slots of the same input width share an A; the last run may be
    shorter.

    Args:
        slots: in order, from `find_slots`.
        stride_A: slots per A, at least 1.
        pool_scope: a key of `POOL_SCOPES`.
        router_sharing: one of `ROUTER_SHARINGS`.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for j, slot in enumerate(slots):
        groups[POOL_SCOPES[pool_scope](slot)].append(j)
    A_names: list[str] = []
    A_of, pool_of, stage_of = [0] * len(slots), [0] * len(slots), [Fraction(0)] * len(slots)
    for pool, (group, members) in enumerate(groups.items()):
        runs: dict[int, list[int]] = {}  # input width -> [index of the open run's A, slots in it]
        runs_in_group = 0
        for place, j in enumerate(members):
            width = slots[j].in_features
            if width not in runs or runs[width][1] == stride_A:
                runs[width] = [len(A_names), 0]
                A_names.append(f"{group}.{runs_in_group}")
                runs_in_group += 1
            A_of[j], pool_of[j], stage_of[j] = runs[width][0], pool, Fraction(place, len(members))
            runs[width][1] += 1
    routers = {
        "slot": ([slot.name for slot in slots], list(range(len(slots)))),
        "A": (A_names, A_of),
        "pool": (list(groups), pool_of),
    }[router_sharing]
    return Layout(
        slots=tuple(slots),
        A_names=tuple(A_names),
        A_of=tuple(A_of),
        pools=tuple(groups),
        pool_of=tuple(pool_of),
        router_names=tuple(routers[0]),
        router_of=tuple(routers[1]),
        stage_of=tuple(stage_of),
    )


def _stage(name: str) -> int:
    top = name.split(".", 1)[0]
    return _STAGES.index(top) if top in _STAGES else len(_STAGES)


def _check_plain(name: str, attention: Attention) -> None:
    """Refuse attention layers whose extra inputs or norms Lily's processor does not compute."""
    for feature in ("added_kv_proj_dim", "spatial_norm", "group_norm"):
        if getattr(attention, feature, None) is not None:
            raise ValueError(
                f"attention layer '{name}' uses {feature}, which SDXL's UNet does not have "
                "and Lily's attention processor "
                "does not compute; pass an SDXL UNet."
            )
