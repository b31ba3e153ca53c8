"""From photos to latents and from prompts to embeddings, so that VAE and text encoders can leave memory.

What is cached is the VAE's *distribution*, not a sample of it, so that every step draws fresh sampling
noise. Imports `config` and `data` of this package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import Tensor
from tqdm.auto import tqdm

from .config import TrainingConfig, TrainingError
from .data import Crop, Photo, crop_variants, cut, random_crop, time_ids


@dataclass(frozen=True)
class Encoded:
    """The VAE's answer to one crop.

    Attributes:
        mean, std: (4, resolution/f, resolution/f) of the latent distribution, float32, on the CPU.
        time_ids: (6,), see `data.time_ids`.
    """

    mean: Tensor
    std: Tensor
    time_ids: Tensor


class LatentSource(Protocol):
    """Where the loop gets the latent distribution of a photo's crop."""

    def draw(self, photo: int, generator: torch.Generator) -> Encoded:
        """Draw one of the photo's crops."""
        ...


class CachedLatents:
    """Every crop variant of every photo, encoded once.

    Args:
        photos: the photos.
        vae: used here only; the caller may drop it afterwards.
        config: the run's options.
        progress: whether to show a progress bar.
    """

    def __init__(self, photos: list[Photo], vae: AutoencoderKL, config: TrainingConfig, progress: bool = False) -> None:
        plan = [(index, crop) for index, photo in enumerate(photos) for crop in crop_variants(photo, index, config)]
        self.variants: list[list[Encoded]] = [[] for _ in photos]
        for index, crop in tqdm(plan, desc="Encoding photos", unit="crop", disable=not progress):
            self.variants[index].append(encode(vae, photos[index], crop, config.resolution))

    def draw(self, photo: int, generator: torch.Generator) -> Encoded:
        """Choose one of the photo's variants."""
        variants = self.variants[photo]
        return variants[int(torch.randint(len(variants), (), generator=generator))]


class LiveLatents:
    """Encode a fresh crop at every step; the VAE stays in memory.

    Args:
        photos: the photos.
        vae: kept.
        config: the run's options.
    """

    def __init__(self, photos: list[Photo], vae: AutoencoderKL, config: TrainingConfig) -> None:
        self.photos, self.vae, self.config = photos, vae, config

    def draw(self, photo: int, generator: torch.Generator) -> Encoded:
        """Cut and encode a random crop of the photo."""
        picture = self.photos[photo]
        return encode(self.vae, picture, random_crop(picture, self.config, generator), self.config.resolution)


@torch.no_grad()
def encode(vae: AutoencoderKL, photo: Photo, crop: Crop, resolution: int) -> Encoded:
    """Encode one crop.

    Raises:
        TrainingError: if the latents are not finite, as SDXL's own VAE gives in float16.
    """
    pixels = cut(photo, crop, resolution)[None].to(vae.device, vae.dtype)  # (1, 3, resolution, resolution)
    distribution = vae.encode(pixels).latent_dist
    encoded = Encoded(
        distribution.mean[0].float().cpu(), distribution.std[0].float().cpu(), time_ids(photo, crop, resolution)
    )
    if not (encoded.mean.isfinite().all() and encoded.std.isfinite().all()):
        raise TrainingError(
            f"the VAE's latents of {photo.path} are not finite in {vae.dtype}; "
            "leave --pretrained_vae_model_name_or_path out "
            "(the base's VAE then runs in float32), or name an fp16-safe VAE."
        )
    return encoded


def scale_latents(vae_config, latents: Tensor) -> Tensor:
    """Bring VAE latents to the scale that the UNet works in.

    Args:
        vae_config: with `scaling_factor` and, for some VAEs, `latents_mean` and `latents_std`.
        latents: (b, 4, h, w).
    """
    mean, std = getattr(vae_config, "latents_mean", None), getattr(vae_config, "latents_std", None)
    if mean is None or std is None:
        return latents * vae_config.scaling_factor
    mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
    return (latents - mean) * vae_config.scaling_factor / std


@dataclass(frozen=True)
class PromptEmbeds:
    """What SDXL's two text encoders make of one prompt.

    Attributes:
        prompt_embeds: (1, 77, context width). pooled: (1, pooled width).
        negative_prompt_embeds, negative_pooled: the same of the empty negative prompt, which are zeros where
            the base model asks for that.
    """

    prompt_embeds: Tensor
    pooled: Tensor
    negative_prompt_embeds: Tensor
    negative_pooled: Tensor


@torch.no_grad()
def encode_prompts(
    config: TrainingConfig, prompts: set[str], device: torch.device, dtype: torch.dtype
) -> dict[str, PromptEmbeds]:
    """Load the text encoders, encode each prompt once and let the encoders go.

    Args:
        config: names the base model.
        prompts: what to encode.
        device, dtype: where and in what precision the encoders run; the results stay there.

    Raises:
        TrainingError: if the base model cannot be loaded.
    """
    with loading("pretrained_model_name_or_path", config.pretrained_model_name_or_path):
        encoders = StableDiffusionXLPipeline.from_pretrained(
            config.pretrained_model_name_or_path,
            unet=None,
            vae=None,
            revision=config.revision,
            variant=config.variant,
            dtype=dtype,
            add_watermarker=False,
        ).to(device)
    embeds = {}
    for prompt in sorted(prompts):
        positive, negative, pooled, negative_pooled = encoders.encode_prompt(prompt, device=device)
        embeds[prompt] = PromptEmbeds(positive, pooled, negative, negative_pooled)
    return embeds


@contextmanager
def loading(flag: str, value: str) -> Iterator[None]:
    """Turn what goes wrong while a model loads into one sentence.

    Args:
        flag: the option that names the model. value: what it was given.

    Raises:
        TrainingError: instead of OSError, ValueError and the like.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = (
            "is a folder, but not a model that loads"
            if Path(value).is_dir()
            else "is no folder here, nor a hub id in reach"
        )
        raise TrainingError(
            f"cannot load --{flag}={value}: it {what} ({reason[:120]}); pass SDXL in diffusers' format."
        ) from error
