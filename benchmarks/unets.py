"""The UNets a benchmark runs on, cheap views of them, and inputs of the right shape.

The first step of a benchmark: one copy of the weights (`make_unet`), then one view for each method
(`share_weights`). May import torch, diffusers and `examples.tiny_sdxl`.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from examples import tiny_sdxl

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""SDXL base 1.0's UNet: what differs from the class's defaults."""

SDXL_PARAMETERS = 2_567_463_684


def _tiny() -> UNet2DConditionModel:
    with torch.device("meta"):
        return tiny_sdxl.make_unet()


def _sdxl() -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    count = sum(p.numel() for p in unet.parameters())
    assert count == SDXL_PARAMETERS, f"the SDXL UNet has {count:,} parameters, not {SDXL_PARAMETERS:,}"
    return unet


UNETS = {"tiny": _tiny, "sdxl": _sdxl}
"""Geometries: name -> function that makes the UNet without weights (on the meta device)."""


def fill_weights(unet: nn.Module, seed: int = 0) -> None:
    """Fill a UNet with random weights that keep activations finite in half precision.

    Every matrix is normal with standard deviation 1/√fan_in, every bias 0, every norm the identity.
    """
    generator = torch.Generator(next(unet.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def make_unet(name: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> UNet2DConditionModel:
    """Make a frozen UNet with random weights, allocating nothing but the weights themselves.

    Args:
        name: key of `UNETS`.
        dtype: of the weights; SDXL in bfloat16 takes 5.1 GB.
        device: where they live.
        seed: of the weights.
    """
    unet = nn.Module.to(UNETS[name](), dtype).to_empty(device=device)  # diffusers' own .to() warns of nothing
    fill_weights(unet, seed)
    return unet.eval().requires_grad_(False)


def share_weights(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Copy the modules of a UNet but not its tensors.

    What a method does to the modules of one view (wrap them, hook them, replace processors) does not
    touch another view, and the weights are in memory once.
    """
    tensors = [*unet.parameters(), *unet.buffers()]
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in tensors})


def make_inputs(unet: UNet2DConditionModel, batch: int, latent: int, seed: int = 0) -> dict[str, Any]:
    """Draw the arguments of one UNet call.

    Args:
        unet: whose widths, dtype and device count.
        batch: samples; 2 is one picture with classifier-free guidance.
        latent: edge of the latent (latent pixels, 1/8 of the picture's).
        seed: of the random numbers.

    Returns:
        Keyword arguments for `unet(...)`: sample (b, 4, latent, latent), encoder_hidden_states (b, 77, width),
        text_embeds (b, width) and time_ids (b, 6) in pixels.
    """
    config = unet.config
    generator = torch.Generator().manual_seed(seed)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(unet.device, unet.dtype)

    edge = 8 * latent
    sizes = torch.tensor([[edge, edge, 0, 0, edge, edge]] * batch)
    return {
        "sample": draw(batch, config.in_channels, latent, latent),
        "timestep": torch.full((batch,), 500, device=unet.device),
        "encoder_hidden_states": draw(batch, 77, config.cross_attention_dim),
        "added_cond_kwargs": {
            "text_embeds": draw(batch, pooled),
            "time_ids": sizes.to(unet.device, unet.dtype),
        },
    }
