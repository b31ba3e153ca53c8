"""The attention processor under everything that diffusers does to attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LilyConfig as PeftLilyConfig
from peft import inject_adapter_in_model

from lily_diffusers import LilyConfig, inject_lily
from lily_diffusers.bank import LilyBank
from tests.conftest import perturb, unet_inputs


def perturbed(unet: UNet2DConditionModel, scale: float = 0.3, **options) -> LilyBank:
    """Inject a small adapter whose every tensor, routers included, is far from its start."""
    bank = inject_lily(unet, LilyConfig(**{"r": 4, "stride_A": 2, "num_B": 3} | options))
    perturb(bank, scale)
    with torch.no_grad():
        for R in bank.R:
            R.mul_(5)
    return bank


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def peft_lily(unet: UNet2DConditionModel, r: int, stride_A: int, num_B: int) -> None:
    config = PeftLilyConfig(r=r, stride_A=stride_A, num_B=num_B, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    inject_adapter_in_model(config, unet)


def copy_into_peft(bank: LilyBank, unet: UNet2DConditionModel) -> None:
    """Give PEFT's layers the bank's tensors."""
    layout = bank.layout
    with torch.no_grad():
        for j, slot in enumerate(layout.slots):
            layer = unet.get_submodule(slot.name)
            layer.lily_A["default"].weight.copy_(bank.A[layout.A_of[j]])
            layer.lily_B["default"].weight.copy_(bank.B[layout.pool_of[j]].flatten(0, 1))
            layer.lily_router["default"].weight.copy_(bank.R[layout.router_of[j]])


@pytest.mark.parametrize(("stride_A", "num_B"), list(itertools.product([1, 2, 3], [2, 5])))
@torch.no_grad()
def test_batch_router_in_registration_order_is_pefts_lily(tiny_unets, stride_A: int, num_B: int) -> None:
    ours, pefts, base = tiny_unets(3)
    bank = perturbed(ours, stride_A=stride_A, num_B=num_B, router="batch", layer_order="registration")
    peft_lily(pefts, 4, stride_A, num_B)
    copy_into_peft(bank, pefts)
    assert len({id(parameter) for name, parameter in pefts.named_parameters() if "lily_" in name}) == len(
        list(bank.parameters())
    )
    expected = pefts(**unet_inputs(3)).sample
    assert relative(expected, base(**unet_inputs(3)).sample) > 0.01
    torch.testing.assert_close(ours(**unet_inputs(3)).sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", ["token", "sequence", "static", "uniform"])
@torch.no_grad()
def test_batch_mates_do_not_change_a_result(unet: UNet2DConditionModel, router: str) -> None:
    perturbed(unet, router=router)
    together = unet(**unet_inputs(4)).sample
    for i in range(4):
        torch.testing.assert_close(_alone(unet, i), together[i : i + 1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pefts_lily_changes_a_result_with_its_batch_mates(tiny_unets, record_property) -> None:
    """What `router='token'` mends; the figure is printed with `pytest -rP`."""
    unet, ours = tiny_unets(2)
    bank = perturbed(ours, router="batch", layer_order="registration")
    peft_lily(unet, 4, 2, 3)
    copy_into_peft(bank, unet)
    change = max(relative(_alone(unet, i), unet(**unet_inputs(4)).sample[i : i + 1]) for i in range(4))
    print(f"PEFT's Lily: adding batch-mates changes a result by {100 * change:.2f} %")
    record_property("peft_batch_change", change)
    assert change > 1e-3


def _alone(unet: UNet2DConditionModel, i: int) -> torch.Tensor:
    inputs = unet_inputs(4)
    conditions = {name: value[i : i + 1] for name, value in inputs["added_cond_kwargs"].items()}
    return unet(
        inputs["sample"][i : i + 1],
        inputs["timestep"],
        inputs["encoder_hidden_states"][i : i + 1],
        added_cond_kwargs=conditions,
    ).sample


@torch.no_grad()
def test_attention_masks_mean_what_they_mean_to_diffusers(unet: UNet2DConditionModel) -> None:
    inputs = unet_inputs(2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    unet.set_attn_processor(AttnProcessor2_0())
    expected = unet(**inputs, encoder_attention_mask=mask).sample
    bank = inject_lily(unet, LilyConfig(r=4))
    assert torch.equal(unet(**inputs, encoder_attention_mask=mask).sample, expected)
    perturb(bank)
    masked = unet(**inputs, encoder_attention_mask=mask).sample
    assert not torch.equal(masked, unet(**inputs).sample)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_unets) -> None:
    gradients = []
    for unet, checkpointing in zip(tiny_unets(2), (False, True), strict=True):
        bank = perturbed(unet.train(), dropout=0.2)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        torch.manual_seed(0)  # of the dropout masks, which recomputation must repeat
        unet(**unet_inputs()).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in bank.named_tensors().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)
    assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_float32_adapters_on_a_half_precision_base(tiny_unets, dtype: torch.dtype) -> None:
    exact, unet = tiny_unets(2)
    perturbed(exact)
    unet.to(dtype).requires_grad_(False)
    bank = perturbed(unet)
    inputs = unet_inputs()
    expected = exact(**inputs).sample
    with torch.autocast("cpu", dtype):
        result = unet(**inputs).sample
    assert relative(result.float(), expected) < 0.05
    result.float().square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all() for p in bank.parameters())


@torch.no_grad()
def test_float32_adapter_follows_the_dtype_of_its_input_without_autocast(tiny_unets) -> None:
    exact, unet = tiny_unets(2)
    perturbed(exact)
    perturbed(unet.to(torch.bfloat16))  # the base is bfloat16, the adapter stays float32
    inputs = unet_inputs()
    half = {name: value.to(torch.bfloat16) for name, value in inputs["added_cond_kwargs"].items()}
    result = unet(
        inputs["sample"].to(torch.bfloat16), inputs["timestep"], inputs["encoder_hidden_states"].to(torch.bfloat16),
        added_cond_kwargs=half,
    ).sample  # fmt: skip
    assert relative(result.float(), exact(**inputs).sample) < 0.1


def test_dropout_acts_in_training_only(unet: UNet2DConditionModel) -> None:
    perturbed(unet, dropout=0.5)
    inputs = unet_inputs()
    with torch.no_grad():
        assert torch.equal(unet(**inputs).sample, unet(**inputs).sample)
        unet.train()
        assert not torch.equal(unet(**inputs).sample, unet(**inputs).sample)


def test_routing_is_recorded_per_slot(unet: UNet2DConditionModel) -> None:
    bank = perturbed(unet)
    with torch.no_grad(), bank.record_routing() as routing:
        unet(**unet_inputs(2))
    assert sorted(routing) == list(range(len(bank.layout.slots)))
    for weights in routing.values():
        assert weights.shape == (2, 3)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    with torch.no_grad():
        unet(**unet_inputs(2))
    assert bank._routing_log is None


def one_block_unet() -> UNet2DConditionModel:
    """The smallest UNet that has self- and cross-attention: it compiles in seconds."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        attention_head_dim=4,
        cross_attention_dim=48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    ).eval()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own internals
def test_compiles_without_a_graph_break() -> None:
    unet = one_block_unet()
    perturbed(unet)
    expected = unet(**unet_inputs()).sample
    torch.compiler.reset()
    compiled = torch.compile(unet, fullgraph=True)
    torch.testing.assert_close(compiled(**unet_inputs()).sample, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_the_whole_tiny_unet_is_one_graph(unet: UNet2DConditionModel) -> None:
    """The same through the compiler's front end, which finds graph breaks and generates no code."""
    perturbed(unet)
    expected = unet(**unet_inputs()).sample
    torch.compiler.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**unet_inputs()).sample, expected, rtol=1e-4, atol=1e-4)
