"""Scenes of the toy world: draw one at random, render it, and say what it shows.

    python -m benchmarks.toyworld.world OUT.png

writes a sheet of objects × places. May import `solids`, `objects` and `places`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .objects import CLASSES, COLOURS, PATTERNS, Toy, random_toy, toy_parts
from .places import EDGE, PLACES, VARIANTS, texture
from .solids import REACH, Paint, Part, rotation, trace

Array = NDArray[Any]

SIZE = 64
"""Edge of a picture (pixels)."""
LATENT = SIZE // 4
"""Edge of a picture's latents (latent pixels)."""
_FINE = 2  # samples a pixel and axis


@dataclass(frozen=True)
class Scene:
    """Everything that a picture follows from.

    Attributes:
        parts: of the object.
        place: key of `PLACES`.
        middle: of the object on the canvas, (x, y) in edges of the canvas.
        radius: of the object (pixels).
        turn: pitch, yaw and roll of the object (degrees).
        light: unit vector toward the lamp on the screen's axes.
        gain: brightness of the whole picture.
        window: variant of the place's texture and the window's (top, left) in it (texels).
        original: edge of the canvas (pixels): more than `SIZE` is cropped, less is enlarged.
        crop: (top, left) of the picture on the canvas (pixels).
    """

    parts: tuple[Part, ...]
    place: str
    middle: tuple[float, float] = (0.5, 0.52)
    radius: float = 22.0
    turn: tuple[float, float, float] = (16.0, 0.0, 0.0)
    light: tuple[float, float, float] = (-0.48, 0.62, 0.62)
    gain: float = 1.0
    window: tuple[int, int, int] = (0, 0, 0)
    original: int = SIZE
    crop: tuple[int, int] = (0, 0)

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditioning: original (height, width), crop (top, left), target (height, width), in pixels."""
        return (self.original, self.original, *self.crop, SIZE, SIZE)

    @property
    def view(self) -> Array:
        """Rotation (3, 3) from the object's axes to the screen's."""
        pitch, yaw, roll = self.turn
        view: Array = rotation(0, 0, roll) @ (rotation(pitch, 0, 0) @ rotation(0, yaw, 0))
        return view


def random_scene(rng: np.random.Generator, parts: list[Part], place: str, plain: bool = False) -> Scene:
    """Draw a scene of an object.

    Args:
        rng: source of chance.
        parts: of the object.
        place: key of `PLACES`.
        plain: neither crop nor enlarge, as for a subject's own photos.
    """
    kind = 0.5 if plain else rng.random()
    original, crop = SIZE, (0, 0)
    if kind < 0.15:
        original = int(rng.integers(SIZE * 9 // 8, SIZE * 3 // 2 + 1))
        top, left = rng.integers(0, original - SIZE + 1, 2)
        crop = (int(top), int(left))
    elif kind > 0.9:
        original = int(rng.integers(SIZE // 4, SIZE * 5 // 8))
    light = np.array([rng.uniform(-0.7, 0.1), rng.uniform(0.5, 0.8), 0.65])
    light /= np.linalg.norm(light)
    corner = rng.integers(0, EDGE - _FINE * SIZE + 1, 2)
    return Scene(
        parts=tuple(parts),
        place=place,
        middle=(float(rng.uniform(0.42, 0.58)), float(rng.uniform(0.44, 0.6))),
        radius=float(rng.uniform(19.0, 27.0) * max(original, SIZE) / SIZE),
        turn=(float(rng.uniform(8, 26)), float(rng.uniform(-28, 28)), float(rng.uniform(-9, 9))),
        light=(float(light[0]), float(light[1]), float(light[2])),
        gain=float(rng.uniform(0.9, 1.08)),
        window=(int(rng.integers(VARIANTS)), int(corner[0]), int(corner[1])),
        original=original,
        crop=crop,
    )


def render(scene: Scene) -> tuple[Array, Array]:
    """Draw a scene.

    Returns:
        The picture (64, 64, 3) uint8 and the share of each pixel that the object covers (64, 64) float32.
    """
    edge = _FINE * SIZE
    canvas = max(scene.original, SIZE)
    variant, top, left = scene.window
    picture = texture(scene.place, variant)[top : top + edge, left : left + edge].reshape(-1, 3).copy()

    rows, columns = np.mgrid[:edge, :edge].astype(np.float32).reshape(2, -1) / _FINE
    x = (columns + scene.crop[1] - scene.middle[0] * canvas) / np.float32(scene.radius)
    y = (scene.middle[1] * canvas - rows - scene.crop[0]) / np.float32(scene.radius)
    near = np.flatnonzero((np.abs(x) < REACH) & (np.abs(y) < REACH))
    light = np.array(scene.light, np.float32)
    colour, inside = trace(list(scene.parts), np.stack([x[near], y[near]]), scene.view, light)

    if inside.any():
        on = near[inside]
        width, foot = np.ptp(x[on]) / 2, y[on].min()
        aside = x - (x[on].max() + x[on].min()) / 2 + np.float32(0.35 * scene.light[0])
        shadow = np.exp(-((aside / (0.95 * width)) ** 2) - ((y - foot - 0.06) / 0.2) ** 2)
        picture *= (1 - 0.62 * shadow)[:, None]
        picture[on] = colour[:, inside].T
    covered = np.zeros(edge * edge, np.float32)
    covered[near] = inside

    def shrink(pixels: Array) -> Array:
        return pixels.reshape(SIZE, _FINE, SIZE, _FINE, -1).mean((1, 3))

    result = (np.clip(shrink(picture) * scene.gain, 0, 1) * 255 + 0.5).astype(np.uint8)
    if scene.original < SIZE:
        small = Image.fromarray(result).resize((scene.original,) * 2, Image.Resampling.BOX)
        result = np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return result, shrink(covered)[..., 0]


@dataclass(frozen=True)
class Sample:
    """One picture with what is known of it.

    Attributes:
        scene: what it was rendered from.
        caption: what it is said to show.
        kind: key of `CLASSES`, or 'toy'.
        colour: key of `COLOURS`, or '' where it has no such colour.
        toy: the assembly, for a toy.
    """

    scene: Scene
    caption: str
    kind: str
    colour: str = ""
    toy: Toy | None = None


def _join(words: list[str]) -> str:
    return " ".join(word for word in words if word)


def _colour_word(colour: tuple[float, ...]) -> str:
    """The palette colour that an RGB colour is near to, or ''."""
    far = {name: float(np.linalg.norm(np.subtract(colour, other))) for name, other in COLOURS.items()}
    name = min(far, key=far.__getitem__)
    return name if far[name] < 0.34 else ""


def _describe_toy(rng: np.random.Generator, toy: Toy) -> str:
    """Name some of a toy's parts: 'with a red hat, blue wheels'."""
    sides = [toy.left] if toy.left == toy.right else [toy.left, toy.right]
    parts = [(toy.top, toy.paints[1]), *((side, toy.paints[2]) for side in sides), (toy.feet, toy.paints[3])]
    parts += [(toy.face, toy.paints[1])]
    words = [_join(["" if name == "eyes" else _colour_word(p.colour), name]) for name, p in parts if name != "none"]
    if not words:
        return ""
    chosen = rng.permutation(len(words))[: rng.integers(1, len(words) + 1)]
    return "with " + ", ".join(words[i] for i in sorted(chosen))


TEMPLATES = (
    "a photo of {} {}",
    "a photo of {} {}",
    "a picture of {} {}",
    "{} {}",
    "{} {}, a photo",
    "a rendering of {} {}",
)


def _caption(rng: np.random.Generator, what: str, place: str) -> str:
    where = "" if rng.random() < 0.2 else PLACES[place][0]  # a subject's own prompt names no place either
    article = "an " if what[0] in "aeiou" else "a "
    if rng.random() < 0.15:  # as in 'a photo of sks toy'
        article = ""
    if rng.random() < 0.1:  # a word that means nothing, so that an unknown one changes little
        article += "".join(rng.choice(list("bcdfghjklmnpqrtvwxz"), rng.integers(2, 4))) + " "
    return str(rng.choice(TEMPLATES)).format(article + what, where).strip().replace(" ,", ",")


def random_sample(rng: np.random.Generator, toys: float = 0.4) -> Sample:
    """Draw what a picture of pre-training shows.

    Args:
        rng: source of chance.
        toys: share of toys.
    """
    place = str(rng.choice(list(PLACES)))
    name = str(rng.choice(list(COLOURS)))
    if rng.random() < toys:
        named = rng.random() < 0.4
        toy = random_toy(rng, _jitter(rng, name) if named else None)
        body = toy.body if rng.random() < 0.5 else ""
        what = _join([name if named else "", body, "toy", _describe_toy(rng, toy) if rng.random() < 0.6 else ""])
        return Sample(
            random_scene(rng, toy_parts(toy), place), _caption(rng, what, place), "toy", name if named else "", toy
        )
    kind, pattern = str(rng.choice(list(CLASSES))), str(rng.choice(PATTERNS, p=(0.6, 0.2, 0.2)))
    second = str(rng.choice([other for other in COLOURS if other != name]))
    paint = Paint(_jitter(rng, name), pattern, _jitter(rng, second))
    adjective = "" if pattern == "plain" else pattern
    marks = {"plain": "", "striped": f"with {second} stripes", "dotted": f"with {second} dots"}[pattern]
    if rng.random() < 0.3:
        marks = ""
    else:
        adjective = "" if rng.random() < 0.5 else adjective
    what = _join([name if rng.random() < 0.9 else "", adjective, kind, marks])
    return Sample(random_scene(rng, CLASSES[kind](paint), place), _caption(rng, what, place), kind, name)


def _jitter(rng: np.random.Generator, name: str) -> tuple[float, float, float]:
    colour = np.clip(np.array(COLOURS[name]) + rng.normal(0, 0.03, 3), 0, 1)
    return (float(colour[0]), float(colour[1]), float(colour[2]))


def contact_sheet(rows: list[list[Array]]) -> Image.Image:
    """Lay pictures (64, 64, 3) out in rows, twice as large."""
    tile, gap = 2 * SIZE, 4
    width = max(len(row) for row in rows)
    sheet = Image.new("RGB", (width * (tile + gap) + gap, len(rows) * (tile + gap) + gap), "white")
    for i, row in enumerate(rows):
        for j, pixels in enumerate(row):
            image = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.BICUBIC)
            sheet.paste(image, (gap + j * (tile + gap), gap + i * (tile + gap)))
    return sheet


def main() -> None:
    """Write a sheet of the world: a row for each class, then rows of toys; a column for each place."""
    parser = argparse.ArgumentParser(description="Draw the toy world's objects in its places.")
    parser.add_argument("out", type=Path, help="PNG file to write")
    rng = np.random.default_rng(0)
    rows = []
    for kind in CLASSES:
        samples = []
        for place in PLACES:
            paint = Paint(COLOURS[str(rng.choice(list(COLOURS)))], str(rng.choice(PATTERNS)), COLOURS["white"])
            samples.append(render(random_scene(rng, CLASSES[kind](paint), place))[0])
        rows.append(samples)
    rows += [[render(random_scene(rng, toy_parts(random_toy(rng)), place))[0] for place in PLACES] for _ in range(5)]
    contact_sheet(rows).save(parser.parse_args().out)


if __name__ == "__main__":
    main()
