"""How far the scorer can be trusted: accuracy on held-out renders, retrieval, and bounds of identity.

    python -m benchmarks.toyworld.validity --base examples/toy-sdxl

The intervals are over the subjects. May import `scorer` and what is above it, and `benchmarks.intervals`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from benchmarks.intervals import Interval, interval

from .autoencoder import round_trip
from .data import to_tensor
from .drawing import OBJECTS, draw
from .objects import CLASSES, random_toy
from .places import PLACES
from .scorer import PLACE_NAMES, Scorer, load_scorer, subject_reference
from .subjects import SUBJECTS, new_places, other_paints, other_shape, true_pictures
from .train_scorer import change_one_part, melt
from .world import Array, random_sample, render

_SEED = 9_000_000_000


def accuracy(scorer: Scorer, count: int = 600) -> dict[str, float]:
    """Share of held-out renders whose place, kind and colour are read right."""
    samples = [random_sample(np.random.default_rng([_SEED, i]), toys=0.2) for i in range(count)]
    reading = scorer.read(np.stack([render(sample.scene)[0] for sample in samples]))

    def share(read: list[str], true: list[str]) -> float:
        pairs = [(a, b) for a, b in zip(read, true, strict=True) if b]
        return sum(a == b for a, b in pairs) / len(pairs)

    return {
        "place": share(reading.places, [sample.scene.place for sample in samples]),
        "kind": share(reading.kinds, [sample.kind for sample in samples]),
        "colour": share(reading.colours, [sample.colour if sample.kind != "toy" else "" for sample in samples]),
    }


def retrieval(scorer: Scorer, count: int = 200) -> float:
    """Share of toys whose second picture, elsewhere and in another pose, is nearest to their first among `count`."""
    toys = [random_toy(np.random.default_rng([_SEED, 1, i])) for i in range(count)]
    views = [
        np.concatenate(
            [true_pictures(toy, [PLACE_NAMES[(i + 3 * view) % 8]], 1000 * view + i)[0] for i, toy in enumerate(toys)]
        )
        for view in range(2)
    ]
    first, second = (scorer.read(view).identity for view in views)
    return ((second @ first.T).argmax(-1) == torch.arange(count)).float().mean().item()


def _melted(pictures: Array) -> Array:
    warped, _ = melt(to_tensor(pictures), torch.Generator().manual_seed(0))
    return ((warped + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def identity_bounds(
    scorer: Scorer, vae: AutoencoderKL | None = None, subjects: Sequence[str] = tuple(SUBJECTS)
) -> dict[str, Interval]:
    """Cosines to each subject's reference of what is, and is not, that subject, six pictures a subject.

    Args:
        scorer: that reads.
        vae: of the base, for its ceiling; None leaves that out.
        subjects: keys of `SUBJECTS`.

    Returns:
        Name of the bound -> interval over the subjects' means.
    """
    found: dict[str, list[float]] = {}
    names = list(SUBJECTS)
    for name in subjects:
        number, toy = names.index(name), SUBJECTS[name]
        reference = subject_reference(scorer, toy)
        places = new_places(name)
        true, _ = true_pictures(toy, places, seed=5)
        rng = np.random.default_rng([_SEED, 2, number])
        looks = {
            "true renders (upper bound)": true,
            "one part changed": true_pictures(change_one_part(toy, rng), places, seed=5)[0],
            "same paints, another shape": true_pictures(other_shape(toy, number), places, seed=5)[0],
            "same shape, other paints": true_pictures(other_paints(toy, number), places, seed=5)[0],
            "melted: right paints, no shape": _melted(true),
            "another subject (confusion)": true_pictures(SUBJECTS[names[number - 1]], places, seed=5)[0],
        }
        if vae is not None:
            looks["true renders through the VAE (ceiling)"] = round_trip(vae, true)
        for look, pictures in looks.items():
            found.setdefault(look, []).append((scorer.read(pictures).identity @ reference).mean().item())
    return {look: interval(means) for look, means in found.items()}


def untrained_identity(scorer: Scorer, pipe: StableDiffusionXLPipeline) -> Interval:
    """Cosine of what the base draws for 'sks toy' in each subject's new places: interval over the subjects' means."""
    means = []
    for number, (name, toy) in enumerate(SUBJECTS.items()):
        prompts = [f"a photo of sks toy {PLACES[place][0]}" for place in new_places(name)]
        reading = scorer.read(np.stack(draw(pipe, prompts, seed=100 * number)))
        means.append((reading.identity @ subject_reference(scorer, toy)).mean().item())
    return interval(means)


def prompt_accuracy(scorer: Scorer, pipe: StableDiffusionXLPipeline) -> tuple[float, dict[str, float]]:
    """How often the base draws what it is asked for: every object of `OBJECTS` in every place.

    Returns:
        Share of places read right; share of right kinds by object of the prompt.
    """
    pairs = [(what, place) for what in OBJECTS for place in PLACES]
    reading = scorer.read(np.stack(draw(pipe, [f"a photo of a {what} {PLACES[place][0]}" for what, place in pairs])))
    places = sum(read == place for read, (_, place) in zip(reading.places, pairs, strict=True)) / len(pairs)
    kinds: dict[str, list[bool]] = {}
    for read, (what, _) in zip(reading.kinds, pairs, strict=True):
        asked = next((kind for kind in CLASSES if kind in what.split()), "toy")
        kinds.setdefault(asked, []).append(read == asked)
    return places, {kind: sum(right) / len(right) for kind, right in kinds.items()}


def report(scorer: Scorer, base: Path | None) -> str:
    """Put everything into Markdown.

    Args:
        scorer: that is judged.
        base: folder of the toy SDXL, or None for the scorer alone.
    """
    pipe = None
    if base is not None:
        pipe = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
    lines = ["Held-out renders read right: " + ", ".join(f"{k} {v:.1%}" for k, v in accuracy(scorer).items()) + "."]
    lines += [f"Retrieval@1 among 200 toys, another pose in another place: {retrieval(scorer):.1%}.", ""]
    bounds = identity_bounds(scorer, None if pipe is None else pipe.vae)
    if pipe is not None:
        bounds["base before training (lower bound)"] = untrained_identity(scorer, pipe)
    lines += [
        f"| cosine to the subject's reference, {len(SUBJECTS)} subjects | mean | 95 % interval |",
        "|---|---:|---:|",
    ]
    lines += [f"| {look} | {bound.mean:.3f} | ± {bound.half:.3f} |" for look, bound in bounds.items()]
    if pipe is not None:
        places, kinds = prompt_accuracy(scorer, pipe)
        total = sum(kinds.values()) / len(kinds)
        worst = ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items() if share < 1)
        lines += [
            "",
            f"The base's own pictures read right: places {places:.1%}, objects {total:.1%} ({worst or 'all'}).",
        ]
    return "\n".join(lines)


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description="Print how far the toy world's scorer can be trusted.")
    parser.add_argument("--base", type=Path, help="folder of the toy SDXL: adds the VAE's bound and the base's")
    torch.set_num_threads(1)
    print(report(load_scorer(), parser.parse_args().base))


if __name__ == "__main__":
    main()
