"""Train the base's VAE on the world's pictures, and turn pictures into latents.

May import `data` and what is above it.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from .data import Array, Pictures, to_tensor

_KL = 5e-4
_CROP = 32


def _loss(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction loss with a little KL, and the mean squared error (both scalars; pictures are -1 to 1)."""
    posterior = vae.encode(pictures).latent_dist
    drawn = vae.decode(posterior.sample()).sample
    edges = sum((drawn.diff(dim=d) - pictures.diff(dim=d)).abs().mean() for d in (2, 3))
    square = F.mse_loss(drawn, pictures)
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return F.l1_loss(drawn, pictures) + square + edges + _KL * kl, square


def _crops(pictures: Pictures, batch: int, whole: bool, generator: torch.Generator) -> Tensor:
    index = torch.randint(len(pictures.pixels), (batch,), generator=generator).sort().values
    if whole:
        return to_tensor(pictures.pixels[index.numpy()])
    top, left = torch.randint(pictures.pixels.shape[1] - _CROP + 1, (2,), generator=generator).tolist()
    return to_tensor(pictures.pixels[index.numpy(), top : top + _CROP, left : left + _CROP])


def train_vae(
    vae: AutoencoderKL, pictures: Pictures, steps: int, batch: int, device: torch.device, seed: int = 0
) -> None:
    """Train in place: crops of 32 px at first, whole pictures in the last fifth; the rate falls as a cosine.

    Args:
        vae: to train, on `device`.
        pictures: to learn from; the last 256 are held out for the figures that are printed.
        steps: optimiser steps.
        batch: crops a step; whole pictures come a quarter as many.
        device: where the VAE lives.
        seed: of the crops.
    """
    generator = torch.Generator().manual_seed(seed)
    train = pictures[:-256]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    began = time.monotonic()
    for step in range(steps):
        rate = 2e-3 * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        whole = step >= 0.8 * steps
        loss, _ = _loss(vae, _crops(train, batch // 4 if whole else batch, whole, generator).to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 199 or step == steps - 1:
            print(
                f"vae {step + 1}/{steps}: {peak_signal(vae, pictures.pixels[-256:]):.2f} dB "
                f"({time.monotonic() - began:.0f} s)",
                flush=True,
            )


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pixels: Array) -> Array:
    """Send pictures (n, h, w, 3) uint8 through the VAE and back."""
    drawn = vae.decode(vae.encode(to_tensor(pixels).to(vae.device)).latent_dist.mode()).sample
    return ((drawn + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def peak_signal(vae: AutoencoderKL, pixels: Array) -> float:
    """Peak signal-to-noise ratio (dB) of pictures (n, h, w, 3) uint8 after a round trip through the VAE."""
    error = round_trip(vae, pixels).astype(np.float32) - pixels
    return float(-10 * np.log10((error**2).mean() / 255**2))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Pictures, device: torch.device, batch: int = 256) -> Tensor:
    """Encode pictures, not yet scaled: (n, 4, 16, 16) float16, the posterior's mean."""
    parts = []
    for start in range(0, len(pictures.pixels), batch):
        pixels = to_tensor(pictures.pixels[start : start + batch]).to(device)
        parts.append(vae.encode(pixels).latent_dist.mode().half().cpu())
    return torch.cat(parts)
