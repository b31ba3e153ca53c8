"""The eight places of the world: seeded textures of which a picture shows a random window.

May import numpy and Pillow only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]

EDGE = 400
"""Edge of a texture (texels; a picture shows 2 texels a pixel)."""
VARIANTS = 6
"""Textures of a place: other seeds, scales and tones."""


def _noise(rng: np.random.Generator, rows: int, columns: int) -> Array:
    """Smooth noise (EDGE, EDGE) of about unit variance from a lattice of rows × columns numbers."""
    lattice = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
    noise = np.asarray(lattice.resize((EDGE, EDGE), Image.Resampling.BICUBIC))
    return noise / noise.std()


def _grid() -> tuple[Array, Array]:
    rows, columns = np.mgrid[:EDGE, :EDGE].astype(np.float32)
    return rows, columns


def _mix(low: tuple[float, ...], high: tuple[float, ...], tone: Array) -> Array:
    """Blend two colours by a tone (rows, columns) in 0 … 1."""
    tone = np.clip(tone, 0, 1)[..., None]
    return np.array(low, np.float32) * (1 - tone) + np.array(high, np.float32) * tone


def _grass(rng: np.random.Generator) -> Array:
    tone = 0.5 + 0.2 * _noise(rng, 34, 110) + 0.1 * _noise(rng, 10, 10)
    return _mix((0.10, 0.33, 0.05), (0.46, 0.74, 0.22), tone)


def _snow(rng: np.random.Generator) -> Array:
    tone = 0.6 + 0.3 * _noise(rng, 9, 6)
    return _mix((0.76, 0.83, 0.93), (0.97, 0.98, 1.0), tone)


def _sand(rng: np.random.Generator) -> Array:
    rows, columns = _grid()
    wave = np.sin(rows * rng.uniform(0.22, 0.3) + columns * rng.uniform(-0.06, 0.06) + 1.3 * _noise(rng, 7, 7))
    return _mix((0.72, 0.54, 0.30), (0.95, 0.81, 0.54), 0.5 + 0.33 * wave + 0.06 * _noise(rng, 120, 120))


def _water(rng: np.random.Generator) -> Array:
    ridge = 1 - np.abs(_noise(rng, 40, 15) + 0.6 * _noise(rng, 60, 26))
    return _mix((0.02, 0.24, 0.52), (0.52, 0.87, 0.97), 0.16 + 0.75 * np.clip(ridge - 0.15, 0, 1) ** 1.5)


def _wood(rng: np.random.Generator) -> Array:
    rows, _ = _grid()
    plank = rng.uniform(38, 46)
    cell = np.floor(rows / plank)
    tone = 0.5 + 0.2 * _noise(rng, 90, 8) + 0.14 * np.sin(cell * 12.9)
    seam = np.abs(rows / plank - cell - 0.5) > 0.46
    return _mix((0.36, 0.20, 0.08), (0.72, 0.47, 0.25), tone) * np.where(seam, 0.45, 1.0)[..., None]


def _night(rng: np.random.Generator) -> Array:
    rows, columns = _grid()
    sky = _mix((0.01, 0.01, 0.07), (0.11, 0.09, 0.30), rows / EDGE + 0.12 * _noise(rng, 6, 6))
    light = np.zeros((EDGE, EDGE), np.float32)
    for y, x, size in zip(*rng.uniform(0, EDGE, (2, 130)), rng.uniform(1.2, 2.6, 130), strict=True):
        light = np.maximum(light, np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / size**2))
    return _mix((0, 0, 0), (1, 1, 0.88), light) + sky * (1 - light[..., None])


def _brick(rng: np.random.Generator) -> Array:
    rows, columns = _grid()
    height = rng.uniform(24, 30)
    width = 2.1 * height
    row = np.floor(rows / height)
    column = columns / width + 0.5 * (row % 2)
    tone = 0.5 + 0.3 * np.sin(row * 78.2 + np.floor(column) * 37.7) + 0.12 * _noise(rng, 60, 60)
    mortar = (rows / height - row < 0.12) | (column - np.floor(column) < 0.06)
    return np.where(
        mortar[..., None], np.array((0.80, 0.77, 0.72), np.float32), _mix((0.52, 0.17, 0.11), (0.76, 0.35, 0.24), tone)
    )


def _fabric(rng: np.random.Generator) -> Array:
    rows, columns = _grid()
    angle, check = np.deg2rad(rng.uniform(-25, 25)), rng.uniform(22, 28)
    u = (rows * np.cos(angle) + columns * np.sin(angle)) / check
    v = (columns * np.cos(angle) - rows * np.sin(angle)) / check
    return _mix((0.99, 0.84, 0.90), (0.91, 0.42, 0.62), 0.5 * ((u % 1) < 0.5) + 0.5 * ((v % 1) < 0.5))


PLACES: dict[str, tuple[str, Callable[[np.random.Generator], Array]]] = {
    "grass": ("on grass", _grass),
    "snow": ("on snow", _snow),
    "sand": ("on sand", _sand),
    "water": ("on water", _water),
    "wood": ("on wood", _wood),
    "night": ("in the night sky", _night),
    "brick": ("in front of a brick wall", _brick),
    "fabric": ("on pink fabric", _fabric),
}
"""Name -> (how a caption says it, function that draws a texture)."""


@lru_cache(maxsize=len(PLACES) * VARIANTS)
def texture(place: str, variant: int) -> Array:
    """Draw (or fetch) one texture of a place: (EDGE, EDGE, 3) float32 in 0 … 1."""
    number = list(PLACES).index(place)
    return PLACES[place][1](np.random.default_rng([number, variant])).astype(np.float32)
