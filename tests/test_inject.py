"""Adapters on a UNet: how they start, act, mix, and leave no trace."""

from __future__ import annotations

import copy
import itertools
import logging

import accelerate
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

from lily_diffusers import LilyConfig, get_lily_adapters, inject_lily, lily_disabled, remove_lily, set_lily_adapters
from lily_diffusers.initialisation import INITS, STAGGERED_WEIGHT
from lily_diffusers.routers import ROUTERS
from lily_diffusers.targets import POOL_SCOPES, ROUTER_SHARINGS
from tests.conftest import perturb, unet_inputs


def start_config(router: str, init: str, **options) -> LilyConfig | None:
    """The configuration of a router and an init, with the bias that the init needs; None if they do not go together."""
    bias = INITS[init].needs_bias and ROUTERS[router].reads_input
    try:
        return LilyConfig(r=4, stride_A=2, num_B=3, router=router, init=init, router_bias=bias, **options)
    except ValueError:
        return None


STARTS = [(router, init) for router, init in itertools.product(ROUTERS, INITS) if start_config(router, init)]


@torch.no_grad()
def output(unet: UNet2DConditionModel, batch: int = 2, **kwargs) -> torch.Tensor:
    return unet(**unet_inputs(batch), **kwargs).sample


def test_every_pair_of_router_and_init_is_covered() -> None:
    assert set(itertools.product(ROUTERS, INITS)) - set(STARTS) == {("uniform", "staggered")}


@pytest.mark.parametrize(("router", "init"), STARTS)
def test_injection_leaves_the_output_equal_at_step_0(unet: UNet2DConditionModel, router: str, init: str) -> None:
    base = output(unet)
    inject_lily(unet, start_config(router, init))
    if init == "zero_sum":  # its experts cancel to rounding
        assert (output(unet) - base).norm() / base.norm() < 1e-6
    else:
        assert torch.equal(output(unet), base)


@pytest.mark.parametrize(("router", "init"), STARTS)
def test_every_start_gets_a_gradient_that_moves_the_output(unet: UNet2DConditionModel, router: str, init: str) -> None:
    base = output(unet)
    bank = inject_lily(unet, start_config(router, init))
    optimizer = torch.optim.Adam(bank.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        unet(**unet_inputs()).sample.square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in bank.parameters())
    assert (output(unet) - base).norm() / base.norm() > 1e-3


def test_zero_sum_gives_the_router_a_gradient_at_step_0_and_zero_does_not(unet: UNet2DConditionModel) -> None:
    norms = {}
    for init in ("zero", "zero_sum"):
        bank = inject_lily(unet, start_config("token", init), init)
        unet(**unet_inputs()).sample.square().mean().backward()
        norms[init] = sum(float(R.grad.norm()) for R in bank.R)
    assert norms["zero"] == 0 and norms["zero_sum"] > 1e-6


def test_zero_sum_experts_sum_to_zero_and_differ(unet: UNet2DConditionModel) -> None:
    bank = inject_lily(unet, start_config("token", "zero_sum"))
    for pool in bank.B:
        assert pool.sum(0).abs().max() < 1e-6
        assert not torch.allclose(pool[0], pool[1])


@pytest.mark.parametrize("router", ["token", "static"])
def test_staggered_gives_each_stretch_of_depth_its_expert(unet: UNet2DConditionModel, router: str) -> None:
    bank = inject_lily(unet, start_config(router, "staggered"))
    layout, e = bank.layout, bank.config.num_B
    for pool in range(len(layout.pools)):
        slots = [j for j in range(len(layout.slots)) if layout.pool_of[j] == pool]
        for place, j in enumerate(slots):
            weights = torch.softmax(bank.rho[layout.router_of[j]], 0)
            assert int(weights.argmax()) == place * e // len(slots)
            assert weights.max().item() == pytest.approx(STAGGERED_WEIGHT)


@pytest.mark.parametrize("router_sharing", ROUTER_SHARINGS)
@pytest.mark.parametrize("pool_scope", POOL_SCOPES)
@pytest.mark.parametrize("num_B", [1, 3])
def test_every_sharing_acts_and_counts_each_tensor_once(
    unet: UNet2DConditionModel, router_sharing: str, pool_scope: str, num_B: int
) -> None:
    base = output(unet)
    bank = inject_lily(
        unet, LilyConfig(r=4, stride_A=3, num_B=num_B, router_sharing=router_sharing, pool_scope=pool_scope)
    )
    perturb(bank)
    assert (output(unet) - base).norm() / base.norm() > 1e-3
    layout = bank.layout
    expected = sum(4 * width for width in layout.A_widths) + sum(num_B * 4 * width for width in layout.pool_widths)
    expected += len(layout.router_names) * num_B * 4
    assert sum(parameter.numel() for parameter in bank.parameters()) == expected


def test_a_subset_of_projections_adapts_only_those(unet: UNet2DConditionModel) -> None:
    bank = inject_lily(unet, LilyConfig(r=4, target_modules=["to_v"]))
    perturb(bank)
    attention = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    work = {"to_q": (attention.to_q, x), "to_k": (attention.to_k, x), "to_v": (attention.to_v, x)}
    with torch.no_grad():
        changed = [
            not torch.equal(adapted, frozen(x))
            for adapted, (frozen, _) in zip(attention.processor._project(work, 1.0), work.values(), strict=True)
        ]
    assert changed == [False, False, True]


def test_removal_restores_the_unet_exactly(unet: UNet2DConditionModel) -> None:
    base = output(unet)
    before = (dict(unet.attn_processors), list(unet.state_dict()), set(vars(unet)), list(unet._modules))
    hooks = [
        len(getattr(unet, name)) for name in ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_post_hooks")
    ]
    perturb(inject_lily(unet, LilyConfig(r=4)))
    assert not torch.equal(output(unet), base)
    assert list(unet.state_dict()) == before[1]  # the base's state dict never shows the adapter
    unet.load_state_dict(unet.state_dict())  # and can be loaded strictly while it is there
    remove_lily(unet)
    assert torch.equal(output(unet), base)
    assert (dict(unet.attn_processors), list(unet.state_dict()), set(vars(unet)), list(unet._modules)) == before
    assert hooks == [
        len(getattr(unet, name)) for name in ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_post_hooks")
    ]
    remove_lily(unet)  # nothing left to remove: no error


def test_adapters_mix_and_the_last_one_leaves_nothing(unet: UNet2DConditionModel) -> None:
    base = output(unet)
    single = {}
    for seed, name in enumerate(("duck", "style")):
        perturb(inject_lily(unet, LilyConfig(r=4 + seed), name), seed=seed)
        single[name] = output(unet)
    set_lily_adapters(unet, ["duck", "style"], [1.0, 0.5])
    assert get_lily_adapters(unet) == {"duck": 1.0, "style": 0.5}
    both = output(unet)
    assert all(not torch.allclose(both, one) for one in (base, *single.values()))
    set_lily_adapters(unet, ["style", "duck"], [0.5, 1.0])
    torch.testing.assert_close(output(unet), both, rtol=1e-5, atol=1e-5)  # the order does not matter
    set_lily_adapters(unet, "duck")
    assert torch.equal(output(unet), single["duck"])
    remove_lily(unet, "duck")
    assert get_lily_adapters(unet) == {"style": 0.0} and torch.equal(output(unet), base)
    remove_lily(unet, "style")
    assert not hasattr(unet, "lily")


def test_strengths_scale_the_update(unet: UNet2DConditionModel) -> None:
    base = output(unet)
    perturb(inject_lily(unet, LilyConfig(r=4), "duck"))
    full = output(unet)
    half_by_call = output(unet, cross_attention_kwargs={"lily_scale": 0.5})
    set_lily_adapters(unet, "duck", 0.5)
    torch.testing.assert_close(output(unet), half_by_call, rtol=1e-6, atol=1e-6)
    assert torch.equal(output(unet, cross_attention_kwargs={"lily_scale": 0.0}), base)
    ratio = (half_by_call - base).norm() / (full - base).norm()
    assert 0.4 < ratio < 0.6


def test_diffusers_keeps_scale_to_itself(unet: UNet2DConditionModel) -> None:
    """`scale` is diffusers' name for PEFT's LoRA strength and never arrives: ours has a name of its own."""
    perturb(inject_lily(unet, LilyConfig(r=4)))
    assert torch.equal(output(unet, cross_attention_kwargs={"scale": 0.5}), output(unet))


@pytest.mark.parametrize("call", ["set_attn_processor", "fuse_qkv_projections", "set_attention_slice"])
def test_replaced_processors_are_noticed_and_can_be_put_back(unet: UNet2DConditionModel, call: str) -> None:
    perturb(inject_lily(unet, LilyConfig(r=4), "duck"))
    expected = output(unet)
    argument = {
        "set_attn_processor": [AttnProcessor2_0()],
        "fuse_qkv_projections": [],
        "set_attention_slice": ["auto"],
    }[call]
    getattr(unet, call)(*argument)
    with pytest.raises(RuntimeError, match=r"34 attention processors .* set_lily_adapters\(pipe, names\)"):
        output(unet)
    set_lily_adapters(unet, "duck")
    torch.testing.assert_close(output(unet), expected, rtol=1e-5, atol=1e-5)


def test_processors_with_weights_of_their_own_are_not_replaced(unet: UNet2DConditionModel) -> None:
    attention = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    attention.set_processor(IPAdapterAttnProcessor2_0(hidden_size=64, cross_attention_dim=48))
    with pytest.raises(ValueError, match="IPAdapterAttnProcessor2_0, which Lily would silently replace"):
        inject_lily(unet, LilyConfig(r=4))
    assert not hasattr(unet, "lily") and not unet._forward_pre_hooks


@pytest.mark.parametrize("name", ["", "v1.0", "train", "keys", "training"])
def test_names_that_a_module_cannot_have_are_refused(unet: UNet2DConditionModel, name: str) -> None:
    with pytest.raises(ValueError, match="must be a name without dots"):
        inject_lily(unet, LilyConfig(r=4), name)
    assert not hasattr(unet, "lily")


def test_a_second_adapter_that_cannot_be_put_on_is_not_left_behind(unet: UNet2DConditionModel) -> None:
    inject_lily(unet, LilyConfig(r=4), "duck")
    attention = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    attention.set_processor(IPAdapterAttnProcessor2_0(hidden_size=64, cross_attention_dim=48))
    with pytest.raises(ValueError, match="IPAdapterAttnProcessor2_0"):
        inject_lily(unet, LilyConfig(r=4), "style")
    assert get_lily_adapters(unet) == {"duck": 1.0}


def test_processors_that_outlive_the_adapter_compute_the_base(unet: UNet2DConditionModel) -> None:
    base = output(unet)
    perturb(inject_lily(unet, LilyConfig(r=4)))
    kept = dict(unet.attn_processors)
    remove_lily(unet)
    unet.set_attn_processor(kept)
    assert torch.equal(output(unet), base)


def test_what_happens_inside_disabled_stands_after_it(unet: UNet2DConditionModel) -> None:
    base = output(unet)
    perturb(inject_lily(unet, LilyConfig(r=4), "duck"))
    perturb(inject_lily(unet, LilyConfig(r=4), "style"), seed=2)
    style = output(unet)
    with lily_disabled(unet):
        with lily_disabled(unet):
            assert torch.equal(output(unet), base)
        remove_lily(unet, "duck")
        assert torch.equal(output(unet), base)
    assert get_lily_adapters(unet) == {"style": 1.0} and torch.equal(output(unet), style)
    with lily_disabled(unet):
        remove_lily(unet, "style")
    assert torch.equal(output(unet), base)


def test_offloading_the_unet_as_a_whole_takes_the_adapter_along(unet: UNet2DConditionModel) -> None:
    """What `enable_model_cpu_offload` does to the UNet: it works, and nothing of the adapter stays behind."""
    bank = inject_lily(unet, LilyConfig(r=4))
    perturb(bank)
    expected = output(unet)
    unet, hook = accelerate.cpu_offload_with_hook(unet, execution_device="cpu")
    assert torch.equal(output(unet), expected)
    hook.remove()
    unet.to("meta")
    assert {parameter.device.type for parameter in bank.parameters()} == {"meta"}


def test_misuse_is_named(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match="has no Lily adapter; load one"):
        set_lily_adapters(unet, "duck")
    inject_lily(unet, LilyConfig(r=4), "duck")
    with pytest.raises(ValueError, match="'duck' is already there"):
        inject_lily(unet, LilyConfig(r=4), "duck")
    with pytest.raises(ValueError, match="no adapter named 'dog'; loaded are 'duck'"):
        set_lily_adapters(unet, "dog")
    with pytest.raises(ValueError, match=r"adapter weights \[nan\] must be finite numbers"):
        set_lily_adapters(unet, ["duck"], [float("nan")])
    with pytest.raises(ValueError, match="give one weight a name"):
        set_lily_adapters(unet, ["duck"], [1.0, 2.0])


def test_training_with_the_batch_router_warns(unet: UNet2DConditionModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        inject_lily(unet, LilyConfig(r=4, router="batch"))
    assert "pictures of one batch change each other" in caplog.text


def test_sequential_offload_is_refused_in_a_sentence(unet: UNet2DConditionModel) -> None:
    inject_lily(unet, LilyConfig(r=4))
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="enable_model_cpu_offload"):
        output(unet)
    remove_lily(unet)
    with pytest.raises(ValueError, match="enable_model_cpu_offload"):
        inject_lily(unet, LilyConfig(r=4))


def test_a_copy_of_the_unet_has_an_adapter_of_its_own(unet: UNet2DConditionModel) -> None:
    perturb(inject_lily(unet, LilyConfig(r=4)))
    expected = output(unet)
    copied = copy.deepcopy(unet)
    assert torch.equal(output(copied), expected)
    remove_lily(unet)
    assert torch.equal(output(copied), expected)
    perturb(copied.lily)
    assert not torch.equal(output(copied), expected)
    remove_lily(copied)
    assert torch.equal(output(copied), output(unet))


def test_moving_the_unet_moves_the_adapter(unet: UNet2DConditionModel) -> None:
    bank = inject_lily(unet, LilyConfig(r=4))
    unet.to(torch.bfloat16)
    assert {parameter.dtype for parameter in bank.parameters()} == {torch.bfloat16}
    held = [id(parameter) for parameter in unet.parameters()]
    assert len(held) == len(set(held)) and {id(parameter) for parameter in bank.parameters()} <= set(held)
