"""Train the base's UNet and text encoders together on latents of the world, from nothing.

May import `data` and what is above it, and `lily_diffusers`.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from lily_diffusers.files import write_atomically
from lily_diffusers.training.data import keyed_generator

_MATRIX_RATE = 2e-3  # of Muon, for matrices and convolutions
_RATE = 1.2e-3  # of AdamW, for embeddings, norms and biases
_WARMUP = 200
_COOLDOWN = 0.5  # share of the steps in which the rates fall to nothing
_EMPTY = 0.1  # share of samples without any conditioning, for classifier-free guidance
_EMA = 0.9995
_OBJECT_WEIGHT = 3.0  # added to the weight of latent cells that the object covers, once it can be told from noise
_SKEW = 1.4  # timesteps are 1000 · u^skew: shapes of so few latents are decided at little noise


@dataclass(frozen=True)
class Samples:
    """What the UNet and the text encoders learn from.

    Attributes:
        latents: (n, 4, 16, 16), scaled.
        ids: prompt tokens (n, length).
        time_ids: sizes (n, 6) in pixels.
        cover: (n, 16, 16) uint8, how much of each latent cell the object covers, 0 to 255.
    """

    latents: Tensor
    ids: Tensor
    time_ids: Tensor
    cover: Tensor


class Denoiser(nn.Module):
    """The trained parts of a pipeline, and the loss on a batch of latents.

    Args:
        pipe: whose UNet and text encoders are trained in place.
    """

    signal: Tensor
    noise: Tensor

    def __init__(self, pipe: StableDiffusionXLPipeline) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.text_encoder_2 = pipe.unet, pipe.text_encoder, pipe.text_encoder_2
        noise = DDPMScheduler.from_config(pipe.scheduler.config)
        self.register_buffer("signal", noise.alphas_cumprod.sqrt())
        self.register_buffer("noise", (1 - noise.alphas_cumprod).sqrt())

    def forward(
        self, latents: Tensor, ids: Tensor, time_ids: Tensor, cover: Tensor, epsilon: Tensor, t: Tensor, keep: Tensor
    ) -> Tensor:
        """Compute each sample's weighted mean squared error of v (Salimans & Ho, arXiv 2202.00512).

        Most of a picture is grain of its place. The object's cells weigh more, the more the less noise there is: where
        the noise leaves open what they show, an uneven weight would shift the mean that the model learns.

        Args:
            latents: (b, 4, h, w), scaled.
            ids: prompt tokens (b, n).
            time_ids: sizes (b, 6) in pixels.
            cover: (b, h, w), how much of each cell the object covers, 0 to 1.
            epsilon: noise like latents.
            t: timesteps (b,), 0 to 999.
            keep: (b,), 1 where the prompt counts and 0 where its embeddings are zeroed, as SDXL does for no prompt.

        Returns:
            Errors (b,).
        """
        first = self.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(ids, output_hidden_states=True)
        prompt = torch.cat([first, second.hidden_states[-2]], -1) * keep[:, None, None]
        signal, noise = self.signal[t][:, None, None, None], self.noise[t][:, None, None, None]
        predicted = self.unet(
            signal * latents + noise * epsilon,
            t,
            prompt,
            added_cond_kwargs={"text_embeds": second.text_embeds * keep[:, None], "time_ids": time_ids},
            return_dict=False,
        )[0]
        errors = F.mse_loss(predicted, signal * epsilon - noise * latents, reduction="none")
        return (errors * (1 + _OBJECT_WEIGHT * signal**2 * cover[:, None])).mean((1, 2, 3))


def rate_factor(step: int, steps: int) -> float:
    """Warm up, stay, and fall to nothing as 1 - sqrt in the second half: a longer run can start before the fall."""
    left = (steps - step) / (_COOLDOWN * steps)
    return min(1.0, (step + 1) / _WARMUP) * (1.0 if left >= 1 else 1 - math.sqrt(max(0.0, 1 - left)))


class Optimizers:
    """Muon for matrices and convolutions (each a matrix of its output channels), AdamW for everything else.

    The embeddings of tokens, positions, timesteps and sizes, their linear layers too, are among everything else.

    Muon (Jordan et al. 2024, torch.optim.Muon) orthogonalises each matrix's momentum. At the same time on two cores the
    validation loss fell further than AdamW's alone (docs/LOG.md).

    Args:
        denoiser: whose parameters are updated in place.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        named = list(denoiser.named_parameters())
        self._matrices = [p for name, p in named if p.dim() > 1 and "embedding" not in name]
        self._views = [nn.Parameter(p.data.view(len(p), -1)) for p in self._matrices]  # the same memory
        chosen = {id(p) for p in self._matrices}
        others = [p for _, p in named if id(p) not in chosen]
        self._muon = torch.optim.Muon(self._views, lr=_MATRIX_RATE, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        self._adam = torch.optim.AdamW(others, lr=_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    def step(self, factor: float) -> None:
        """Update the parameters from their gradients, with both rates times `factor`."""
        for view, matrix in zip(self._views, self._matrices, strict=True):
            view.grad = None if matrix.grad is None else matrix.grad.view_as(view)
        for optimizer, rate in ((self._muon, _MATRIX_RATE), (self._adam, _RATE)):
            for group in optimizer.param_groups:
                group["lr"] = factor * rate
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of both."""
        return {"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of both."""
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])


def _batch(samples: Samples, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Draw the arguments of one `Denoiser` call; timesteps are spread evenly over the batch, then skewed."""
    index = torch.randint(len(samples.latents), (size,), generator=generator)
    even = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    t = (1000 * even**_SKEW).long().clamp(max=999)
    latents, cover = samples.latents[index].float(), samples.cover[index].float() / 255
    epsilon = torch.randn(latents.shape, generator=generator)
    keep = (torch.rand(size, generator=generator) >= _EMPTY).float()
    return latents, samples.ids[index].long(), samples.time_ids[index].float(), cover, epsilon, t, keep


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over the processes, if there are several."""
    if dist.is_initialized():
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


@torch.no_grad()
def _swap(parameters: list[nn.Parameter], average: list[Tensor]) -> None:
    """Let parameters and their moving average trade places, in place."""
    for parameter, mean in zip(parameters, average, strict=True):
        kept = parameter.clone()
        parameter.copy_(mean)
        mean.copy_(kept)


def train_denoiser(
    denoiser: Denoiser,
    samples: Samples,
    steps: int,
    batch: int,
    checkpoint: Path,
    seed: int = 0,
    every: int = 1000,
) -> Iterator[int]:
    """Train in place, going on from the checkpoint if there is one; at the end the weights are their moving average.

    Under torch.distributed every process takes its share of each batch.

    Args:
        denoiser: on the device to train on.
        samples: to learn from.
        steps: optimiser steps in all.
        batch: samples a step.
        checkpoint: file that holds the state.
        seed: of the batches.
        every: steps between states.

    Yields:
        The number of steps done, after each. When a state was written, the averaged weights are in place meanwhile.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = denoiser.signal.device
    optimizers, parameters = Optimizers(denoiser), list(denoiser.parameters())
    average = [p.detach().clone() for p in parameters]
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        denoiser.load_state_dict(state["weights"])
        optimizers.load_state_dict(state["optimizers"])
        average, start = state["average"], state["step"]
        if rank == 0:
            print(f"goes on from step {start} of {checkpoint}", flush=True)

    began, seen = time.monotonic(), []
    for step in range(start, steps):
        generator = keyed_generator(seed, step)
        denoiser.train()
        share = (part[rank::world].to(device) for part in _batch(samples, batch, generator))
        loss = denoiser(*share).mean()
        denoiser.zero_grad()
        loss.backward()
        _average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers.step(rate_factor(step, steps))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(_EMA, (1 + step) / (10 + step)))
        seen.append(loss.detach())
        saving = (step + 1) % every == 0 or step == steps - 1
        if step % 100 == 99 or saving:
            mean = torch.stack(seen).mean().item()
            speed = (time.monotonic() - began) / (step + 1 - start)
            left = speed * (steps - step - 1) / 60
            if rank == 0:
                said = f"loss {mean:.4f} ({speed:.3f} s a step, {left:.0f} min left)"
                print(f"unet {step + 1}/{steps}: {said}", flush=True)
            seen.clear()
            if not math.isfinite(mean):
                raise RuntimeError(
                    f"The loss is {mean} at step {step + 1}; the last whole state is in {checkpoint}. The same batches "
                    "would follow: lower the rates in benchmarks/toyworld/diffusion.py before the command is repeated."
                )
        if saving:
            if rank == 0:
                state = {"weights": denoiser.state_dict(), "optimizers": optimizers.state_dict()}
                state |= {"average": average, "step": step + 1}
                write_atomically(checkpoint, functools.partial(torch.save, state))
            _swap(parameters, average)
            denoiser.eval()
            yield step + 1
            _swap(parameters, average)
        else:
            yield step + 1
    _swap(parameters, average)
    denoiser.eval()
