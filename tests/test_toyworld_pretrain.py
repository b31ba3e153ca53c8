"""Pre-training of the toy base: resumable, the same with one process or two, and it learns."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.toyworld import pretrain
from benchmarks.toyworld.autoencoder import encode, peak_signal, train_vae
from benchmarks.toyworld.data import Pictures, render_pictures
from benchmarks.toyworld.diffusion import Denoiser, Samples, _batch, rate_factor, train_denoiser
from benchmarks.toyworld.model import make_pipeline, make_vae
from benchmarks.toyworld.world import random_sample, render

CPU = torch.device("cpu")


def pictures(count: int) -> Pictures:
    samples = [random_sample(np.random.default_rng([5, i])) for i in range(count)]
    return Pictures(
        np.stack([render(sample.scene)[0] for sample in samples]),
        np.array([sample.scene.time_ids for sample in samples], np.int16),
        np.zeros((count, 16, 16), np.uint8),
        [sample.caption for sample in samples],
    )


def make_denoiser() -> Denoiser:
    """The same random weights every time."""
    torch.manual_seed(0)
    return Denoiser(make_pipeline())


def train_weights(folder: Path, steps: int, stop: int | None = None) -> dict[str, Tensor]:
    """Train on 64 random latents, a state every 2 steps; return the weights when done, or when stopped."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(64, 4, 16, 16, generator=generator).half()
    ids = torch.randint(0, 500, (64, 32), generator=generator).short()
    denoiser = make_denoiser()
    cover = torch.randint(0, 256, (64, 16, 16), generator=generator).byte()
    samples = Samples(latents, ids, torch.full((64, 6), 64, dtype=torch.int16), cover)
    for done in train_denoiser(denoiser, samples, steps, 8, folder / "unet.pt", every=2):
        if done == stop:
            break
    return {name: value.clone() for name, value in denoiser.state_dict().items()}


def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = train_weights(tmp_path / "whole", steps=4)
    train_weights(tmp_path, steps=4, stop=3)
    for name, value in train_weights(tmp_path, steps=4).items():
        assert torch.equal(value, whole[name]), name


def _one_of_two(rank: int, folder: Path, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(minutes=2))
    weights = train_weights(folder, steps=2)
    if rank == 0:
        torch.save(weights, folder / "two.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    one = train_weights(tmp_path / "one", steps=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two, (tmp_path, port), nprocs=2)
    two = torch.load(tmp_path / "two.pt")
    start = make_denoiser().state_dict()
    moved = {name: value - start[name] for name, value in one.items()}
    apart = torch.cat([(two[name] - value).flatten() for name, value in one.items()]).norm()
    assert apart < 0.02 * torch.cat([part.flatten() for part in moved.values()]).norm()


def test_the_rates_warm_up_stay_and_fall_to_nothing() -> None:
    rates = [rate_factor(step, 10_000) for step in range(10_001)]
    assert rates[0] < rates[100] < rates[300] == rates[4_900] == 1
    assert rates[5_500] > rates[8_000] > rates[9_999] > rates[10_000] == 0


def test_object_cells_weigh_more_where_there_is_little_noise() -> None:
    denoiser = Denoiser(make_pipeline()).eval()
    latents, epsilon = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ids, sizes, t = torch.ones(2, 32, dtype=torch.long), torch.full((2, 6), 64.0), torch.tensor([0, 999])

    def errors(cover: float) -> Tensor:
        with torch.no_grad():
            return denoiser(latents, ids, sizes, torch.full((2, 16, 16), cover), epsilon, t, torch.ones(2))

    ratio = errors(1.0) / errors(0.0)
    torch.testing.assert_close(ratio, 1 + 3 * denoiser.signal[t] ** 2)
    assert ratio[0] > 3.9 and ratio[1] < 1.1


def test_timesteps_lean_to_little_noise() -> None:
    one = torch.zeros(1, 4, 16, 16), torch.zeros(1, 32), torch.zeros(1, 6), torch.full((1, 16, 16), 255).byte()
    *_, cover, _, t, _ = _batch(Samples(*one), 1000, torch.Generator().manual_seed(0))
    assert (t < 500).float().mean().item() == pytest.approx(0.5 ** (1 / 1.4), abs=0.01)
    assert t.max() > 990 and cover.max() == cover.min() == 1


def test_pictures_without_masks_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "0000000.npz", pixels=np.zeros((2000, 64, 64, 3), np.uint8), time_ids=np.zeros((2000, 6)))
    with pytest.raises(ValueError, match="pictures of an earlier version: remove it"):
        render_pictures(tmp_path, 2000)


def test_pictures_of_other_samples_are_named(tmp_path: Path) -> None:
    stored = {"pixels": np.zeros((2000, 64, 64, 3), np.uint8), "cover": np.zeros((2000, 16, 16), np.uint8)}
    np.savez(tmp_path / "0000000.npz", time_ids=np.full((2000, 6), 64), **stored)
    with pytest.raises(ValueError, match="pictures of an earlier version: remove it"):
        render_pictures(tmp_path, 2000)


def test_the_vae_learns() -> None:
    data = pictures(300)
    torch.manual_seed(0)
    vae = make_vae()
    before = peak_signal(vae, data.pixels[-256:])
    train_vae(vae, data, steps=12, batch=8, device=CPU)
    assert peak_signal(vae, data.pixels[-256:]) > before + 0.5
    latents = encode(vae, data, CPU, batch=128)
    assert latents.shape == (300, 4, 16, 16)
    assert latents.dtype == torch.float16


def test_a_wrong_start_is_one_sentence(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    pretrain.keep_to_plan(tmp_path, {"batch": 32})
    for flag, value, said in (
        ("--warm_start", str(tmp_path), f"={tmp_path} holds no model_index.json; pass a pipeline's folder"),
        ("--batch", "48", f"--work={tmp_path} was begun with --batch=32, not 48; repeat it so, or name another folder"),
    ):
        monkeypatch.setattr("sys.argv", ["pretrain", "--work", str(tmp_path), flag, value])
        with pytest.raises(SystemExit):
            pretrain.main()
        assert said in capsys.readouterr().err


def test_latents_of_another_vae_are_refused(tmp_path: Path) -> None:
    data = pictures(3)
    torch.manual_seed(0)
    vae, other = make_vae(), make_vae()
    first = pretrain.encode_once(tmp_path, vae, data, CPU)
    assert first.shape == (3, 4, 16, 16)
    assert torch.equal(pretrain.encode_once(tmp_path, vae, data, CPU), first)
    for stranger, seen in ((other, data), (vae, data[:2])):
        with pytest.raises(ValueError, match=r"latents.pt was made by another VAE or from other pictures: remove it"):
            pretrain.encode_once(tmp_path, stranger, seen, CPU)


@pytest.mark.slow
def test_the_command_makes_a_pipeline_and_goes_on_from_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionXLPipeline

    def run(name: str, **more: object) -> StableDiffusionXLPipeline:
        flags = {"work": tmp_path / f"{name}-work", "out": tmp_path / name, "pictures": 2000, "vae_steps": 2} | more
        words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        monkeypatch.setattr("sys.argv", ["pretrain", "--device", "cpu", "--batch", "4", *words])
        pretrain.main()
        return StableDiffusionXLPipeline.from_pretrained(tmp_path / name, add_watermarker=False)

    first = run("first", steps=2)
    assert np.isfinite(np.asarray(first("a toy", num_inference_steps=1, height=64, width=64).images[0])).all()
    assert (tmp_path / "first" / "samples.jpg").exists()

    (tmp_path / "second-work").mkdir()
    (tmp_path / "second-work" / "pictures").symlink_to(tmp_path / "first-work" / "pictures")
    run("second", steps=1, warm_start=tmp_path / "first")
    again = run("second", steps=2, warm_start=tmp_path / "first")  # goes on from its own last state
    for name, value in again.vae.state_dict().items():
        assert torch.equal(value, first.vae.state_dict()[name]), name
    state = torch.load(tmp_path / "second-work" / "unet.pt", weights_only=True)
    assert state["step"] == 2
