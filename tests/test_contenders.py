"""The contenders of the quality benchmark: equal budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import contenders
from benchmarks.methods import METHODS, AdapterOptions
from benchmarks.toyworld.model import make_unet
from benchmarks.unets import share_weights

TRAINED = [name for name in contenders.CONTENDERS if name != "base"]


@pytest.fixture(scope="module")
def unet() -> Any:
    """The toy UNet, frozen."""
    torch.manual_seed(0)
    return make_unet().eval().requires_grad_(False)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("name", TRAINED)
def test_rank_is_the_one_nearest_to_the_budget(unet: Any, name: str, rank: int) -> None:
    budget = contenders.count_parameters(unet, "lora", AdapterOptions(rank))
    fit = contenders.fit_budget(unet, name, budget)
    view = share_weights(unet)
    applied = METHODS[contenders.CONTENDERS[name].method](view, fit.options)
    assert fit.parameters == sum(p.numel() for p in set(view.parameters()) if p.requires_grad) == applied.count
    assert fit.parameters <= 1.02 * budget
    assert abs(fit.parameters - budget) <= 0.1 * budget
    for r in (fit.options.r - 1, fit.options.r + 1):
        if r:
            other = contenders.count_parameters(unet, name, AdapterOptions(**{**vars(fit.options), "r": r}))
            assert other > 1.02 * budget or abs(other - budget) >= abs(fit.parameters - budget)
    if name == "lora":
        assert (fit.options.r, fit.parameters) == (rank, budget)


def test_more_is_shared_where_rank_one_is_too_much(unet: Any) -> None:
    smallest = contenders.count_parameters(unet, "token-zero", AdapterOptions(1))
    fit = contenders.fit_budget(unet, "token-zero", smallest * 4 // 5)
    assert fit.options.stride_A > 4 and fit.parameters <= 1.02 * smallest * 4 // 5
    fewer = contenders.fit_budget(unet, "token-zero", smallest // 2)
    assert fewer.options.num_B < 4 and fewer.parameters <= 1.02 * smallest // 2


def test_budget_that_nothing_fits_is_named(unet: Any) -> None:
    with pytest.raises(
        ValueError, match=r"contender 'lora' trains at least 33,984 parameters, more than the budget of 33,000"
    ):
        contenders.fit_budget(unet, "lora", 33_000)
