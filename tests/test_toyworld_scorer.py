"""The toy world's scorer reads what is there, and tells a toy from its nearest relatives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from benchmarks.toyworld.data import to_tensor
from benchmarks.toyworld.objects import random_toy, toy_parts
from benchmarks.toyworld.scorer import Scorer, crop_object, load_scorer, save_scorer, subject_reference
from benchmarks.toyworld.subjects import SUBJECTS, new_places, other_paints, other_shape, true_pictures
from benchmarks.toyworld.train_scorer import attract, change_one_part, family, melt, render_labelled, training_loss
from benchmarks.toyworld.validity import accuracy, identity_bounds, retrieval
from lily_diffusers.training.data import keyed_generator


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    """The committed scorer."""
    return load_scorer()


def test_it_reads_held_out_renders(scorer: Scorer) -> None:
    right = accuracy(scorer, count=150)
    assert right["place"] > 0.97
    assert right["kind"] > 0.93
    assert right["colour"] > 0.93
    assert retrieval(scorer, count=40) > 0.9


def test_it_finds_the_object(scorer: Scorer) -> None:
    pictures, masks = true_pictures(SUBJECTS["teapot"], new_places("teapot"), seed=1)
    with torch.no_grad():
        found = scorer(to_tensor(pictures)).mask.sigmoid()[:, 0] > 0.5
    true = torch.nn.functional.avg_pool2d(torch.from_numpy(masks), 2) > 0.5
    overlap = (found & true).sum((1, 2)) / (found | true).sum((1, 2))
    assert overlap.min() > 0.75


def test_a_crop_holds_the_object_and_nothing_of_the_place() -> None:
    pictures, mask = torch.full((1, 3, 64, 64), -1.0), torch.zeros(1, 1, 64, 64)
    pictures[:, :, 10:30, 40:50] = 1.0
    mask[:, :, 10:30, 40:50] = 1.0
    crop = crop_object(pictures, mask)
    inside = crop[:, 3] > 0.5
    assert 0.35 < inside.float().mean() < 0.55  # 20 × 10 px in a square of 20 × 1.08
    assert (crop[:, 0][inside] > 0.5).all()
    assert (crop[:, 0][crop[:, 3] == 0] == 0).all()


def test_relatives_score_below_the_subject(scorer: Scorer) -> None:
    gaps = []
    for name in ("teapot", "robot", "toy05", "toy09"):
        toy = SUBJECTS[name]
        reference = subject_reference(scorer, toy, count=1)

        def score(other, name=name, reference=reference) -> float:
            return (scorer.read(true_pictures(other, new_places(name), 5)[0]).identity @ reference).mean().item()

        assert score(toy) > 0.85
        gaps.append(score(toy) - max(score(other_shape(toy, 0)), score(other_paints(toy, 0))))
    assert min(gaps) > 0.2


def test_the_bounds_without_a_base(scorer: Scorer) -> None:
    bounds = identity_bounds(scorer)
    assert all(bound.n == len(SUBJECTS) for bound in bounds.values())
    mean = {look: bound.mean for look, bound in bounds.items()}
    assert mean["true renders (upper bound)"] == max(mean.values())
    assert mean["another subject (confusion)"] < 0.3


def test_a_picture_of_another_size_is_refused(scorer: Scorer) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 32, 32, 3\)"):
        scorer.read(np.zeros((2, 32, 32, 3), np.uint8))


def test_weights_survive_their_file(tmp_path) -> None:
    torch.manual_seed(0)
    one = Scorer().eval()
    save_scorer(one, tmp_path / "scorer.safetensors")
    two = load_scorer(tmp_path / "scorer.safetensors")
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    torch.testing.assert_close(one.read(picture).identity, two.read(picture).identity, atol=5e-3, rtol=0)


def test_melted_toys_only_repel() -> None:
    """The loss falls when two views come together and rises when a melted picture does."""

    def loss(view: float, melted: float) -> float:
        angles = torch.tensor([0.0, view, melted])
        return attract(torch.stack([angles.cos(), angles.sin()], -1), torch.tensor([4, 4, -1])).item()

    assert loss(0.1, 2.0) < loss(1.0, 2.0)
    assert loss(0.1, 2.0) < loss(0.1, 0.2)


def test_melting_keeps_the_colours_and_moves_the_shape() -> None:
    pictures = to_tensor(true_pictures(SUBJECTS["robot"], ["snow", "wood"], 0)[0])
    melted, grid = melt(pictures, torch.Generator().manual_seed(0))
    assert grid.shape == (2, 64, 64, 2)
    assert (melted - pictures).abs().mean() > 0.1
    assert (melted.mean((2, 3)) - pictures.mean((2, 3))).abs().max() < 0.15


def test_a_familys_members_differ_pairwise() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        members = family(rng)
        assert all(a != b for a, b in itertools.combinations(members, 2))
        toy = random_toy(rng)
        assert sum(a != b for a, b in zip(change_one_part(toy, rng).shape, toy.shape, strict=True)) == 1
    boxes = [toy for toy in (random_toy(rng) for _ in range(300)) if toy.body in ("box", "brick")]
    assert all(toy_parts(change_one_part(toy, rng)) != toy_parts(toy) for toy in boxes)


def test_training_lowers_the_loss() -> None:
    data = render_labelled(families=10, others=6, workers=1)
    assert len(data.pixels) == 16 * 16
    torch.manual_seed(0)
    scorer = Scorer().train()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=2e-3)
    losses = []
    for step in range(10):
        loss = training_loss(scorer, data, 10, keyed_generator(0, step % 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-2:]) < 0.85 * sum(losses[:2])
