"""The subjects that methods are judged on: toys that pre-training never drew, with photos and true pictures.

    python -m benchmarks.toyworld.subjects OUT_DIR

writes every subject's photos. May import `world` and what is above it.
"""

from __future__ import annotations

import argparse
import dataclasses
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from .objects import Paint, Toy, random_paints, random_toy, toy_parts
from .places import PLACES
from .world import Array, contact_sheet, random_scene, render

PHOTOS = 5
"""Photos of a subject."""
_HELD_OUT = 7_000_000_000
"""Seeds from here on are never drawn in pre-training."""

_TEAL, _CREAM, _PINK, _NAVY = (0.02, 0.52, 0.5), (0.97, 0.85, 0.45), (0.93, 0.12, 0.5), (0.15, 0.2, 0.45)

TEAPOT = Toy(
    body="bun", top="knob", left="handle", right="spout", feet="plate", face="none", stretch=(0.95, 1.12),
    paints=(Paint(_TEAL, "striped", _CREAM), Paint(_PINK), Paint(_PINK), Paint(_TEAL)),
)  # fmt: skip
ROBOT = Toy(
    body="box", top="head", left="arms", right="arms", feet="legs", face="eyes", stretch=(1.0, 1.05),
    paints=(Paint((0.55, 0.8, 0.2)), Paint(_NAVY), Paint((0.95, 0.45, 0.15)), Paint(_NAVY)),
)  # fmt: skip
TRAIN = Toy(
    body="brick", top="hat", left="ears", right="none", feet="wheels", face="button", stretch=(1.1, 1.1),
    paints=(Paint((0.8, 0.12, 0.2)), Paint((0.98, 0.8, 0.1)), Paint((0.1, 0.35, 0.75)), Paint((0.12, 0.12, 0.14))),
)  # fmt: skip


def held_out_toy(number: int) -> Toy:
    """Draw a toy that pre-training never drew, with at most one of its five places for a part left empty.

    Its kinds of parts may have stood together in pre-training, its paints and proportions never.

    Args:
        number: 0, 1, 2, …
    """
    rng = np.random.default_rng(_HELD_OUT + number)
    while True:
        toy = random_toy(rng)
        if sum(part != "none" for part in toy.shape[1:]) >= 4:
            return toy


SUBJECTS: dict[str, Toy] = {"teapot": TEAPOT, "robot": ROBOT, "train": TRAIN} | {
    f"toy{number:02d}": held_out_toy(number) for number in range(13)
}
"""Name -> the toy: three made by hand, thirteen by seed."""

TUNING = ("toy00", "toy01", "toy02", "toy03")
"""Subjects to choose learning rates on; figures are reported on the others."""


def subject_places(name: str) -> tuple[str, str]:
    """The two places in which a subject's photos are taken."""
    first, second = np.random.default_rng(zlib.crc32(name.encode())).permutation(list(PLACES))[:2]
    return str(first), str(second)


def new_places(name: str) -> list[str]:
    """The six places in which it is not."""
    return [place for place in PLACES if place not in subject_places(name)]


def true_pictures(toy: Toy, places: list[str], seed: int) -> tuple[Array, Array]:
    """Render a toy once in each of some places, in poses that follow from the seed.

    Returns:
        Pictures (n, 64, 64, 3) uint8 and their masks (n, 64, 64), 0 to 1.
    """
    parts = toy_parts(toy)
    drawn = [
        render(random_scene(np.random.default_rng([_HELD_OUT, seed, i]), parts, place, plain=True))
        for i, place in enumerate(places)
    ]
    return np.stack([picture for picture, _ in drawn]), np.stack([mask for _, mask in drawn])


def photos(name: str) -> Array:
    """The five photos (5, 64, 64, 3) uint8 that a subject is learnt from, in two places."""
    first, second = subject_places(name)
    return true_pictures(SUBJECTS[name], [first, second, first, second, first], seed=0)[0]


def write_photos(name: str, folder: Path) -> list[Path]:
    """Write a subject's photos as PNG files and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{i + 1}.png" for i in range(PHOTOS)]
    for path, picture in zip(paths, photos(name), strict=True):
        Image.fromarray(picture).save(path)
    return paths


def other_shape(toy: Toy, seed: int) -> Toy:
    """Another toy in the same paints: no part of its shape is the same."""
    rng = np.random.default_rng([_HELD_OUT, 1, seed])
    while True:
        other = random_toy(rng)
        if all(a != b for a, b in zip(other.shape, toy.shape, strict=True)):
            return dataclasses.replace(other, paints=toy.paints)


def other_paints(toy: Toy, seed: int) -> Toy:
    """The same toy in other paints."""
    paints = random_paints(np.random.default_rng([_HELD_OUT, 2, seed]))
    return dataclasses.replace(toy, paints=paints)


def main() -> None:
    """Write every subject's photos, and a sheet: photos, then one true picture in each other place."""
    parser = argparse.ArgumentParser(description="Render the subjects' photos.")
    parser.add_argument("out", type=Path, help="folder to write to, one folder a subject")
    out = parser.parse_args().out
    rows = []
    for name, toy in SUBJECTS.items():
        write_photos(name, out / name)
        rows.append([*photos(name), *true_pictures(toy, new_places(name), seed=1)[0]])
    contact_sheet(rows).save(out / "subjects.png")


if __name__ == "__main__":
    main()
