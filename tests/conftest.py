"""Shared fixtures: real, tiny diffusers classes built offline."""

from __future__ import annotations

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn

from examples.tiny_sdxl import make_pipeline, make_unet

torch.set_num_threads(1)  # tiny tensors gain nothing from more, and lose much where another process runs


@pytest.fixture(scope="session")
def tiny_sdxl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL in diffusers' folder format."""
    folder = tmp_path_factory.mktemp("tiny-sdxl")
    make_pipeline(seed=0).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_unets() -> Callable[[int], list[UNet2DConditionModel]]:
    """Make tiny UNets in eval mode, all with the same weights."""

    def make(count: int) -> list[UNet2DConditionModel]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            first = make_unet().eval()
        return [first, *(copy.deepcopy(first) for _ in range(count - 1))]

    return make


@pytest.fixture
def unet(tiny_unets: Callable[[int], list[UNet2DConditionModel]]) -> UNet2DConditionModel:
    """A fresh tiny UNet."""
    return tiny_unets(1)[0]


@pytest.fixture
def load_pipe(tiny_sdxl_dir: Path) -> Callable[[], StableDiffusionXLPipeline]:
    """Load a fresh pipeline from the tiny SDXL's folder."""

    def load() -> StableDiffusionXLPipeline:
        pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_dir, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def unet_inputs(batch: int = 2, seed: int = 0) -> dict:
    """Inputs of the tiny UNet: 16×16 latent pixels, 7 prompt tokens."""
    g = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, 16, 16, generator=g),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 7, 48, generator=g),
        "added_cond_kwargs": {"text_embeds": torch.randn(batch, 32, generator=g), "time_ids": torch.ones(batch, 6)},
    }


def perturb(module: nn.Module, scale: float = 0.1, seed: int = 1) -> None:
    """Move every parameter away from its start, so that nothing passes because it is zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=g).to(parameter))
