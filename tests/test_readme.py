"""What the README tells people to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import HfArgumentParser

import lily_diffusers as lily
from lily_diffusers.initialisation import INITS
from lily_diffusers.routers import ROUTERS
from lily_diffusers.targets import POOL_SCOPES, ROUTER_SHARINGS
from lily_diffusers.training.config import TrainingConfig
from tests.conftest import perturb

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_training_command_parses() -> None:
    command = next(block for block in blocks("bash") if "train_dreambooth_lily.py" in block)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["accelerate", "launch", "train_dreambooth_lily.py"]
    config, adapter = HfArgumentParser((TrainingConfig, lily.LilyConfig)).parse_args_into_dataclasses(words[3:])
    assert config.instance_data_dir == "photos/duck"
    assert adapter == lily.LilyConfig()


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test", "app", "check"} <= named <= targets


def test_the_five_lines_that_load_an_adapter_run(
    load_pipe: Callable[[], StableDiffusionXLPipeline], tiny_sdxl_dir: Path, tmp_path: Path
) -> None:
    pipe = load_pipe()
    perturb(lily.inject_lily(pipe.unet, lily.LilyConfig(r=4)))
    lily.save_lily_weights(pipe, tmp_path)
    code = next(block for block in blocks("python") if "load_lily_weights(pipe" in block)
    for words, ours in {
        "stabilityai/stable-diffusion-xl-base-1.0": str(tiny_sdxl_dir),
        "runs/duck": str(tmp_path),
        "float16": "float32",
        '"cuda"': '"cpu"',
        'snow")': 'snow", height=64, width=64, num_inference_steps=2)',
    }.items():
        assert words in code
        code = code.replace(words, ours)
    names: dict = {}
    exec(code, names)
    assert np.asarray(names["image"]).shape == (64, 64, 3)
    assert lily.get_lily_adapters(names["pipe"]) == {"default_0": 1.0}
    mixing = next(block for block in blocks("python") if "unload_lily_weights(pipe)" in block)
    exec(mixing.replace("runs/duck", str(tmp_path)).replace("runs/style", str(tmp_path)), names)
    assert lily.get_lily_adapters(names["pipe"]) == {"duck": 1.0, "style": 0.6}
    assert not np.array_equal(names["image"], names["base"])


def test_the_lines_for_ones_own_loop_run(unet, tmp_path: Path) -> None:
    code = next(block for block in blocks("python") if "inject_lily(unet" in block)
    exec(code.replace("runs/mine", str(tmp_path)), {"unet": unet, "torch": torch})
    assert (tmp_path / "pytorch_lily_weights.safetensors").is_file()


@pytest.mark.parametrize("registry", [ROUTERS, INITS, POOL_SCOPES, ROUTER_SHARINGS])
def test_every_choice_is_documented(registry) -> None:
    method = (ROOT / "docs" / "method.md").read_text()
    for name in registry:
        assert f"`{name}`" in README
        assert f"`{name}`" in method or f'"{name}"' in method or registry is ROUTER_SHARINGS
