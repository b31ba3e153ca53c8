"""`train_dreambooth_lily.py` as its users run it: a subprocess, real files, a real (tiny) SDXL."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline

import lily_diffusers as lily
from lily_diffusers.checkpoint import WEIGHT_NAME, read_header
from lily_diffusers.training.checkpoints import find_last
from tests.test_pipeline import draw

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "examples" / "robot"


class Script:
    """The training script with the flags that all runs share.

    Args:
        base: folder of the tiny SDXL.
    """

    def __init__(self, base: Path) -> None:
        self.flags = {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": PHOTOS,
            "instance_prompt": "a photo of sks toy",
            "resolution": 32,
            "crop_variants": 2,
            "rank": 4,
            "stride_A": 2,
            "num_B": 2,
            "report_to": "none",
        }

    def command(self, output: Path, launch: tuple[str, ...] = (), **flags: object) -> list[str]:
        start = [sys.executable, *(launch or ())]
        flags = self.flags | {"output_dir": output} | flags
        pairs = [
            part for name, value in flags.items() for part in (f"--{name}", *([] if value is True else [str(value)]))
        ]
        return [*start, str(ROOT / "train_dreambooth_lily.py"), *pairs]

    def run(self, output: Path, launch: tuple[str, ...] = (), expect: int = 0, **flags: object) -> str:
        """Run to the end and return what it printed."""
        done = subprocess.run(
            self.command(output, launch, **flags),
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == expect, done.stderr[-3000:]
        return done.stdout + done.stderr


def environment() -> dict[str, str]:
    """One thread a process: the same bits whatever else the machine does."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture
def script(tiny_sdxl_dir: Path) -> Script:
    return Script(tiny_sdxl_dir)


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(output / WEIGHT_NAME)


def test_twenty_steps_change_the_picture(
    script: Script, tmp_path: Path, tiny_sdxl_dir: Path, load_pipe: Callable[[], StableDiffusionXLPipeline]
) -> None:
    output = tmp_path / "run"
    printed = script.run(
        output, max_train_steps=20, checkpointing_steps=8, checkpoints_total_limit=1, learning_rate=1e-2,
        report_to="tensorboard", pretrained_vae_model_name_or_path=tiny_sdxl_dir / "vae",
        validation_prompt="a photo of sks toy", validation_steps=10, num_validation_images=2,
        num_inference_steps=2, random_flip=True, gradient_checkpointing=True, mixed_precision="bf16", logging_steps=5,
    )  # fmt: skip
    assert "5 photos" in printed and "the adapter is in" in printed

    header = read_header(output / WEIGHT_NAME)
    assert header.metadata["steps"] == "20" and header.metadata["instance_prompt"] == "a photo of sks toy"
    assert {tensor.dtype for tensor in adapter_of(output).values()} == {torch.float32}

    pipe = load_pipe()
    base = draw(pipe)
    lily.load_lily_weights(pipe, output)
    assert np.abs(draw(pipe) - base).max() > 1e-2

    assert [path.name for path in sorted(output.glob("checkpoint-*"))] == ["checkpoint-16"]
    pictures = sorted(str(path.relative_to(output)) for path in output.glob("validation/*/*.png"))
    assert pictures == [f"validation/step-0000{step}/{i}.png" for step in (10, 20) for i in (0, 1)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(output.glob("logs/lily")))).Reload()
    for curve in ("loss", "lr", "grad_norm", "expert_similarity", "routing_entropy"):
        points = events.Scalars(curve)
        assert [point.step for point in points] == [5, 10, 15, 20], curve
        assert all(np.isfinite(point.value) for point in points), curve
    assert "validation" in events.Tags()["images"]


def kill_after(checkpoint: Path, command: list[str]) -> None:
    """Start a run and kill -9 it as soon as a checkpoint is there."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not checkpoint.is_dir():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before its checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {
            "gradient_accumulation_steps": 2,
            "dropout": 0.3,
            "cache_latents": False,
            "random_flip": True,
            "lr_scheduler": "cosine",
        },
    ],
    ids=["plain", "accumulation-dropout"],
)
def test_a_killed_run_resumes_bit_for_bit(script: Script, tmp_path: Path, flags: dict) -> None:
    flags = {"max_train_steps": 60, "checkpointing_steps": 5, "learning_rate": 1e-3} | flags
    script.run(tmp_path / "whole", **flags)
    kill_after(tmp_path / "killed" / "checkpoint-10", script.command(tmp_path / "killed", **flags))
    assert not (tmp_path / "killed" / WEIGHT_NAME).exists(), "the run ended before it was killed"
    printed = script.run(tmp_path / "killed", resume_from_checkpoint="latest", **flags)
    assert "resumed from" in printed
    whole, resumed = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = adapter_of(tmp_path / "killed" / "checkpoint-5")
    assert any(not torch.equal(start[name], whole[name]) for name in whole)


def test_a_half_written_checkpoint_is_passed_over_and_named(script: Script, tmp_path: Path) -> None:
    flags = {"max_train_steps": 4, "checkpointing_steps": 2}
    script.run(tmp_path, **flags)
    expected = adapter_of(tmp_path)
    optimizer = tmp_path / "checkpoint-4" / "optimizer.bin"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    assert find_last(tmp_path) == tmp_path / "checkpoint-2"
    printed = script.run(tmp_path, resume_from_checkpoint="latest", **flags)
    assert "checkpoint-4 is half written and is not used" in printed and "resumed from" in printed
    assert all(torch.equal(expected[name], tensor) for name, tensor in adapter_of(tmp_path).items())

    again = script.run(tmp_path, expect=1, **flags)
    assert "holds checkpoint-4 of an earlier run; continue it with --resume_from_checkpoint latest" in again

    shutil.rmtree(tmp_path / "checkpoint-2")
    named = script.run(tmp_path, expect=1, resume_from_checkpoint="checkpoint-2", **flags)
    assert "--resume_from_checkpoint=checkpoint-2 is not there; use 'latest'" in named
    changed = script.run(tmp_path, expect=1, resume_from_checkpoint="checkpoint-4", **flags | {"seed": 1})
    assert "belongs to a run with other options: seed was 0 and is 1" in changed
    other = flags | {"instance_prompt": "a photo of sks mug", "instance_data_dir": one_photo(tmp_path / "photos")}
    changed = script.run(tmp_path, expect=1, resume_from_checkpoint="latest", **other)
    assert "instance_prompt was 'a photo of sks toy' and is 'a photo of sks mug'" in changed
    assert "photos was ['robot_1.png', " in changed


def one_photo(folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(PHOTOS / "robot_1.png", folder)
    return folder


def test_two_processes_give_the_adapter_of_one(script: Script, tmp_path: Path) -> None:
    flags = {"max_train_steps": 8, "learning_rate": 1e-3, "random_flip": True, "checkpointing_steps": 4}
    script.run(tmp_path / "one", train_batch_size=4, **flags)
    accumulated = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    # `accelerate launch --cpu --num_processes 2` starts one process unless it is given an MPI host file
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    script.run(tmp_path / "two", launch, **flags | accumulated)
    script.run(tmp_path / "split", **flags | {"train_batch_size": 1, "gradient_accumulation_steps": 4})
    one, two, split = (adapter_of(tmp_path / name) for name in ("one", "two", "split"))
    # two processes of 1 × 2 see the first four examples of one process of 4, as does one process of 1 × 4
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)
        torch.testing.assert_close(split[name], tensor, rtol=0, atol=1e-4)
    manifest = json.loads((tmp_path / "two" / "checkpoint-4" / "checkpoint.json").read_text())
    assert {"random_states_0.pkl", "random_states_1.pkl", WEIGHT_NAME} <= set(manifest["files"])


def test_a_loss_that_becomes_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    script: Script, tmp_path: Path, load_pipe: Callable[[], StableDiffusionXLPipeline]
) -> None:
    # the warm-up's first step is harmless, later ones are not
    flags = {
        "learning_rate": 1e20,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 20,
        "max_train_steps": 20,
    }
    flags |= {"checkpointing_steps": 1, "checkpoints_total_limit": 1}
    printed = script.run(tmp_path, expect=1, **flags)
    assert "training stopped; the last good checkpoint is" in printed and "Traceback" not in printed
    assert not (tmp_path / WEIGHT_NAME).exists()
    named = Path(printed.split("the last good checkpoint is ")[1].split(". Train anew")[0])
    pipe = load_pipe()
    lily.load_lily_weights(pipe, named)
    assert np.isfinite(draw(pipe)).all()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"resolution": 1020}, "--resolution=1020 is not divisible by 8"),
        ({"output_dir": PHOTOS / "robot_1.png" / "out"}, "cannot be written"),
        ({"instance_data_dir": ROOT / "lily_diffusers"}, "holds no photos"),
        ({"init": "staggered"}, "pass router_bias=True"),
        ({"pretrained_vae_model_name_or_path": ROOT / "docs"}, "cannot load --pretrained_vae_model_name_or_path"),
        ({"num_train_epochs": 3}, "unknown arguments: --num_train_epochs 3; --help lists"),
        ({"report_to": "wandb"}, "--report_to=wandb needs a package that is not installed"),
        ({"pretrained_model_name_or_path": ROOT / "docs"}, "cannot load --pretrained_model_name_or_path"),
    ],
)
def test_bad_input_gets_one_sentence(script: Script, tmp_path: Path, flags: dict, sentence: str) -> None:
    printed = script.run(**{"output": tmp_path / "out", "expect": 1} | flags)
    assert sentence in printed and "Traceback" not in printed
    assert not (tmp_path / "out" / WEIGHT_NAME).exists()


def test_help_knows_every_option(script: Script) -> None:
    printed = subprocess.run(
        [sys.executable, str(ROOT / "train_dreambooth_lily.py"), "--help"],
        env=environment(),
        capture_output=True,
        text=True,
    ).stdout
    for flag in (
        "--instance_data_dir",
        "--rank",
        "--router {token,sequence,batch,static,uniform}",
        "--no_cache_latents",
    ):
        assert flag in printed
