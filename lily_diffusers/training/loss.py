"""One batch: noise, timesteps, target and loss.

Imports `cache` and `data` of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from .cache import LatentSource, scale_latents
from .config import TrainingError
from .data import keyed_generator, photo_of


@dataclass(frozen=True)
class Batch:
    """The examples of one forward, on the training device.

    Attributes:
        latents: (b, 4, h, w), scaled, clean, float32. noise: the same shape.
        timesteps: (b,), int64. time_ids: (b, 6), float32.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    time_ids: Tensor


def draw_batch(
    source: LatentSource,
    *,
    photos: int,
    seed: int,
    step: int,
    examples: Sequence[int],
    global_batch: int,
    train_timesteps: int,
    vae_config,
    device: torch.device,
) -> Batch:
    """Draw the examples of one forward; each depends on (seed, step, example) alone.

    Args:
        source: where latents come from.
        photos: how many there are.
        seed: of the run.
        step: the optimiser step, from 0.
        examples: places in the step's global batch.
        global_batch: examples per optimiser step, over all processes and accumulation steps.
        train_timesteps: of the noise scheduler.
        vae_config: see `cache.scale_latents`.
        device: where the batch goes.
    """
    latents, noise, timesteps, ids = [], [], [], []
    for example in examples:
        generator = keyed_generator(seed, step, example)  # on the CPU: the same on every device
        encoded = source.draw(photo_of(seed, step * global_batch + example, photos), generator)
        latents.append(encoded.mean + encoded.std * torch.randn(encoded.mean.shape, generator=generator))
        noise.append(torch.randn(encoded.mean.shape, generator=generator))
        timesteps.append(torch.randint(train_timesteps, (), generator=generator))
        ids.append(encoded.time_ids)
    return Batch(
        latents=scale_latents(vae_config, torch.stack(latents).to(device)),
        noise=torch.stack(noise).to(device),
        timesteps=torch.stack(timesteps).to(device),
        time_ids=torch.stack(ids).to(device),
    )


def training_target(scheduler: DDPMScheduler, batch: Batch) -> Tensor:
    """Return what the UNet should predict, (b, 4, h, w): the noise, or the velocity.

    Raises:
        TrainingError: if the base model predicts something else.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return batch.noise
    if kind == "v_prediction":
        return scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    raise TrainingError(
        f"the base model's scheduler has prediction_type={kind!r}; only epsilon and v_prediction are trained."
    )


def denoising_loss(
    unet: torch.nn.Module, scheduler: DDPMScheduler, batch: Batch, prompt_embeds: Tensor, pooled: Tensor
) -> Tensor:
    """Mean squared error of the UNet's prediction over a batch: a float32 scalar.

    Args:
        unet: the prepared UNet.
        scheduler: adds the noise and says what is predicted.
        batch: the examples.
        prompt_embeds: (1, tokens, context width). pooled: (1, pooled width).
    """
    b = len(batch.latents)
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps).to(prompt_embeds.dtype)
    # Sizes stay float32: bfloat16 would round 1365 to 1368 before it is embedded.
    conditions = {"text_embeds": pooled.expand(b, -1), "time_ids": batch.time_ids}
    prediction = unet(noisy, batch.timesteps, prompt_embeds.expand(b, -1, -1), added_cond_kwargs=conditions).sample
    return F.mse_loss(prediction.float(), training_target(scheduler, batch).float())
