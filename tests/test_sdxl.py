"""The full-size SDXL UNet with random bfloat16 weights: geometry, exactness and size. About 7 GB; `make test-slow`."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from benchmarks.unets import make_inputs, make_unet
from lily_diffusers import LilyConfig, inject_lily, load_lily_weights, remove_lily, save_lily_weights
from tests.conftest import perturb


@pytest.mark.slow
@torch.no_grad()
def test_an_adapter_on_the_full_unet(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    unet = make_unet("sdxl", torch.bfloat16, torch.device("cpu"))
    inputs = make_inputs(unet, batch=1, latent=32)
    base = unet(**inputs).sample
    bank = inject_lily(unet, LilyConfig(r=32, stride_A=4, num_B=4))
    assert torch.equal(unet(**inputs).sample, base)

    perturb(bank, 0.02)
    adapted = unet(**inputs).sample
    assert adapted.isfinite().all()
    assert (adapted - base).norm() / base.norm() > 1e-2
    path = save_lily_weights(unet, tmp_path)
    assert sum(tensor.numel() for tensor in safetensors.torch.load_file(path).values()) == 7_919_616
    assert path.stat().st_size < 32_000_000

    remove_lily(unet)
    assert torch.equal(unet(**inputs).sample, base)
    load_lily_weights(unet, path)
    again = unet(**inputs).sample  # the adapter is bfloat16 now; it was float32, cast at every call
    assert (again - adapted).norm() / adapted.norm() < 1e-2
