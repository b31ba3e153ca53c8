"""Which slots there are, in which order, and what they share."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from benchmarks.unets import UNETS
from lily_diffusers import LilyConfig
from lily_diffusers.bank import LilyBank
from lily_diffusers.targets import PROJECTIONS, find_slots, make_layout
from tests.conftest import unet_inputs


@pytest.fixture(scope="module")
def sdxl() -> UNet2DConditionModel:
    """SDXL's full UNet without its weights."""
    return UNETS["sdxl"]()


def test_sdxl_has_560_slots_in_twelve_groups(sdxl: UNet2DConditionModel) -> None:
    slots = find_slots(sdxl, PROJECTIONS)
    layout = make_layout(slots, 4, "shape", "slot")
    sizes = Counter(layout.pools[pool] for pool in layout.pool_of)
    assert len(slots) == 560
    assert sizes == {
        "to_q-640x640": 20, "to_out-640x640": 20, "to_q-1280x1280": 120, "to_out-1280x1280": 120,
        "to_k-640x640": 10, "to_v-640x640": 10, "to_k-640x2048": 10, "to_v-640x2048": 10,
        "to_k-1280x1280": 60, "to_v-1280x1280": 60, "to_k-1280x2048": 60, "to_v-1280x2048": 60,
    }  # fmt: skip


def test_sdxl_has_exactly_7919616_parameters_at_rank_32(sdxl: UNet2DConditionModel) -> None:
    config = LilyConfig(r=32, stride_A=4, num_B=4, pool_scope="shape")
    with torch.device("meta"):
        bank = LilyBank(find_slots(sdxl, config.target_modules), config)
    assert sum(p.numel() for p in bank.parameters()) == 7_919_616
    assert sum(p.numel() for p in bank.named_tensors().values()) == 7_919_616


def test_forward_order_is_the_order_of_execution(unet: UNet2DConditionModel) -> None:
    executed: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: executed.append(name))
        for name, module in unet.named_modules()
        if isinstance(module, Attention)
    ]
    unet(**unet_inputs())
    for hook in hooks:
        hook.remove()
    forward = [slot.attention for slot in find_slots(unet, ["to_q"])]
    assert forward == executed
    registered = [name for name, module in unet.named_modules() if isinstance(module, Attention)]
    assert [slot.attention for slot in find_slots(unet, ["to_q"], "registration")] == registered != forward


@pytest.mark.parametrize("stride_A", [1, 2, 3, 100])
@pytest.mark.parametrize("pool_scope", ["shape", "output", "width"])
def test_runs_share_an_A_of_their_input_width(unet: UNet2DConditionModel, stride_A: int, pool_scope: str) -> None:
    slots = find_slots(unet, PROJECTIONS)
    layout = make_layout(slots, stride_A, pool_scope, "slot")
    for a, width in enumerate(layout.A_widths):
        members = [j for j in range(len(slots)) if layout.A_of[j] == a]
        assert 1 <= len(members) <= stride_A
        assert {slots[j].in_features for j in members} == {width}
        assert len({layout.pool_of[j] for j in members}) == 1
    for pool, name in enumerate(layout.pools):
        for width in {slot.in_features for slot in slots}:
            members = [j for j in range(len(slots)) if layout.pool_of[j] == pool and slots[j].in_features == width]
            runs = [layout.A_of[j] for j in members]
            assert runs == sorted(runs), name
            sizes = list(Counter(runs).values())
            assert all(size == stride_A for size in sizes[:-1])  # only the last run may be shorter


def test_pool_scopes_widen(unet: UNet2DConditionModel) -> None:
    slots = find_slots(unet, PROJECTIONS)
    pools = {scope: make_layout(slots, 2, scope, "slot").pools for scope in ("shape", "output", "width")}
    assert len(pools["shape"]) == 12 and len(pools["output"]) == 8 and pools["width"] == ("32", "64")
    assert "to_k-32x48" in pools["shape"] and "to_k-32x32" in pools["shape"] and "to_k-32" in pools["output"]


@pytest.mark.parametrize(("sharing", "count"), [("slot", 136), ("A", 38), ("pool", 12)])
def test_router_sharings(unet: UNet2DConditionModel, sharing: str, count: int) -> None:
    layout = make_layout(find_slots(unet, PROJECTIONS), 4, "shape", sharing)
    assert len(layout.router_names) == count == len(set(layout.router_of))


def test_attention_with_inputs_of_its_own_is_refused() -> None:
    block = torch.nn.ModuleDict({"attn": Attention(query_dim=8, heads=1, dim_head=8, added_kv_proj_dim=8)})
    with pytest.raises(ValueError, match="'attn' uses added_kv_proj_dim"):
        find_slots(block, PROJECTIONS)  # type: ignore[arg-type]


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention layers"):
        find_slots(torch.nn.Linear(2, 2), PROJECTIONS)  # type: ignore[arg-type]
