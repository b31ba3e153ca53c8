"""What the world's pictures show: ten classes of objects, and toys put together at random.

A class is a function that lists an object's parts for a paint; a toy is a `Toy` record, drawn by
seed or written by hand, from which its parts follow. May import `solids`.
"""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .solids import Paint, Part, Vector

COLOURS: dict[str, Vector] = {
    "red": (0.87, 0.09, 0.08),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.10, 0.24, 0.88),
    "yellow": (0.96, 0.84, 0.10),
    "orange": (0.97, 0.50, 0.06),
    "purple": (0.55, 0.14, 0.75),
    "black": (0.08, 0.08, 0.09),
    "white": (0.93, 0.93, 0.93),
}
PATTERNS = ("plain", "striped", "dotted")
_WHITE, _BLACK = Paint(COLOURS["white"]), Paint(COLOURS["black"])


def _ball(paint: Paint) -> list[Part]:
    return [Part("ellipsoid", (0.78, 0.78, 0.78), (0, 0, 0), paint)]


def _cube(paint: Paint) -> list[Part]:
    return [Part("box", (0.56, 0.56, 0.56), (0, 0, 0), dataclasses.replace(paint, gloss=0.1), (0, 32, 0))]


def _cone(paint: Paint) -> list[Part]:
    return [Part("frustum", (0.8, 0.7, 0.01), (0, 0, 0), paint)]


def _can(paint: Paint) -> list[Part]:
    lid = Part("frustum", (0.04, 0.44, 0.44), (0, 0.74, 0), Paint((0.75, 0.76, 0.78)))
    return [Part("frustum", (0.74, 0.5, 0.5), (0, 0, 0), paint), lid]


def _ring(paint: Paint) -> list[Part]:
    return [Part("ring", (0.58, 0.24), (0, 0, 0), paint, (-35, 0, 0))]


def _mug(paint: Paint) -> list[Part]:
    return [
        Part("cup", (0.6, 0.52, 0.09), (-0.12, 0, 0), paint),
        Part("ring", (0.3, 0.09), (0.5, 0.02, 0), dataclasses.replace(paint, pattern="plain")),
    ]


def _star(paint: Paint) -> list[Part]:
    return [Part("star", (0.98, 0.3), (0, 0, 0), paint)]


def _duck(paint: Paint) -> list[Part]:
    bill = Paint(COLOURS["orange"] if paint.colour != COLOURS["orange"] else COLOURS["red"])
    plain = dataclasses.replace(paint, pattern="plain")
    return [
        Part("ellipsoid", (0.7, 0.44, 0.46), (0.02, -0.26, 0), paint),
        Part("ellipsoid", (0.26, 0.14, 0.2), (0.66, -0.02, 0), plain, (0, 0, 35)),
        Part("ellipsoid", (0.36, 0.36, 0.36), (-0.38, 0.36, 0), plain),
        Part("ellipsoid", (0.24, 0.09, 0.15), (-0.78, 0.3, 0.02), bill),
        Part("ellipsoid", (0.07, 0.07, 0.07), (-0.5, 0.46, 0.3), _BLACK if sum(paint.colour) > 0.5 else _WHITE),
    ]


def _mushroom(paint: Paint) -> list[Part]:
    stem = Paint((0.92, 0.84, 0.68), gloss=0.1)
    return [
        Part("dome", (0.8, 0.66, 0.8), (0, 0.06, 0), paint),
        Part("frustum", (0.4, 0.27, 0.21), (0, -0.34, 0), stem),
    ]


def _car(paint: Paint) -> list[Part]:
    glass, tyre = Paint((0.66, 0.84, 0.95)), Paint((0.1, 0.1, 0.11), gloss=0.1)
    wheels = [
        Part("frustum", (0.1, 0.23, 0.23), (x, -0.36, z), tyre, (90, 0, 0)) for x in (-0.5, 0.5) for z in (-0.36, 0.36)
    ]
    hubs = [
        Part("frustum", (0.02, 0.1, 0.1), (x, -0.36, 0.47), Paint((0.8, 0.8, 0.8)), (90, 0, 0)) for x in (-0.5, 0.5)
    ]
    return [
        Part("box", (0.92, 0.22, 0.4), (0, -0.16, 0), paint),
        Part("box", (0.48, 0.2, 0.34), (0.08, 0.24, 0), glass),
        Part("box", (0.44, 0.05, 0.35), (0.08, 0.42, 0), dataclasses.replace(paint, pattern="plain")),
        *wheels,
        *hubs,
    ]


CLASSES: dict[str, Callable[[Paint], list[Part]]] = {
    "ball": _ball,
    "cube": _cube,
    "cone": _cone,
    "can": _can,
    "ring": _ring,
    "mug": _mug,
    "star": _star,
    "duck": _duck,
    "mushroom": _mushroom,
    "car": _car,
}
"""Name -> the parts of an object of the class in a paint."""

BODIES: dict[str, tuple[str, tuple[float, ...], float, float]] = {
    "ball": ("ellipsoid", (0.5, 0.5, 0.5), 0.5, 0.5),
    "egg": ("ellipsoid", (0.42, 0.6, 0.42), 0.6, 0.42),
    "bun": ("ellipsoid", (0.62, 0.4, 0.5), 0.4, 0.6),
    "box": ("box", (0.44, 0.44, 0.36), 0.44, 0.44),
    "brick": ("box", (0.6, 0.32, 0.36), 0.32, 0.6),
    "drum": ("frustum", (0.44, 0.42, 0.42), 0.44, 0.42),
    "bell": ("frustum", (0.5, 0.58, 0.24), 0.5, 0.42),
    "bucket": ("frustum", (0.46, 0.32, 0.54), 0.46, 0.44),
}
"""Body of a toy -> solid, size, half height, half width where its arms sit."""

TOPS = ("none", "knob", "hat", "head", "cap", "hoop", "horns")
SIDES = ("none", "handle", "arms", "wings", "spout", "ears")
FEET = ("none", "legs", "wheels", "plate", "rockers")
FACES = ("none", "eyes", "belt", "button")


@dataclass(frozen=True)
class Toy:
    """One assembly; its look from every side follows from these fields.

    Attributes:
        body: key of `BODIES`.
        top: one of `TOPS`.
        left: one of `SIDES`.
        right: one of `SIDES`.
        feet: one of `FEET`.
        face: one of `FACES`.
        paints: of the body, the top, the sides, and the feet.
        stretch: factors of the body's width and height.
    """

    body: str
    top: str
    left: str
    right: str
    feet: str
    face: str
    paints: tuple[Paint, Paint, Paint, Paint]
    stretch: tuple[float, float] = (1.0, 1.0)

    @property
    def shape(self) -> tuple[str, ...]:
        """Everything but paint and stretch."""
        return (self.body, self.top, self.left, self.right, self.feet, self.face)


def _top(kind: str, y: float, paint: Paint) -> list[Part]:
    match kind:
        case "knob":
            return [Part("ellipsoid", (0.17, 0.17, 0.17), (0, y + 0.1, 0), paint)]
        case "hat":
            return [Part("frustum", (0.24, 0.3, 0.02), (0, y + 0.18, 0), paint)]
        case "head":
            return [Part("box", (0.25, 0.2, 0.22), (0, y + 0.15, 0), paint)]
        case "cap":
            return [Part("dome", (0.34, 0.28, 0.34), (0, y - 0.04, 0), paint)]
        case "hoop":
            return [Part("ring", (0.2, 0.075), (0, y + 0.2, 0), paint)]
        case "horns":
            return [Part("frustum", (0.2, 0.1, 0.01), (x, y + 0.1, 0), paint, (0, 0, -x * 110)) for x in (-0.24, 0.24)]
    return []


def _side(kind: str, sign: int, width: float, height: float, paint: Paint) -> list[Part]:
    match kind:
        case "handle":
            return [Part("ring", (0.24, 0.08), (sign * (width + 0.1), 0.02, 0), paint)]
        case "arms":
            return [Part("capsule", (0.24, 0.1), (sign * (width + 0.15), -0.06, 0), paint, (0, 0, sign * 38))]
        case "wings":
            return [Part("ellipsoid", (0.3, 0.14, 0.2), (sign * (width + 0.16), 0.12, 0), paint, (0, 0, sign * 32))]
        case "spout":
            return [Part("frustum", (0.3, 0.16, 0.07), (sign * (width + 0.16), 0.1, 0), paint, (0, 0, -sign * 48))]
        case "ears":
            return [Part("ellipsoid", (0.2, 0.2, 0.08), (sign * width * 0.85, height * 0.9, 0), paint)]
    return []


def _feet(kind: str, y: float, width: float, paint: Paint) -> list[Part]:
    match kind:
        case "legs":
            return [Part("capsule", (0.14, 0.11), (x * width, y - 0.12, 0.05), paint) for x in (-0.5, 0.5)]
        case "wheels":
            return [
                Part("frustum", (0.08, 0.2, 0.2), (x * width, y - 0.04, z), paint, (90, 0, 0))
                for x in (-0.7, 0.7)
                for z in (-0.32, 0.36)
            ]
        case "plate":
            return [Part("frustum", (0.06, width * 1.05, width * 0.95), (0, y - 0.03, 0), paint)]
        case "rockers":
            return [Part("ellipsoid", (0.2, 0.12, 0.3), (x * width, y - 0.05, 0.1), paint) for x in (-0.55, 0.55)]
    return []


def _face(kind: str, width: float, depth: float, paint: Paint) -> list[Part]:
    match kind:
        case "eyes":
            white = [Part("ellipsoid", (0.13, 0.13, 0.08), (x, 0.12, depth), _WHITE) for x in (-0.18, 0.18)]
            black = [Part("ellipsoid", (0.06, 0.06, 0.05), (x, 0.11, depth + 0.06), _BLACK) for x in (-0.17, 0.17)]
            return white + black
        case "belt":
            return [Part("ring", (width * 0.98, 0.075), (0, -0.08, 0), paint, (90, 0, 0))]
        case "button":
            return [Part("ellipsoid", (0.17, 0.17, 0.08), (0, 0, depth), paint)]
    return []


def toy_parts(toy: Toy) -> list[Part]:
    """List the parts of a toy, its middle at the origin."""
    solid, size, height, width = BODIES[toy.body]
    wide, high = toy.stretch
    match solid:
        case "frustum":
            size = (size[0] * high, size[1] * wide, size[2] * wide)
            depth = (size[1] + size[2]) / 2
        case _:
            size = (size[0] * wide, size[1] * high, size[2] * wide)
            depth = size[2]
    height, width = height * high, width * wide
    body, top, side, feet = toy.paints
    return [
        Part(solid, size, (0, 0, 0), body),
        *_top(toy.top, height, top),
        *_side(toy.left, -1, width, height, side),
        *_side(toy.right, 1, width, height, side),
        *_feet(toy.feet, -height, width, feet),
        *_face(toy.face, width, depth, top),
    ]


def random_colour(rng: np.random.Generator) -> Vector:
    """Draw any RGB colour, vivid ones more often than by chance."""
    if rng.random() < 0.15:
        return (float(rng.uniform(0.1, 0.95)),) * 3
    return colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.45, 1.0), rng.uniform(0.35, 1.0))


def random_paints(rng: np.random.Generator, body: Vector | None = None) -> tuple[Paint, Paint, Paint, Paint]:
    """Draw the paints of a toy: two to four colours, the body patterned now and then.

    Args:
        rng: source of chance.
        body: RGB of the body, or None for any.
    """
    colours = [body or random_colour(rng)]
    while len(colours) < 4:
        colour = random_colour(rng)
        if min(np.abs(np.subtract(colour, other)).max() for other in colours) > 0.25:
            colours.append(colour)
    pattern = str(rng.choice(PATTERNS, p=(0.5, 0.3, 0.2)))
    order = [0, 1, 1 if rng.random() < 0.3 else 2, int(rng.integers(1, 4))]
    first, top, side, feet = (colours[i] for i in order)
    return Paint(first, pattern, top), Paint(top), Paint(side), Paint(feet)


def can_wear(body: str, face: str) -> bool:
    """Whether a face suits a body: a belt does not go round a box."""
    return face != "belt" or BODIES[body][0] != "box"


def random_toy(rng: np.random.Generator, body: Vector | None = None) -> Toy:
    """Draw a toy.

    Args:
        rng: source of chance.
        body: RGB of the body, or None for any.
    """
    left = str(rng.choice(SIDES))
    right = left if rng.random() < 0.5 else str(rng.choice(SIDES))
    form, top, feet, face = (str(rng.choice(list(kinds))) for kinds in (BODIES, TOPS, FEET, FACES))
    return Toy(
        body=form,
        top=top,
        left=left,
        right=right,
        feet=feet,
        face=face if can_wear(form, face) else "button",
        paints=random_paints(rng, body),
        stretch=(float(rng.uniform(0.85, 1.15)), float(rng.uniform(0.85, 1.15))),
    )
