"""The attention processor under everything that diffusers does to attention."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LilyConfig as PeftLilyConfig
from peft import inject_adapter_in_model

from lily_diffusers import LilyConfig, inject_lily, set_lily_adapters
from lily_diffusers.bank import LilyBank
from lily_diffusers.targets import attention_modules
from tests.conftest import perturb, unet_inputs


def perturbed(unet: UNet2DConditionModel, scale: float = 0.1, **options) -> LilyBank:
    """Inject a small adapter whose every tensor, routers included, is far from its start."""
    config = LilyConfig(**{"r": 4, "stride_A": 2, "num_B": 3} | options)
    bank = inject_lily(unet, config, generator=torch.Generator().manual_seed(0))
    perturb(bank, scale)
    with torch.no_grad():
        for R in bank.R:
            R.mul_(5)
    return bank


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


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


@torch.no_grad()
def test_a_masked_token_is_a_token_that_is_not_there(unet: UNet2DConditionModel) -> None:
    perturbed(unet, router="static")  # the others route by all tokens that they are given
    inputs = unet_inputs(1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0]])
    masked = unet(**inputs, encoder_attention_mask=mask).sample
    short = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :3]}
    torch.testing.assert_close(masked, unet(**short).sample, rtol=1e-5, atol=1e-5)


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
    assert relative(result.float(), expected) < (0.02 if dtype == torch.bfloat16 else 0.003)
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
    assert relative(result.float(), exact(**inputs).sample) < 0.02


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


class TestPromptDeltas:
    """Updates of to_k and to_v are computed once for all steps with the same prompt, and never go stale."""

    @pytest.fixture
    def computed(self, unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The reads that a perturbed adapter really computed, by projection."""
        perturbed(unet)
        names: list[str] = []
        deltas = LilyBank.deltas

        def counting(bank, x, read, scale=1.0):
            names.append("prompt" if read.reads_context else "other")
            return deltas(bank, x, read, scale)

        monkeypatch.setattr(LilyBank, "deltas", counting)
        return names

    @torch.no_grad()
    def test_the_second_step_takes_them_from_the_first(self, unet: UNet2DConditionModel, computed: list[str]) -> None:
        inputs = unet_inputs()
        first = unet(**inputs).sample
        assert computed.count("prompt") == 17
        assert torch.equal(unet(**inputs).sample, first)
        assert computed.count("prompt") == 17 and computed.count("other") == 2 * 4 * 17

    @pytest.mark.parametrize(
        "change", ["prompt", "prompt in place", "adapter in place", "adapter replaced", "strength"]
    )
    @torch.no_grad()
    def test_a_change_is_seen(self, unet: UNet2DConditionModel, computed: list[str], change: str) -> None:
        inputs, kwargs = unet_inputs(), {}
        unet(**inputs)
        if change == "prompt":
            inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].flip(1)
        elif change == "prompt in place":
            inputs["encoder_hidden_states"].mul_(-1)
        elif change == "adapter in place":
            for B in unet.lily.bank("default").B:
                B.mul_(-1)
        elif change == "adapter replaced":
            for B in unet.lily.bank("default").B:
                B.data = -B.data
        else:
            kwargs = {"cross_attention_kwargs": {"lily_scale": 0.5}}
        computed.clear()
        kept = unet(**inputs, **kwargs).sample
        assert computed.count("prompt") == 17
        with torch.enable_grad():
            torch.testing.assert_close(unet(**inputs, **kwargs).sample.detach(), kept, rtol=1e-5, atol=1e-5)

    def test_they_are_freed_with_the_prompt(self, unet: UNet2DConditionModel) -> None:
        perturbed(unet)
        inputs = unet_inputs()
        with torch.no_grad():
            unet(**inputs)
        kept = [attention.processor.prompt_deltas._kept for attention in attention_modules(unet).values()]
        assert sum(map(len, kept)) == 17
        del inputs
        gc.collect()
        assert sum(map(len, kept)) == 0

    @torch.no_grad()
    def test_a_change_through_data_is_seen_after_set_lily_adapters(self, unet: UNet2DConditionModel) -> None:
        bank = perturbed(unet)
        inputs = unet_inputs()
        unet(**inputs)
        for B in bank.B:
            B.data.mul_(-1)  # torch does not count this change
        set_lily_adapters(unet, "default")
        kept = unet(**inputs).sample
        with torch.enable_grad():
            torch.testing.assert_close(unet(**inputs).sample.detach(), kept, rtol=1e-5, atol=1e-5)

    def test_an_adapter_made_in_inference_mode_works_outside(self, unet: UNet2DConditionModel) -> None:
        with torch.inference_mode():
            perturbed(unet)
        with torch.no_grad():
            assert unet(**unet_inputs()).sample.isfinite().all()

    def test_training_keeps_nothing(self, unet: UNet2DConditionModel, computed: list[str]) -> None:
        inputs = unet_inputs()
        for _ in range(2):
            unet(**inputs)
        assert computed.count("prompt") == 2 * 17


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
