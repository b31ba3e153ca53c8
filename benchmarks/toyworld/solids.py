"""Solids as signed distance functions, and the ray tracer that turns a list of parts into pixels.

The first room of the toy world: everything in its pictures that is not background is a list of
`Part`s. Orthographic, so that all rays of a picture share one direction. May import numpy only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Vector = tuple[float, float, float]
REACH = 1.25
"""How far an object may reach from its middle on either axis of the screen (object radii)."""
_STEPS = 14
_PERIOD = 0.46  # of stripes and dots (object radii)
_NEAR = 0.02
_EPSILON = np.float32(0.004)


def _ellipsoid(p: Array, size: tuple[float, ...]) -> Array:
    """Radii (x, y, z)."""
    radii = np.array(size, np.float32)[:, None]
    k = np.sqrt(((p / radii) ** 2).sum(0))
    return k * (k - 1) / np.maximum(np.sqrt(((p / radii**2) ** 2).sum(0)), 1e-4)


def _dome(p: Array, size: tuple[float, ...]) -> Array:
    """The upper half of an ellipsoid: radii (x, y, z)."""
    return np.maximum(_ellipsoid(p, size), -p[1])


def _box(p: Array, size: tuple[float, ...]) -> Array:
    """Half edges (x, y, z), a little rounded."""
    q = np.abs(p) - np.array(size, np.float32)[:, None] + 0.03
    return np.sqrt((np.maximum(q, 0) ** 2).sum(0)) + np.minimum(q.max(0), 0) - 0.03


def _frustum(p: Array, size: tuple[float, ...]) -> Array:
    """Half height, radius at the bottom, radius at the top; the axis is y."""
    half, bottom, top = size
    slope = (bottom - top) / (2 * half)
    radius = (bottom + top) / 2 - slope * p[1]
    side = (np.hypot(p[0], p[2]) - radius) / np.sqrt(1 + slope**2, dtype=np.float32)
    return np.maximum(side, np.abs(p[1]) - half)


def _cup(p: Array, size: tuple[float, ...]) -> Array:
    """A cylinder hollow from above: half height, radius, wall."""
    half, radius, wall = size
    around = np.hypot(p[0], p[2])
    outer = np.maximum(around - radius, np.abs(p[1]) - half)
    return np.maximum(outer, -np.maximum(around - radius + wall, -p[1] - half * 0.6))


def _ring(p: Array, size: tuple[float, ...]) -> Array:
    """A torus around the z axis: radius of the ring, radius of the tube."""
    return np.hypot(np.hypot(p[0], p[1]) - size[0], p[2]) - size[1]


def _capsule(p: Array, size: tuple[float, ...]) -> Array:
    """Half length of the axis (y), radius."""
    return np.sqrt(p[0] ** 2 + np.maximum(np.abs(p[1]) - size[0], 0) ** 2 + p[2] ** 2) - size[1]


def _star(p: Array, size: tuple[float, ...]) -> Array:
    """Five points with a ridge along each: radius of the tips, half thickness in the middle."""
    radius, half = size
    fifth = 2 * np.pi / 5
    angle = np.arctan2(p[0], p[1]).astype(np.float32)
    angle = np.abs(angle - fifth * np.round(angle / fifth))
    around = np.hypot(p[0], p[1])
    x, y, z = around * np.sin(angle), around * np.cos(angle), np.abs(p[2])
    inner = 0.42 * radius * np.array([np.sin(fifth / 2), np.cos(fifth / 2)])
    normal = np.array([radius - inner[1], inner[0], 0])  # across the edge from the tip to the inner corner
    normal[2] = normal[1] * radius / half  # the facet also holds the middle (0, 0, half)
    normal = (normal / np.linalg.norm(normal)).astype(np.float32)
    return normal[0] * x + normal[1] * (y - np.float32(radius)) + normal[2] * z


SOLIDS: dict[str, tuple[Callable[[Array, tuple[float, ...]], Array], Callable[[tuple[float, ...]], float]]] = {
    "ellipsoid": (_ellipsoid, max),
    "dome": (_dome, max),
    "box": (_box, lambda s: float(np.linalg.norm(s))),
    "frustum": (_frustum, lambda s: float(np.hypot(s[0], max(s[1:])))),
    "cup": (_cup, lambda s: float(np.hypot(s[0], s[1]))),
    "ring": (_ring, sum),
    "capsule": (_capsule, sum),
    "star": (_star, max),
}
"""Name -> (signed distance of points (3, n) for a size, radius of the ball that holds the solid)."""


@dataclass(frozen=True)
class Paint:
    """What a surface looks like.

    Attributes:
        colour: RGB, 0 to 1.
        pattern: 'plain', 'striped' or 'dotted'.
        second: RGB of the stripes or dots.
        gloss: strength of the highlight.
    """

    colour: Vector
    pattern: str = "plain"
    second: Vector = (1.0, 1.0, 1.0)
    gloss: float = 0.45

    def at(self, p: Array) -> Array:
        """Colour (3, n) at points p (3, n) of the object's own axes."""
        colour = np.array(self.colour, np.float32)[:, None]
        if self.pattern == "plain":
            return np.broadcast_to(colour, p.shape)
        if self.pattern == "striped":
            other = np.sin(p[1] * np.float32(2 * np.pi / _PERIOD) + 0.8) > 0.1
        else:
            cell = p / np.float32(_PERIOD) + np.array([[0.25], [0.1], [0.4]], np.float32)
            cell[0] += 0.5 * (np.floor(cell[1]) % 2)
            other = ((cell - np.floor(cell) - 0.5) ** 2).sum(0) < 0.13
        return np.where(other, np.array(self.second, np.float32)[:, None], colour)


@dataclass(frozen=True)
class Part:
    """One solid of an object.

    Attributes:
        solid: key of `SOLIDS`.
        size: the solid's lengths (object radii; see `REACH`).
        at: where its middle is; x right, y up, z toward the viewer.
        paint: of its surface.
        turn: degrees about the x, y and z axis, applied in this order.
    """

    solid: str
    size: tuple[float, ...]
    at: Vector
    paint: Paint
    turn: Vector = (0.0, 0.0, 0.0)


def rotation(x: float, y: float, z: float) -> Array:
    """Rotation (3, 3) by degrees about the x axis, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.deg2rad([x, y, z])), np.sin(np.deg2rad([x, y, z]))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return (about_z @ about_y @ about_x).astype(np.float32)


def _hit(part: Part, screen: Array, view: Array) -> tuple[Array, Array, Array]:
    """Follow the rays of pixels (2, n) to one part.

    Returns:
        Indices (m,) of the rays that hit, points (3, m) and outward normals (3, m) on the screen's axes.
    """
    distance, bound = SOLIDS[part.solid]
    reach = np.float32(bound(part.size) * 1.02)
    middle = view @ np.array(part.at, np.float32)
    index = np.flatnonzero(((screen - middle[:2, None]) ** 2).sum(0) < reach**2)
    to_local = (view @ rotation(*part.turn)).T
    start = np.empty((3, len(index)), np.float32)
    start[:2] = screen[:, index] - middle[:2, None]
    start[2] = np.sqrt(np.maximum(reach**2 - (start[:2] ** 2).sum(0), 0))
    depth = 2 * start[2]
    p, ahead = to_local @ start, -to_local[:, 2:]
    for step in range(_STEPS):
        d = distance(p, part.size)
        p += np.maximum(d, 0) * ahead
        depth -= d
        if step in (3, 7):
            live = (depth > -0.05) & (d < reach)
            index, p, depth, d = index[live], p[:, live], depth[live], d[live]
    on = np.flatnonzero((d < _NEAR) & (depth > -_NEAR))
    index, p, d = index[on], p[:, on], distance(p[:, on], part.size)
    normal = np.stack([distance(p + _EPSILON * np.eye(3, dtype=np.float32)[:, i : i + 1], part.size) for i in range(3)])
    normal = to_local.T @ ((normal - d) / _EPSILON)
    normal /= np.maximum(np.sqrt((normal**2).sum(0)), 1e-6)
    return index, to_local.T @ p + middle[:, None], normal


def trace(parts: list[Part], screen: Array, view: Array, light: Array) -> tuple[Array, Array]:
    """Draw an object.

    Args:
        parts: of the object.
        screen: pixel positions (2, n) relative to the object's middle, x right and y up (object radii).
        view: rotation (3, 3) from the object's axes to the screen's.
        light: unit vector (3,) toward the lamp, on the screen's axes.

    Returns:
        Colours (3, n), 0 to 1, and which pixels the object covers (n,), bool.
    """
    depth = np.full(screen.shape[1], -np.inf, np.float32)
    colour = np.zeros((3, screen.shape[1]), np.float32)
    half = light + np.array([0, 0, 1], np.float32)
    half /= np.linalg.norm(half)
    for part in parts:
        index, p, normal = _hit(part, screen, view)
        front = p[2] > depth[index]
        index, p, normal = index[front], p[:, front], normal[:, front]
        depth[index] = p[2]
        own = part.paint.at(view.T @ p)
        diffuse = np.clip(light @ normal, 0, 1)
        shade = 0.42 + 0.14 * normal[1] + 0.58 * diffuse
        gloss = part.paint.gloss * np.clip(half @ normal, 0, 1) ** 24
        colour[:, index] = np.clip(own * shade + gloss, 0, 1)
    return colour, np.isfinite(depth)
