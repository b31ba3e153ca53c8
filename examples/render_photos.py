"""Draw the example photos: one striped teapot, five snapshots of it in three places.

    python -m examples.render_photos OUT_DIR

The first thing in the flow: its pictures stand in for a user's own photos, so that the demo and
the tests train on real JPEG files that nobody has to license. A small ray marcher with soft shadows
and gloss, seeded, twice supersampled. May import numpy and Pillow only.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageFilter

Array = NDArray[Any]

SUPERSAMPLE = 2
LIGHT = np.array([-0.45, 0.75, 0.5], np.float32) / np.float32(np.sqrt(0.45**2 + 0.75**2 + 0.5**2))
CREAM, TEAL, RED = (0.93, 0.87, 0.73), (0.03, 0.36, 0.38), (0.78, 0.13, 0.07)
_GAMMA = 1.25  # of the film: lifts the shadows a little
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Shot:
    """One photo: where the camera stands, what it looks at, how the teapot is turned.

    Attributes:
        size: (width, height) of the upright picture (pixels).
        place: key of `_PLACES`.
        yaw: of the teapot about its vertical axis (degrees).
        eye: camera position (teapot radii; y is up, the teapot stands on y = 0 at the origin).
        look: the point in the middle of the picture (teapot radii).
        orientation: EXIF orientation tag; 6 stores the pixels turned, as phones do.
    """

    size: tuple[int, int]
    place: str
    yaw: float
    eye: tuple[float, float, float]
    look: tuple[float, float, float] = (0.0, 0.75, 0.0)
    orientation: int = 1


SHOTS = (
    Shot((512, 384), "table", 15.0, (0.6, 2.1, 5.6), (0.2, 0.7, 0.0)),
    Shot((384, 512), "lawn", -35.0, (-0.8, 1.5, 6.6), (0.1, 1.1, 0.0)),
    Shot((512, 384), "tiles", 150.0, (-0.5, 3.2, 5.4), (-0.35, 0.55, 0.0)),
    Shot((384, 512), "table", 200.0, (1.2, 1.6, 6.8), (0.1, 0.85, 0.0), orientation=6),
    Shot((512, 384), "lawn", 55.0, (0.3, 2.6, 5.4), (-0.6, 0.8, 0.0)),
)


def _f32(values: ArrayLike) -> Array:
    return np.asarray(values, np.float32)


def _unit(v: Array) -> Array:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def _cone(p: Array, a: tuple[float, ...], b: tuple[float, ...], radius_a: float, radius_b: float) -> Array:
    """Distance to a capsule that narrows from a to b (an underestimate where it narrows)."""
    start, axis = _f32(a), _f32(b) - _f32(a)
    along = np.clip((p - start) @ axis / (axis @ axis), 0, 1)
    return np.linalg.norm(p - start - along[:, None] * axis, axis=-1) - (radius_a + (radius_b - radius_a) * along)


def _ellipsoid(p: Array, height: float, radii: tuple[float, float, float]) -> Array:
    """Distance, to first order, to an ellipsoid whose middle is on the axis at `height`."""
    q = (p - _f32([0, height, 0])) / _f32(radii)
    k = np.linalg.norm(q, axis=-1)
    return k * (k - 1) / np.maximum(np.linalg.norm(q / _f32(radii), axis=-1), 1e-6)


def _ring(p: Array, middle: tuple[float, float], radius: float, tube: float, upright: bool) -> Array:
    """Distance to a torus: upright in the x-y plane around `middle`, else flat at height middle[1]."""
    x, y, z = p[:, 0] - middle[0], p[:, 1] - middle[1], p[:, 2]
    flat, off = (np.hypot(x, y), z) if upright else (np.hypot(x, z), y)
    return np.hypot(flat - radius, off) - tube


def _smooth_min(a: Array, b: Array, width: float) -> Array:
    h = np.maximum(width - np.abs(a - b), 0) / width
    return np.minimum(a, b) - h * h * width / 4


def _parts(p: Array) -> tuple[Array, Array, Array]:
    """Distances (n,) from points (n, 3) in the teapot's own axes to body, lid and red parts."""
    body = np.minimum(_ellipsoid(p, 0.78, (1.02, 0.78, 1.02)), _ring(p, (0, 0.07), 0.5, 0.09, upright=False))
    lid = np.minimum(_ellipsoid(p, 1.43, (0.52, 0.2, 0.52)), _ring(p, (0, 1.42), 0.52, 0.05, upright=False))
    spout = _smooth_min(
        _cone(p, (0.75, 0.55, 0), (1.3, 0.85, 0), 0.3, 0.17), _cone(p, (1.3, 0.85, 0), (1.66, 1.4, 0), 0.17, 0.1), 0.3
    )
    handle = _ring(p, (-1.05, 0.85), 0.44, 0.095, upright=True)
    knob = np.minimum(_ellipsoid(p, 1.74, (0.15, 0.14, 0.15)), _cone(p, (0, 1.55, 0), (0, 1.7, 0), 0.08, 0.06))
    return body, lid, np.minimum(np.minimum(spout, handle), knob)


def _distance(p: Array) -> Array:
    body, lid, red = _parts(p)
    return _smooth_min(np.minimum(body, lid), red, 0.08)


def _march(origin: Array, direction: Array) -> tuple[Array, Array]:
    """Follow rays (n, 3) to the teapot: distance travelled (inf on a miss) and nearest pass / distance (n,)."""
    travelled, nearest = np.full(len(origin), np.inf, np.float32), np.ones(len(origin), np.float32)
    middle = _f32([0.1, 0.9, 0]) - origin  # only rays through the bounding ball are followed
    along = (middle * direction).sum(-1)
    reach = 1.85**2 - ((middle**2).sum(-1) - along**2)
    live = np.flatnonzero((reach > 0) & (along + np.sqrt(np.maximum(reach, 0)) > 0))
    t = np.maximum(along[live] - np.sqrt(reach[live]), 0.02)
    for _ in range(90):
        d = _distance(origin[live] + t[:, None] * direction[live])
        nearest[live] = np.minimum(nearest[live], np.clip(9 * d / t, 0, 1))
        hit = d < 0.002
        travelled[live[hit]] = t[hit]
        go_on = ~hit & (t < along[live] + np.sqrt(reach[live]))
        live, t = live[go_on], (t + 0.85 * d)[go_on]
    return travelled, nearest


def _lit(p: Array, yaw: Array) -> Array:
    """Share of the lamp's light (n,) that reaches world points (n, 3), soft at the shadow's edge."""
    toward = np.broadcast_to(LIGHT @ yaw, p.shape)
    travelled, nearest = _march(p @ yaw, toward)
    return np.where(np.isfinite(travelled), 0, nearest).astype(np.float32)


def _shade_teapot(p: Array, view: Array, yaw: Array, sky: Array) -> Array:
    """Colour (n, 3) of teapot points p in the teapot's own axes, seen along `view` (world axes)."""
    steps = np.eye(3, dtype=np.float32) * 0.004
    normal = _unit(np.stack([_distance(p + step) - _distance(p - step) for step in steps], -1))
    body, lid, red = _parts(p)
    teal = (np.sin(p[:, 1] * 4 * np.pi / 0.78) < -0.1) | (p[:, 1] < 0.14) | (lid < body)
    colour = np.where(teal[:, None], _f32(TEAL), _f32(CREAM))
    colour = np.where((red < np.minimum(body, lid))[:, None], _f32(RED), colour)
    world = normal @ yaw.T
    open_sky = np.clip(_distance(p + 0.25 * normal) / 0.25, 0, 1) * np.clip(0.35 + p[:, 1] / 0.6, 0.35, 1)
    lit = _lit((p + 0.03 * normal) @ yaw.T, yaw)
    diffuse = 0.82 * np.clip(world @ LIGHT, 0, 1) * lit + open_sky * (0.27 + 0.14 * world[:, 1])
    facing = np.clip(-(world * view).sum(-1), 0, 1)
    mirror = view + 2 * facing[:, None] * world
    gloss = 0.9 * np.clip((_unit(LIGHT - view) * world).sum(-1), 0, 1) ** 160 * lit
    glaze = (0.05 + 0.5 * (1 - facing) ** 4) * np.clip(mirror[:, 1] + 0.2, 0, 1) * open_sky
    return colour * diffuse[:, None] + gloss[:, None] + glaze[:, None] * sky


def _noise(p: Array, rng: np.random.Generator, scale: tuple[float, float], octaves: int = 5) -> Array:
    """Smooth noise (n,), about zero, at points (n, 2): random lattices, each turned and twice as fine."""
    total = np.zeros(len(p), np.float32)
    for octave in range(octaves):
        lattice = rng.uniform(-1, 1, (64, 64)).astype(np.float32)
        q = p * _f32(scale) * 2**octave + np.float32(17.3 * octave)
        q = q @ _f32([[0.8, 0.6], [-0.6, 0.8]]) if scale[0] == scale[1] else q  # wood keeps its grain's direction
        cell = np.floor(q).astype(np.int64)
        f = q - cell
        (fx, fy), (x, y) = (f * f * (3 - 2 * f)).T, cell.T % 64
        x1, y1 = (x + 1) % 64, (y + 1) % 64
        rows = lattice[x, y] * (1 - fx) + lattice[x1, y] * fx, lattice[x, y1] * (1 - fx) + lattice[x1, y1] * fx
        total += (rows[0] * (1 - fy) + rows[1] * fy) / 1.6**octave
    return total


def _table(p: Array, rng: np.random.Generator) -> Array:
    plank, grain = np.floor(p[:, 1] / 1.1), _noise(p, rng, (0.7, 4.0))
    tone = 0.78 + 0.1 * np.sin(plank * 12.9) + 0.09 * grain + 0.07 * np.sin(p[:, 1] * 17 + 5 * grain)
    seam = np.abs(p[:, 1] / 1.1 - plank - 0.5) > 0.49
    return _f32([0.62, 0.39, 0.21]) * (tone * np.where(seam, 0.5, 1))[:, None]


def _lawn(p: Array, rng: np.random.Generator) -> Array:
    tone = 0.85 + 0.12 * _noise(p, rng, (0.8, 0.8), 4) + 0.3 * _noise(p, rng, (16.0, 5.0), 3)  # patches, blades
    return _f32([0.27, 0.43, 0.1]) * np.clip(tone, 0.25, 1.5)[:, None]


def _tiles(p: Array, rng: np.random.Generator) -> Array:
    cell, inside = np.floor(p / 0.9), p / 0.9 - np.floor(p / 0.9)
    tone = np.where(cell.sum(-1) % 2 == 0, 0.8, 0.42) + 0.05 * _noise(p, rng, (2.0, 3.0))
    grout = (np.abs(inside - 0.5) > 0.48).any(-1)
    return _f32([0.92, 0.8, 0.74]) * np.where(grout, 0.6, tone)[:, None]


_PLACES = {  # what lies on the ground, the far wall's colours from bottom to top, how patchy the wall is
    "table": (_table, ((0.42, 0.48, 0.54), (0.62, 0.66, 0.69)), 0.03),
    "lawn": (_lawn, ((0.14, 0.26, 0.09), (0.66, 0.8, 0.93)), 0.22),
    "tiles": (_tiles, ((0.66, 0.55, 0.3), (0.86, 0.77, 0.52)), 0.03),
}
_WALL_DISTANCE = 7.0


def _image(pixels: Array) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 1) ** (1 / _GAMMA) * 255 + 0.5).astype(np.uint8))


def render(shot: Shot, seed: int) -> Image.Image:
    """Draw one photo, upright (RGB), with the noise that `seed` gives its surfaces and its film."""
    rng = np.random.default_rng(seed)
    width, height = (edge * SUPERSAMPLE for edge in shot.size)
    eye = _f32(shot.eye)
    ahead = _unit(_f32(shot.look) - eye)
    right = _unit(np.cross(ahead, _f32([0, 1, 0])))
    rows, columns = np.mgrid[height:0:-1, 0:width].astype(np.float32).reshape(2, -1, 1) / max(width, height)
    up, side = rows - rows.mean(), columns - columns.mean()
    view = _f32(_unit(ahead + 0.8 * (side * right + up * np.cross(right, ahead))))
    turn = np.deg2rad(shot.yaw)
    yaw = _f32([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])

    paint, (low, high), patchy = _PLACES[shot.place]
    to_wall = np.where(view[:, 2] < -1e-3, -(_WALL_DISTANCE + eye[2]) / np.minimum(view[:, 2], -1e-3), np.inf)
    to_ground = np.where(view[:, 1] < -1e-3, -eye[1] / np.minimum(view[:, 1], -1e-3), np.inf)
    depth = np.minimum(to_wall, to_ground).astype(np.float32)
    p = eye + depth[:, None] * view
    tone = np.clip(p[:, 1] / 3.5 + patchy * _noise(p[:, :2], rng, (1.3, 2.0)), 0, 1)[:, None]
    scene = np.where((to_ground < to_wall)[:, None], paint(p[:, ::2], rng), _f32(low) * (1 - tone) + _f32(high) * tone)
    on_ground = np.flatnonzero(to_ground < to_wall)
    contact = np.clip(_distance(p[on_ground] @ yaw) / 0.5, 0.25, 1)  # less sky light beside the teapot
    scene[on_ground] *= (0.75 * _lit(p[on_ground], yaw) + 0.35 * contact)[:, None]
    scene = scene.reshape(height, width, 3)
    soft = np.asarray(_image(scene).filter(ImageFilter.GaussianBlur(4.0 * SUPERSAMPLE)), np.float32) / 255
    far = np.clip((depth - np.linalg.norm(eye) - 1.5) / 4, 0, 1).reshape(height, width, 1)  # out of focus
    scene = scene * (1 - far) + soft**_GAMMA * far

    travelled, _ = _march(np.broadcast_to(eye @ yaw, view.shape), view @ yaw)
    hit = np.flatnonzero(np.isfinite(travelled))
    pot = eye @ yaw + travelled[hit, None] * (view[hit] @ yaw)
    scene.reshape(-1, 3)[hit] = _shade_teapot(pot, view[hit], yaw, _f32([0.9, 0.95, 1.0]))
    small = np.asarray(_image(scene).resize(shot.size, Image.Resampling.LANCZOS), np.float32) / 255
    film = small + 0.012 * rng.standard_normal(small.shape).astype(np.float32)
    return _image(np.clip(film, 0, 1) ** _GAMMA)


def write_photos(folder: Path, seed: int = 0) -> list[Path]:
    """Write every shot to `folder` as teapot_1.jpg, teapot_2.jpg, … and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, shot in enumerate(SHOTS):
        image, exif = render(shot, seed + i), Image.Exif()
        if shot.orientation == 6:  # "turn me a quarter clockwise": a reader that ignores the tag sees it lying
            image, exif[_EXIF_ORIENTATION] = image.transpose(Image.Transpose.ROTATE_90), 6
        paths.append(folder / f"teapot_{i + 1}.jpg")
        image.save(paths[-1], quality=90, exif=exif)
    return paths


def main() -> None:
    """Write the example photos to the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Draw the example photos of a striped teapot.")
    parser.add_argument("out", type=Path, help="folder to write the JPEG files to")
    for path in write_photos(parser.parse_args().out):
        print(f"wrote {path} ({path.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
