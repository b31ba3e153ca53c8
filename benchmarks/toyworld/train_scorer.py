"""Train the scorer on renders: what is where, and which toy it is.

    python -m benchmarks.toyworld.train_scorer

takes some minutes on one thread and writes build/scorer.safetensors; the committed file is replaced by naming
it with `--out`. Identity is learnt from families of toys: one toy, the same with one part changed, another
shape in its paints, its shape in other paints; views of one member attract, all else repels, melted views
included. May import `scorer` and what is above it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lily_diffusers.training.data import keyed_generator

from .data import to_tensor
from .objects import FACES, FEET, SIDES, TOPS, Toy, can_wear, random_toy, toy_parts
from .places import PLACES
from .scorer import COLOUR_NAMES, KIND_NAMES, PLACE_NAMES, WEIGHTS, Scorer, save_scorer
from .subjects import other_paints, other_shape
from .world import Array, random_sample, random_scene, render

_SEED = 3_000_000_000
_MEMBERS = 4
_VIEWS = 4
_FAMILIES = 8  # a step
_OTHERS = 32  # other pictures a step
_TEMPERATURE = 0.1


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Pictures with what is true of them; -1 stands for 'does not say'.

    Attributes:
        pixels: (n, 64, 64, 3) uint8.
        masks: (n, 64, 64) uint8, 0 to 255.
        labels: (n, 4) int64: place, kind, colour, identity.
    """

    pixels: Array
    masks: Array
    labels: Array


def change_one_part(toy: Toy, rng: np.random.Generator) -> Toy:
    """Replace one part of a toy's shape by another kind that suits its body."""
    field, kinds = [("top", TOPS), ("left", SIDES), ("right", SIDES), ("feet", FEET), ("face", FACES)][rng.integers(5)]
    others = [kind for kind in kinds if kind != getattr(toy, field) and (field != "face" or can_wear(toy.body, kind))]
    changes: dict[str, str] = {field: str(rng.choice(others))}
    return dataclasses.replace(toy, **changes)  # type: ignore[arg-type]


def family(rng: np.random.Generator) -> list[Toy]:
    """Draw a toy and its three hard negatives: one part changed, another shape, other paints."""
    toy = random_toy(rng)
    seed = int(rng.integers(2**31))
    return [toy, change_one_part(toy, rng), other_shape(toy, seed), other_paints(toy, seed)]


def _render_family(number: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng([_SEED, number])
    pixels, masks, labels = [], [], []
    for member, toy in enumerate(family(rng)):
        for _ in range(_VIEWS):
            place = int(rng.integers(len(PLACES)))
            picture, mask = render(random_scene(rng, toy_parts(toy), PLACE_NAMES[place], plain=rng.random() < 0.9))
            pixels.append(picture)
            masks.append((mask * 255).astype(np.uint8))
            labels.append((place, KIND_NAMES.index("toy"), -1, number * _MEMBERS + member))
    return np.stack(pixels), np.stack(masks), np.array(labels)


def _render_others(number: int) -> tuple[Array, Array, Array]:
    pixels, masks, labels = [], [], []
    for i in range(_MEMBERS * _VIEWS):
        sample = random_sample(np.random.default_rng([_SEED + 1, number, i]), toys=0.15)
        picture, mask = render(sample.scene)
        pixels.append(picture)
        masks.append((mask * 255).astype(np.uint8))
        colour = COLOUR_NAMES.index(sample.colour) if sample.colour else -1
        labels.append((PLACE_NAMES.index(sample.scene.place), KIND_NAMES.index(sample.kind), colour, -1))
    return np.stack(pixels), np.stack(masks), np.array(labels)


def render_labelled(families: int, others: int, workers: int = 2) -> Labelled:
    """Render families of toys and groups of 16 other pictures; family f takes the places 16 f to 16 f + 15."""
    with ProcessPoolExecutor(workers) as pool:
        groups = [*pool.map(_render_family, range(families), chunksize=20)]
        groups += pool.map(_render_others, range(others), chunksize=20)
    return Labelled(*(np.concatenate(parts) for parts in zip(*groups, strict=True)))


def soften(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Blur each picture by its own amount, shift its tone, add noise: a generated picture is no render."""
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(len(pictures), 1, 1, 1, generator=generator) * 0.9
    tone = 1 + 0.12 * torch.randn(len(pictures), 3, 1, 1, generator=generator)
    noise = 0.03 * torch.randn(pictures.shape, generator=generator)
    return ((pictures + share * (blurred - pictures) + 1) * tone - 1 + noise).clamp(-1, 1)


def melt(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Warp pictures until their objects lose their shape: right colours, wrong thing.

    Returns:
        The pictures (b, 3, 64, 64), and the grid that warped them (b, 64, 64, 2).
    """
    count, _, height, width = pictures.shape
    coarse = torch.randn(count, 2, 9, 9, generator=generator) * 0.16
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(pictures.shape), align_corners=False) + field
    return F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False), grid


def attract(identity: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrastive loss (arXiv 2004.11362): (n, d) unit vectors; label -1 only repels."""
    logits = identity @ identity.T / _TEMPERATURE
    logits = logits - 1e9 * torch.eye(len(labels))
    same = (labels[:, None] == labels[None]) & (labels >= 0)[:, None]
    same.fill_diagonal_(False)
    chance = logits.log_softmax(-1)
    count = same.sum(-1)
    return -((chance * same).sum(-1)[count > 0] / count[count > 0]).mean()


def _draw(data: Labelled, families: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pictures, masks and labels: two views a member of some families, other pictures, melted toys."""
    size = _MEMBERS * _VIEWS
    chosen = torch.randperm(families, generator=generator)[:_FAMILIES]
    views = torch.stack([torch.randperm(_VIEWS, generator=generator)[:2] for _ in range(_FAMILIES * _MEMBERS)])
    first = chosen.repeat_interleave(_MEMBERS) * size + torch.arange(_MEMBERS).repeat(_FAMILIES) * _VIEWS
    rest = torch.randint(families * size, len(data.pixels), (_OTHERS,), generator=generator)
    index = torch.cat([(first[:, None] + views).flatten(), rest])
    pictures, labels = to_tensor(data.pixels[index.numpy()]), torch.from_numpy(data.labels[index.numpy()])
    masks = torch.from_numpy(data.masks[index.numpy()]).float()[:, None] / 255
    toys = slice(0, 2 * _MEMBERS * _FAMILIES, 2 * _MEMBERS)  # a view of each family's first member
    melted, grid = melt(pictures[toys], generator)
    warped = F.grid_sample(masks[toys], grid, padding_mode="reflection", align_corners=False)
    labels = torch.cat([labels, torch.full((len(melted), 4), -1)])
    return soften(torch.cat([pictures, melted]), generator), torch.cat([masks, warped]), labels


def training_loss(scorer: Scorer, data: Labelled, families: int, generator: torch.Generator) -> Tensor:
    """The loss of one drawn batch: where, what, which colour, and who (a scalar).

    Args:
        scorer: in training mode.
        data: rendered samples, the families first.
        families: how many there are, at least 8.
        generator: of the batch.
    """
    pictures, masks, labels = _draw(data, families, generator)
    logits = scorer(pictures, masks if torch.rand((), generator=generator) < 0.3 else None)
    place, kind, colour, identity = labels.unbind(-1)
    compared = identity >= 0
    compared[-_FAMILIES:] = True  # the melted ones repel
    return (
        F.binary_cross_entropy_with_logits(logits.mask, F.avg_pool2d(masks, 2)) * 2
        + F.cross_entropy(logits.place, place, ignore_index=-1)
        + F.cross_entropy(logits.kind, kind, ignore_index=-1)
        + F.cross_entropy(logits.colour, colour, ignore_index=-1)
        + attract(logits.identity[compared], identity[compared])
    )


def train(steps: int, families: int = 1200, others: int = 500) -> Scorer:
    """Train a scorer from nothing.

    Args:
        steps: optimiser steps.
        families: of toys to render, 16 pictures each.
        others: groups of 16 other pictures.
    """
    began = time.monotonic()
    data = render_labelled(families, others, workers=1)
    print(f"rendered {len(data.pixels)} pictures ({time.monotonic() - began:.0f} s)", flush=True)
    torch.manual_seed(0)
    scorer = Scorer().train()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.02, fused=True)
    began, seen = time.monotonic(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = training_loss(scorer, data, families, keyed_generator(0, step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        seen.append(loss.item())
        if step % 100 == 99:
            print(f"scorer {step + 1}/{steps}: loss {np.mean(seen):.3f} ({time.monotonic() - began:.0f} s)", flush=True)
            seen.clear()
    return scorer.eval()


def main() -> None:
    """Train and write the scorer."""
    parser = argparse.ArgumentParser(description="Train the toy world's scorer.")
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps")
    parser.add_argument("--out", type=Path, default=Path("build/scorer.safetensors"), help="file for the weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    save_scorer(train(args.steps), args.out)
    print(f"wrote {args.out}; the scorer that all figures come from is {WEIGHTS}")


if __name__ == "__main__":
    main()
