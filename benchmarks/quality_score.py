"""What a trained subject is asked for, and how the pictures are scored.

May import the toy world.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
from torch import Tensor

from . import BenchError
from .toyworld.objects import COLOURS
from .toyworld.places import PLACES
from .toyworld.scorer import Scorer, subject_reference
from .toyworld.subjects import SUBJECTS, new_places
from .toyworld.world import Array

INSTANCE_PROMPT = "a photo of sks toy"
EDITS = 3
"""Colour edits of a subject."""

_UNRELATED = (
    ("ball", "a photo of a red ball on grass"),
    ("mug", "a photo of a blue mug on wood"),
    ("car", "a photo of a green car on sand"),
    ("duck", "a photo of a yellow duck on water"),
)


@dataclass(frozen=True)
class Prompt:
    """One prompt of the evaluation.

    Attributes:
        text: what is drawn.
        purpose: 'place' (the subject in a new place), 'colour' (the subject in another colour) or 'drift' (something
            else altogether).
        asked: the place, colour or kind that the pictures should show, as the scorer names it.
    """

    text: str
    purpose: str
    asked: str


def edit_colours(subject: str) -> list[str]:
    """The `EDITS` colours farthest from a subject's body, black and white left out."""
    body = SUBJECTS[subject].paints[0].colour
    colours = [name for name in COLOURS if name not in ("black", "white")]
    return sorted(colours, key=lambda name: -float(np.linalg.norm(np.subtract(COLOURS[name], body))))[:EDITS]


@cache
def evaluation_prompts(subject: str) -> tuple[Prompt, ...]:
    """List what is drawn of a subject: six new places, three colours, four other things."""
    places = [Prompt(f"{INSTANCE_PROMPT} {PLACES[place][0]}", "place", place) for place in new_places(subject)]
    edits = [
        Prompt(f"a photo of {'an' if colour[0] in 'aeiou' else 'a'} {colour} sks toy on snow", "colour", colour)
        for colour in edit_colours(subject)
    ]
    return (*places, *edits, *(Prompt(text, "drift", kind) for kind, text in _UNRELATED))


@cache
def reference(scorer: Scorer, subject: str) -> Tensor:
    """The direction (d,) of a subject's identity, from its true renders."""
    return subject_reference(scorer, SUBJECTS[subject])


def share(read: Sequence[str], asked: Sequence[str]) -> float:
    """The share of readings that are what was asked."""
    return sum(a == b for a, b in zip(read, asked, strict=True)) / len(asked)


def spread(pictures: Array) -> float | None:
    """Mean absolute difference between pictures (k, h, w, 3) uint8 of one prompt, over all pairs: 0 … 1.

    None for a single picture.
    """
    pairs = [np.abs(a - b).mean() for a, b in combinations(pictures.astype(np.float32) / 255, 2)]
    return float(np.mean(pairs)) if pairs else None


def score_pictures(scorer: Scorer, subject: str, pictures: Array, base_pictures: Array) -> dict[str, float | None]:
    """Score the pictures of one cell.

    Args:
        scorer: reads them.
        subject: key of `SUBJECTS`.
        pictures: (p·k, 64, 64, 3) uint8: k pictures of each of the p evaluation prompts, prompt by prompt.
        base_pictures: the same prompts and seeds drawn by the base.

    Returns:
        identity: mean cosine to the subject's reference in the new places. place: share of right places.
        colour: share of right colours under edits. colour_identity: mean cosine under edits.
        drift: mean absolute pixel difference to the base's pictures of other things, 0 … 1.
        kind_kept: share of those whose kind reads as in the base's picture.
        diversity: see `spread`, mean over the places. fidelity: mean of identity and place.
    """
    prompts = evaluation_prompts(subject)
    k, rest = divmod(len(pictures), len(prompts))
    if rest or len(base_pictures) != len(pictures):
        raise BenchError(
            f"{len(pictures)} pictures and {len(base_pictures)} of the base do not fit {len(prompts)} prompts of "
            f"'{subject}'; remove the strips of this subject from the work folder and run again."
        )

    def of(purpose: str) -> tuple[list[int], list[str]]:
        index = [j for j in range(len(pictures)) if prompts[j // k].purpose == purpose]
        return index, [prompts[j // k].asked for j in index]

    places, edits, others = of("place"), of("colour"), of("drift")
    reading = scorer.read(pictures)
    likeness = (reading.identity @ reference(scorer, subject)).tolist()
    kinds = scorer.read(base_pictures[others[0]]).kinds
    change = np.abs(pictures[others[0]].astype(np.float32) - base_pictures[others[0]]) / 255
    spreads = [spread(pictures[i : i + k]) for i in places[0][::k]]
    identity = float(np.mean([likeness[i] for i in places[0]]))
    place = share([reading.places[i] for i in places[0]], places[1])
    return {
        "identity": identity,
        "place": place,
        "colour": share([reading.colours[i] for i in edits[0]], edits[1]),
        "colour_identity": float(np.mean([likeness[i] for i in edits[0]])),
        "drift": float(change.mean()),
        "kind_kept": share([reading.kinds[i] for i in others[0]], kinds),
        "diversity": None if spreads[0] is None else float(np.mean([s for s in spreads if s is not None])),
        "fidelity": (identity + place) / 2,
    }
