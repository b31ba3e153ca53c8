"""Saving, loading and prompting on real pipelines, and what bad files get."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors import safe_open

import lily_diffusers as lily
from examples.tiny_sdxl import make_pipeline
from lily_diffusers.checkpoint import FORMAT_VERSION, WEIGHT_NAME, LilyFileError, read_header
from tests.conftest import perturb, unet_inputs

Load = Callable[[], StableDiffusionXLPipeline]


def draw(pipe: StableDiffusionXLPipeline, **kwargs) -> np.ndarray:
    """One 64×64 picture in two steps, as floats."""
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a photo of sks toy",
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="np",
        generator=generator,
        **kwargs,
    ).images[0]


@pytest.fixture
def adapter(load_pipe: Load, tmp_path: Path) -> Path:
    """A saved adapter whose every tensor was moved."""
    pipe = load_pipe()
    perturb(lily.inject_lily(pipe.unet, lily.LilyConfig(r=4, stride_A=3, num_B=3)), 0.3)
    return lily.save_lily_weights(pipe, tmp_path / "duck", metadata={"instance_prompt": "a photo of sks duck"})


def rewrite(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Change the tensors and the metadata of a file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def test_a_loaded_adapter_draws_the_same_picture_in_every_fresh_pipeline(load_pipe: Load, adapter: Path) -> None:
    pictures = []
    for _ in range(2):
        pipe = load_pipe()
        base = draw(pipe)
        assert lily.load_lily_weights(pipe, adapter) == "default_0"
        pictures.append(draw(pipe))
    assert np.abs(pictures[0] - base).max() > 1e-3  # loading acts
    assert np.abs(pictures[0] - pictures[1]).max() <= 1e-5


def test_the_file_brings_back_every_tensor_and_the_configuration(load_pipe: Load, tmp_path: Path) -> None:
    config = lily.LilyConfig(r=3, num_B=2, router_bias=True, router_sharing="A", pool_scope="output", init="staggered")
    pipe = load_pipe()
    bank = lily.inject_lily(pipe.unet, config)
    perturb(bank)
    path = lily.save_lily_weights(pipe, tmp_path / "named.safetensors")
    other = load_pipe()
    lily.load_lily_weights(other, path, adapter_name="again")
    loaded = other.unet.lily.banks["again"]
    assert loaded.config == config and not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in bank.named_tensors().items():
        assert torch.equal(tensor, loaded.named_tensors()[name]), name


def test_stored_numbers_are_the_unique_trainable_parameters(load_pipe: Load, adapter: Path) -> None:
    stored = sum(tensor.numel() for tensor in safetensors.torch.load_file(adapter).values())
    bank = lily.inject_lily(load_pipe().unet, lily.LilyConfig(r=4, stride_A=3, num_B=3))
    assert stored == sum(parameter.numel() for parameter in bank.parameters())
    assert adapter.stat().st_size < 4 * stored + 40_000  # and nothing else but the header


def test_the_same_adapter_gives_the_same_bytes(load_pipe: Load, adapter: Path, tmp_path: Path) -> None:
    pipe = load_pipe()
    lily.load_lily_weights(pipe, adapter)
    many = {f"key {i}": f"välue {i}" for i in range(20)}
    files = [lily.save_lily_weights(pipe, tmp_path / f"{i}.safetensors", metadata=many) for i in range(5)]
    assert len({file.read_bytes() for file in files}) == 1
    assert read_header(files[0]).metadata["key 7"] == "välue 7"


def test_a_folder_with_a_lora_is_sent_to_diffusers(load_pipe: Load, tmp_path: Path) -> None:
    safetensors.torch.save_file({"lora": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(LilyFileError, match=r"it holds a LoRA, which loads with pipe\.load_lora_weights\(\)"):
        lily.load_lily_weights(load_pipe(), tmp_path)


def test_the_header_says_what_the_file_is(adapter: Path, tiny_sdxl_dir: Path) -> None:
    header = read_header(adapter)
    assert header.config == lily.LilyConfig(r=4, stride_A=3, num_B=3)
    assert header.metadata["format"] == "lily_diffusers" and header.metadata["format_version"] == str(FORMAT_VERSION)
    assert header.metadata["base_model"] == str(tiny_sdxl_dir)
    assert header.metadata["instance_prompt"] == "a photo of sks duck" and header.metadata["torch_version"]


@pytest.mark.parametrize("form", ["file", "folder", "subfolder", "weight_name"])
def test_every_way_to_name_a_file(load_pipe: Load, adapter: Path, form: str) -> None:
    pipe = load_pipe()
    arguments = {
        "file": ((adapter,), {}),
        "folder": ((adapter.parent,), {}),
        "subfolder": ((str(adapter.parent.parent),), {"subfolder": "duck"}),
        "weight_name": ((adapter.parent,), {"weight_name": WEIGHT_NAME}),
    }[form]
    lily.load_lily_weights(pipe, *arguments[0], **arguments[1])
    assert lily.get_lily_adapters(pipe) == {"default_0": 1.0}


def test_two_files_mix_on_one_pipeline(load_pipe: Load, adapter: Path) -> None:
    pipe = load_pipe()
    for name in ("duck", "style"):
        lily.load_lily_weights(pipe, adapter, adapter_name=name)
    one = draw(pipe)
    lily.set_lily_adapters(pipe, ["duck", "style"], [0.5, 0.5])
    assert np.abs(draw(pipe) - one).max() < 1e-4  # two halves of the same adapter
    lily.delete_lily_adapter(pipe, "style")
    assert lily.get_lily_adapters(pipe) == {"duck": 0.5}
    lily.unload_lily_weights(pipe)
    assert np.array_equal(draw(pipe), draw(load_pipe()))


def test_lily_scale_reaches_the_adapter_through_the_pipeline(load_pipe: Load, adapter: Path) -> None:
    pipe = load_pipe()
    base = draw(pipe)
    lily.load_lily_weights(pipe, adapter)
    assert np.array_equal(draw(pipe, cross_attention_kwargs={"lily_scale": 0.0}), base)
    half = np.abs(draw(pipe, cross_attention_kwargs={"lily_scale": 0.5}) - base).mean()
    assert 0 < half < np.abs(draw(pipe) - base).mean()
    with lily.lily_disabled(pipe):
        assert np.array_equal(draw(pipe), base)


def test_saving_the_pipeline_after_a_load_writes_the_base(
    load_pipe: Load, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    pipe = load_pipe()
    base = draw(pipe)
    lily.load_lily_weights(pipe, adapter)
    pipe.save_pretrained(tmp_path / "saved")
    logging.getLogger("diffusers").propagate = True  # diffusers logs through a handler of its own
    recwarn.clear()
    with caplog.at_level(logging.WARNING):
        again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved", add_watermarker=False)
    logging.getLogger("diffusers").propagate = False
    again.set_progress_bar_config(disable=True)
    assert [record.getMessage() for record in caplog.records] == [] and [str(w.message) for w in recwarn] == []
    assert np.abs(draw(again) - base).max() <= 1e-5


def test_a_half_precision_pipeline_gets_a_half_precision_adapter(load_pipe: Load, adapter: Path) -> None:
    pipe = load_pipe().to(torch.bfloat16)
    lily.load_lily_weights(pipe, adapter)
    assert {parameter.dtype for parameter in pipe.unet.lily.parameters()} == {torch.bfloat16}
    assert np.isfinite(draw(pipe)).all()


def test_saving_a_detached_adapter_is_refused(load_pipe: Load, tmp_path: Path) -> None:
    pipe = load_pipe()
    lily.inject_lily(pipe.unet, lily.LilyConfig(r=4))
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(RuntimeError, match="set_lily_adapters"):
        lily.save_lily_weights(pipe, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_weight_name_must_say_that_it_is_safetensors(adapter: Path, load_pipe: Load, tmp_path: Path) -> None:
    pipe = load_pipe()
    lily.load_lily_weights(pipe, adapter)
    with pytest.raises(ValueError, match="weight_name='duck' must end in .safetensors"):
        lily.save_lily_weights(pipe, tmp_path, weight_name="duck")
    path = lily.save_lily_weights(pipe, tmp_path, weight_name="duck.safetensors")
    assert path == tmp_path / "duck.safetensors"
    lily.load_lily_weights(load_pipe(), tmp_path, weight_name="duck.safetensors")


def test_which_adapter_to_save_must_be_clear(load_pipe: Load, tmp_path: Path) -> None:
    pipe = load_pipe()
    with pytest.raises(ValueError, match="no adapter named None to save; loaded are none"):
        lily.save_lily_weights(pipe, tmp_path)
    for name in ("a", "b"):
        lily.inject_lily(pipe.unet, lily.LilyConfig(r=4), name)
    with pytest.raises(ValueError, match=r"2 adapters \(a, b\); say which one"):
        lily.save_lily_weights(pipe, tmp_path)


def test_an_adapter_for_another_geometry_is_refused_with_all_differences(adapter: Path, load_pipe: Load) -> None:
    def change(tensors: dict, metadata: dict) -> None:
        del tensors["B.to_v-64x64"]
        tensors["B.to_q-1280x1280"] = torch.zeros(1)
        tensors["B.to_q-64x64"] = torch.zeros(3, 4, 63)

    rewrite(adapter, change)
    pipe = load_pipe()
    base = draw(pipe)
    with pytest.raises(LilyFileError) as caught:
        lily.load_lily_weights(pipe, adapter)
    message = str(caught.value)
    assert "3 keys differ" in message and f"{adapter}, trained on " in message
    assert "missing B.to_v-64x64 (3, 4, 64)" in message and "unexpected B.to_q-1280x1280 (1,)" in message
    assert "B.to_q-64x64 has shape (3, 4, 63) where this UNet needs (3, 4, 64)" in message
    assert not hasattr(pipe.unet, "lily") and np.array_equal(draw(pipe), base)


def test_a_failed_load_leaves_the_other_adapters_active(adapter: Path, load_pipe: Load, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(adapter.read_bytes())
    rewrite(broken, lambda tensors, metadata: tensors.popitem() and None)
    pipe = load_pipe()
    lily.load_lily_weights(pipe, adapter, adapter_name="duck")
    expected = draw(pipe)
    with pytest.raises(LilyFileError, match="1 keys differ"):
        lily.load_lily_weights(pipe, broken)
    assert lily.get_lily_adapters(pipe) == {"duck": 1.0} and np.array_equal(draw(pipe), expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t, m: m.update(format_version="99"),
            "format version '99', and this lily-diffusers reads up to 1; upgrade",
        ),
        (lambda t, m: m.update(format="pt"), "is not a Lily adapter: its header has format='pt'"),
        (lambda t, m: m.update(lily_config='{"r": 0}'), "r=0 must be a whole number"),
        (lambda t, m: m.update(lily_config="nonsense"), "not valid JSON"),
    ],
)
def test_foreign_and_newer_files_are_refused(adapter: Path, load_pipe: Load, change: Callable, sentence: str) -> None:
    rewrite(adapter, change)
    with pytest.raises(LilyFileError, match=sentence):
        lily.load_lily_weights(load_pipe(), adapter)


@pytest.mark.parametrize("keep", [0, 4, 1000, -10])
def test_truncated_files_are_refused(adapter: Path, load_pipe: Load, keep: int) -> None:
    adapter.write_bytes(adapter.read_bytes()[:keep])
    with pytest.raises(LilyFileError, match="is truncated or not a safetensors file"):
        lily.load_lily_weights(load_pipe(), adapter)


def test_missing_files_and_hub_ids_out_of_reach_are_named(load_pipe: Load, tmp_path: Path) -> None:
    pipe = load_pipe()
    with pytest.raises(LilyFileError, match=f"the folder {tmp_path} holds no {WEIGHT_NAME}"):
        lily.load_lily_weights(pipe, tmp_path)
    with pytest.raises(LilyFileError, match="'someone/duck' is neither a file nor a folder here"):
        lily.load_lily_weights(pipe, "someone/duck")
    with pytest.raises(LilyFileError, match="neither a file nor a folder"):
        lily.load_lily_weights(pipe, tmp_path / "nothing" / "here")


def test_a_save_that_fails_keeps_the_file_that_was_there(
    adapter: Path, load_pipe: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = adapter.read_bytes()
    pipe = load_pipe()
    lily.load_lily_weights(pipe, adapter)
    perturb(pipe.unet.lily)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="cannot write .*No space left.*free some space"):
        lily.save_lily_weights(pipe, adapter)
    assert adapter.read_bytes() == before and [file.name for file in adapter.parent.iterdir()] == [WEIGHT_NAME]


def test_a_folder_that_is_a_file_cannot_be_written(adapter: Path, load_pipe: Load, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    pipe = load_pipe()
    lily.load_lily_weights(pipe, adapter)
    with pytest.raises(OSError, match="cannot write"):
        lily.save_lily_weights(pipe, tmp_path / "taken")


def test_things_without_an_sdxl_unet_are_refused(load_pipe: Load, adapter: Path) -> None:
    with pytest.raises(TypeError, match="AutoencoderKL has no UNet2DConditionModel"):
        lily.load_lily_weights(load_pipe().vae, adapter)


def test_a_unet_alone_is_as_good_as_a_pipeline(load_pipe: Load, adapter: Path) -> None:
    pipe = load_pipe()
    lily.load_lily_weights(pipe, adapter)
    alone = make_pipeline(seed=0).unet
    lily.load_lily_weights(alone, adapter)
    with torch.no_grad():
        torch.testing.assert_close(
            alone(**unet_inputs()).sample, pipe.unet(**unet_inputs()).sample, rtol=1e-5, atol=1e-5
        )
