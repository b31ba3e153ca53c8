"""The scorer: reads place, kind, colour and identity off a picture, trained on the world alone.

`train_scorer` makes its weights, `validity` prints how far it can be trusted.

Identity is read off the object's own pixels: a first network finds the object, the second sees that crop
and nothing of the place. May import `subjects` and what is above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lily_diffusers.files import write_atomically

from .data import to_tensor
from .objects import CLASSES, COLOURS, Toy
from .places import PLACES
from .subjects import true_pictures
from .world import SIZE, Array

WEIGHTS = Path(__file__).with_name("scorer.safetensors")
PLACE_NAMES, KIND_NAMES, COLOUR_NAMES = list(PLACES), [*CLASSES, "toy"], list(COLOURS)
WIDTH = 64
"""Length of an identity vector."""
_CROP = 32  # edge of the object's crop (pixels)


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())


@dataclass(frozen=True)
class Logits:
    """What the networks say of a batch of pictures.

    Attributes:
        mask: (b, 1, 32, 32), where the object is.
        place: (b, 8).
        kind: (b, 11).
        colour: (b, 8).
        identity: (b, 64), unit vectors.
    """

    mask: Tensor
    place: Tensor
    kind: Tensor
    colour: Tensor
    identity: Tensor


@dataclass(frozen=True)
class Reading:
    """What is read off n pictures.

    Attributes:
        places: keys of `PLACES`.
        kinds: keys of `CLASSES`, or 'toy'.
        colours: keys of `COLOURS`.
        identity: (n, 64), unit vectors; their cosines tell how alike two objects look.
    """

    places: list[str]
    kinds: list[str]
    colours: list[str]
    identity: Tensor


class Scorer(nn.Module):
    """Finds the object in a picture, then reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(_block(3, 24, 2), _block(24, 24))
        self.deep = nn.Sequential(_block(24, 48, 2), _block(48, 48), _block(48, 64, 2), _block(64, 64))
        self.up = nn.Sequential(nn.Conv2d(64, 48, 1), nn.Upsample(scale_factor=4, mode="bilinear"))
        self.mask = nn.Sequential(_block(72, 16), nn.Conv2d(16, 1, 3, 1, 1))
        self.place = nn.Linear(64, len(PLACE_NAMES))
        self.read_crop = nn.Sequential(
            _block(4, 32), _block(32, 48, 2), _block(48, 64), _block(64, 96, 2), _block(96, 96), _block(96, 128, 2),
            nn.Flatten(), nn.Linear(128 * 16, 192), nn.SiLU(),
        )  # fmt: skip
        self.kind = nn.Linear(192, len(KIND_NAMES))
        self.colour = nn.Linear(192, len(COLOUR_NAMES))
        self.identity = nn.Linear(192, WIDTH)

    def forward(self, pictures: Tensor, mask: Tensor | None = None) -> Logits:
        """Read pictures.

        Args:
            pictures: (b, 3, 64, 64), -1 to 1.
            mask: (b, 1, 64, 64), 0 to 1, where the object truly is, or None to use the one that is found.
        """
        near = self.look(pictures)
        deep = self.deep(near)
        found = self.mask(torch.cat([near, self.up(deep)], 1))
        if mask is None:
            mask = F.interpolate(found.detach().sigmoid(), scale_factor=2, mode="bilinear")
        inner = self.read_crop(crop_object(pictures, mask))
        return Logits(
            mask=found,
            place=self.place(deep.mean((2, 3))),
            kind=self.kind(inner),
            colour=self.colour(inner),
            identity=F.normalize(self.identity(inner), dim=-1),
        )

    @torch.no_grad()
    def read(self, pictures: Array, batch: int = 128) -> Reading:
        """Read pictures (n, 64, 64, 3) uint8."""
        if pictures.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(f"pictures have shape {pictures.shape}; the scorer reads (n, {SIZE}, {SIZE}, 3).")
        parts = [self(to_tensor(pictures[i : i + batch])) for i in range(0, len(pictures), batch)]

        def names(of: str, table: list[str]) -> list[str]:
            return [table[int(i)] for part in parts for i in getattr(part, of).argmax(-1)]

        return Reading(
            places=names("place", PLACE_NAMES),
            kinds=names("kind", KIND_NAMES),
            colours=names("colour", COLOUR_NAMES),
            identity=torch.cat([part.identity for part in parts]),
        )


def crop_object(pictures: Tensor, mask: Tensor) -> Tensor:
    """Cut the object out: its place painted grey, a square around it resized.

    Args:
        pictures: (b, 3, 64, 64), -1 to 1.
        mask: (b, 1, 64, 64), 0 to 1.

    Returns:
        (b, 4, 32, 32): RGB times mask, and the mask.
    """
    low, high = [], []
    for across in (2, 3):  # where it lies in x, then in y
        share = (mask.sum(across).squeeze(1) + 1e-6).cumsum(-1)
        share = share / share[:, -1:]
        low.append((share < 0.015).sum(-1))
        high.append((share < 0.985).sum(-1) + 1)
    first, last = torch.stack(low, -1).float() / SIZE, torch.stack(high, -1).float() / SIZE  # (b, 2), edges
    half = ((last - first).amax(-1) / 2 * 1.08).clamp(min=0.1)
    middle = first + last - 1  # -1 to 1
    theta = torch.zeros(len(pictures), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 2 * half
    theta[:, :, 2] = middle
    grid = F.affine_grid(theta, [len(pictures), 4, _CROP, _CROP], align_corners=False)
    return F.grid_sample(torch.cat([pictures * mask, mask], 1), grid, align_corners=False)


def load_scorer(file: Path = WEIGHTS) -> Scorer:
    """Load the trained scorer, frozen, on the CPU."""
    scorer = Scorer()
    scorer.load_state_dict({key: value.float() for key, value in load_file(file).items()})
    return scorer.eval().requires_grad_(False)


def save_scorer(scorer: Scorer, file: Path) -> None:
    """Write the weights in half precision."""
    weights = {key: value.half().contiguous() for key, value in scorer.state_dict().items()}
    write_atomically(file, lambda partial: save_file(weights, partial))


def subject_reference(scorer: Scorer, toy: Toy, seed: int = 99, count: int = 4) -> Tensor:
    """The direction (64,) of a toy's identity: the mean over `count` true pictures in each place."""
    pictures, _ = true_pictures(toy, PLACE_NAMES * count, seed)
    return F.normalize(scorer.read(pictures).identity.mean(0), dim=0)
