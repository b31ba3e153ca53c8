"""The methods whose quality is compared, each fitted to a budget of trainable parameters.

Adding a contender is adding one entry to `CONTENDERS`. May import `methods` and `unets`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from diffusers import UNet2DConditionModel

from . import BenchError
from .methods import METHODS, AdapterOptions
from .unets import share_weights

SLACK = 0.02
"""By how much a contender's parameters may exceed the budget (share of the budget)."""
NEAR = 0.1
"""How near to the budget is near enough (share of the budget)."""


@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    Attributes:
        label: what a table calls it.
        method: key of `methods.METHODS`.
        router: our router kind.
        init: our initialisation.
    """

    label: str
    method: str
    router: str = "token"
    init: str = "zero"


CONTENDERS: dict[str, Contender] = {
    "base": Contender("base", "base"),
    "lora": Contender("PEFT LoRA", "lora"),
    "peft_lily": Contender("PEFT Lily", "peft_lily"),
    "token-zero": Contender("ours (token, zero)", "lily"),
    "token-zero_sum": Contender("ours (token, zero_sum)", "lily", init="zero_sum"),
    "token-staggered": Contender("ours (token, staggered)", "lily", init="staggered"),
    "static-staggered": Contender("ours (static, staggered)", "lily", router="static", init="staggered"),
}
"""Name -> contender; 'base' is not trained."""


@dataclass(frozen=True)
class Fit:
    """A contender at a budget.

    Attributes:
        options: of the adapter.
        parameters: how many numbers it trains.
    """

    options: AdapterOptions
    parameters: int


def count_parameters(unet: UNet2DConditionModel, name: str, options: AdapterOptions) -> int:
    """Count what a contender trains by putting it on a view of the UNet."""
    return METHODS[CONTENDERS[name].method](share_weights(unet), options).count


def fit_budget(unet: UNet2DConditionModel, name: str, budget: int, stride_A: int = 4, num_B: int = 4) -> Fit:
    """Choose the rank whose parameter count comes nearest to a budget without exceeding it by more than `SLACK`.

    Where rank 1 is too much, more is shared: stride_A is doubled until every pool has one A, then num_B falls to 2.
    Where no rank comes within `NEAR`, less is shared: stride_A is halved, so that small budgets can be met as well.

    Args:
        unet: frozen, without adapters.
        name: key of `CONTENDERS`.
        budget: trainable parameters to come near to.
        stride_A: slots that share an A.
        num_B: experts in a pool.

    Raises:
        BenchError: if nothing fits.
    """
    contender, limit = CONTENDERS[name], budget * (1 + SLACK)
    for stride, experts in _sharings(stride_A, num_B):
        options = AdapterOptions(1, stride, experts, contender.router, contender.init)
        smallest = count_parameters(unet, name, options)
        if smallest <= limit:
            break
    else:
        raise BenchError(
            f"contender '{name}' trains at least {smallest:,} parameters, more than the budget of {budget:,}; "
            "leave it out, or choose a larger budget."
        )

    def distance(fit: Fit) -> int:
        return abs(fit.parameters - budget)

    found: list[Fit] = []
    while stride and (not found or distance(found[-1]) > NEAR * budget):
        shared = dataclasses.replace(options, stride_A=stride)
        if count_parameters(unet, name, shared) > limit:
            break
        found.append(_fit_rank(unet, name, shared, budget, limit))
        stride //= 2
    return min(found, key=distance)


def _fit_rank(unet: UNet2DConditionModel, name: str, options: AdapterOptions, budget: int, limit: float) -> Fit:
    """Choose the rank nearest to a budget, among those within the limit; rank 1 is."""

    def fit(r: int) -> Fit:
        ranked = dataclasses.replace(options, r=r)
        return Fit(ranked, count_parameters(unet, name, ranked))

    smallest = fit(1).parameters
    per_rank = fit(2).parameters - smallest
    best = fit(1 + max(0, int(limit - smallest) // per_rank))
    while best.parameters > limit:
        best = fit(best.options.r - 1)
    while (more := fit(best.options.r + 1)).parameters <= limit:
        best = more
    below = fit(max(1, best.options.r - 1))
    return min(best, below, key=lambda one: abs(one.parameters - budget))


def _sharings(stride_A: int, num_B: int) -> Iterator[tuple[int, int]]:
    """Yield (stride_A, num_B), sharing more and more."""
    yield stride_A, num_B
    while stride_A < 1024:  # no pool of a UNet has so many slots
        stride_A *= 2
        yield stride_A, num_B
    for experts in range(num_B - 1, 1, -1):
        yield stride_A, experts
