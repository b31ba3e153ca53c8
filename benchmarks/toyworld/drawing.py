"""Pictures drawn by a base of the toy world: many prompts at a time, and the sheet of all objects in all places.

May import `world` and what is above it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from .objects import CLASSES
from .places import PLACES
from .world import SIZE, Array, contact_sheet

OBJECTS = (*(f"{colour} {kind}" for colour, kind in zip(
    ("red", "blue", "green", "yellow", "purple", "white", "orange", "yellow", "red", "blue"), CLASSES, strict=True
)), "toy", "red toy", "toy with blue hat, arms, wheels")  # fmt: skip
"""What the sample sheet shows in every place."""


def draw(pipe: StableDiffusionXLPipeline, prompts: list[str], seed: int = 0, batch: int = 26) -> list[Array]:
    """Draw each prompt once with the world's usual settings (20 steps, guidance 2.5).

    Returns:
        Pictures (64, 64, 3) uint8.
    """
    pictures: list[Array] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        drawn = pipe(part, height=SIZE, width=SIZE, num_inference_steps=20, guidance_scale=2.5, generator=generators)
        pictures += [np.asarray(image) for image in drawn.images]
    return pictures


def write_samples(pipe: StableDiffusionXLPipeline, file: Path) -> None:
    """Write a sheet of the base's own pictures: a row for each of `OBJECTS`, a column for each place."""
    prompts = [f"a photo of a {what} {phrase}" for what in OBJECTS for phrase, _ in PLACES.values()]
    pictures = draw(pipe, prompts)
    wide = len(PLACES)
    contact_sheet([pictures[i : i + wide] for i in range(0, len(pictures), wide)]).save(file, quality=90)
