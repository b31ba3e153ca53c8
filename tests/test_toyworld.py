"""The toy world: its pictures, its words, its subjects."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from benchmarks.toyworld.data import render_pictures
from benchmarks.toyworld.model import IDENTIFIER, PROMPT_TOKENS, make_pipeline, make_world_tokenizer, vocabulary
from benchmarks.toyworld.objects import BODIES, CLASSES, COLOURS, PATTERNS, can_wear, random_toy, toy_parts
from benchmarks.toyworld.places import EDGE, PLACES, texture
from benchmarks.toyworld.solids import REACH, SOLIDS, Paint, Part, trace
from benchmarks.toyworld.subjects import (
    SUBJECTS,
    TUNING,
    new_places,
    other_paints,
    other_shape,
    photos,
    subject_places,
    true_pictures,
)
from benchmarks.toyworld.world import SIZE, Scene, random_sample, random_scene, render

RED = Paint(COLOURS["red"], gloss=0.0)
FRONT = np.array([0, 0, 1], np.float32)


def ray_grid(edge: int = 81) -> np.ndarray:
    """Screen positions (2, n), -1 to 1."""
    return np.stack(np.meshgrid(np.linspace(-1, 1, edge), np.linspace(1, -1, edge))).reshape(2, -1).astype(np.float32)


@pytest.mark.parametrize(
    ("solid", "size", "area"),
    [
        ("ellipsoid", (0.5, 0.8, 0.3), np.pi * 0.5 * 0.8),
        ("box", (0.6, 0.4, 0.3), 4 * 0.6 * 0.4),
        ("frustum", (0.5, 0.6, 0.2), 0.8),
        ("ring", (0.6, 0.2), np.pi * (0.8**2 - 0.4**2)),
        ("capsule", (0.4, 0.3), 4 * 0.4 * 0.3 + np.pi * 0.3**2),
        ("dome", (0.7, 0.5, 0.7), np.pi * 0.7 * 0.5 / 2),
        ("cup", (0.5, 0.4, 0.1), 4 * 0.5 * 0.4),
        ("star", (0.9, 0.3), 5 * 0.9 * 0.42 * 0.9 * np.sin(np.pi / 5)),
    ],
)
def test_a_solid_covers_its_silhouette(solid: str, size: tuple[float, ...], area: float) -> None:
    screen = ray_grid()
    _, inside = trace([Part(solid, size, (0, 0, 0), RED)], screen, np.eye(3, dtype=np.float32), FRONT)
    assert inside.mean() * 4 == pytest.approx(area, rel=0.08)  # a ray counts as a hit from 0.02 away


def test_every_solid_is_checked() -> None:
    marks = test_a_solid_covers_its_silhouette.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {solid for solid, _, _ in marks} == set(SOLIDS)


def test_the_nearer_part_hides_the_farther() -> None:
    parts = [
        Part("box", (0.5, 0.5, 0.1), (0, 0, 0.3), RED),
        Part("box", (0.5, 0.5, 0.1), (0, 0, -0.3), Paint(COLOURS["blue"])),
    ]
    for order in itertools.permutations(parts):
        colour, inside = trace(list(order), np.zeros((2, 1), np.float32), np.eye(3, dtype=np.float32), FRONT)
        assert inside.all()
        assert colour[0, 0] > 3 * colour[2, 0]


def test_the_lit_side_is_brighter() -> None:
    ball = [Part("ellipsoid", (0.8, 0.8, 0.8), (0, 0, 0), RED)]
    screen = np.array([[-0.5, 0.5], [0, 0]], np.float32)
    light = np.array([-0.8, 0, 0.6], np.float32)
    colour, _ = trace(ball, screen, np.eye(3, dtype=np.float32), light)
    assert colour[0, 0] > 1.5 * colour[0, 1]


@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_a_pattern_shows_both_colours(pattern: str) -> None:
    paint = Paint(COLOURS["red"], pattern, COLOURS["blue"])
    p = np.random.default_rng(0).uniform(-1, 1, (3, 4000)).astype(np.float32)
    second = paint.at(p)[2] > 0.5
    assert 0.1 < second.mean() < 0.7


def test_a_scene_gives_the_same_picture_again_and_a_true_mask() -> None:
    sample = random_sample(np.random.default_rng(3))
    first, mask = render(sample.scene)
    second, _ = render(sample.scene)
    assert first.shape == (SIZE, SIZE, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)
    bare, _ = render(dataclasses.replace(sample.scene, parts=()))
    changed = (first.astype(int) != bare).any(-1)
    assert changed[mask > 0.5].mean() > 0.9
    assert 0.03 < mask.mean() < 0.7


def test_a_crop_is_a_window_of_the_canvas() -> None:
    """The object moves by the crop, pixel for pixel, and keeps its size."""
    scene = Scene(tuple(CLASSES["cube"](RED)), "snow", original=SIZE + 8, radius=20.0)
    left, right = (render(dataclasses.replace(scene, crop=(0, x)))[1] for x in (0, 8))
    np.testing.assert_allclose(left[:, 8:], right[:, :-8], atol=1e-6)


def test_size_conditioning_says_what_was_done() -> None:
    scenes = [random_sample(np.random.default_rng(i)).scene for i in range(300)]
    cropped = [scene for scene in scenes if scene.original > SIZE]
    enlarged = [scene for scene in scenes if scene.original < SIZE]
    assert 20 < len(cropped) < 80
    assert 10 < len(enlarged) < 60
    for scene in scenes:
        height, width, top, left, *target = scene.time_ids
        assert target == [SIZE, SIZE]
        assert height == width == scene.original
        assert 0 <= top <= max(0, height - SIZE)
        assert 0 <= left <= max(0, width - SIZE)

    def detail(scene: Scene) -> float:
        return float(np.abs(np.diff(render(scene)[0].astype(float), axis=1)).mean())

    for scene in enlarged[:8]:
        assert detail(scene) < detail(dataclasses.replace(scene, original=SIZE))


def test_places_differ_clearly() -> None:
    """Mean colour and its spread tell any two places apart."""
    stats = {place: texture(place, 0).reshape(-1, 3) for place in PLACES}
    for a, b in itertools.combinations(PLACES, 2):
        gap = np.abs(stats[a].mean(0) - stats[b].mean(0)).sum() + np.abs(stats[a].std(0) - stats[b].std(0)).sum()
        assert gap > 0.15, (a, b)
    assert texture("grass", 1).shape == (EDGE, EDGE, 3)


def test_captions_name_what_is_there_and_never_the_identifier() -> None:
    samples = [random_sample(np.random.default_rng([1, i])) for i in range(500)]
    assert not any(IDENTIFIER in sample.caption.split() for sample in samples)
    said = [sample.kind in sample.caption.replace(",", "").split() for sample in samples]
    assert np.mean(said) > 0.99  # a body 'ball' makes 'ball toy', which still says toy
    assert 0.3 < np.mean([sample.kind == "toy" for sample in samples]) < 0.5
    wordless = [sample for sample in samples if PLACES[sample.scene.place][0] not in sample.caption]
    assert 0.12 < len(wordless) / len(samples) < 0.28


def test_every_word_is_one_token_and_any_prompt_tokenises() -> None:
    tokenizer = make_world_tokenizer()
    for word in vocabulary():
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    for prompt in ("a teapot, ünder the sea 🫖", "", "sks"):
        ids = tokenizer(prompt).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == prompt.replace(",", " ,")
    captions = [random_sample(np.random.default_rng([2, i])).caption for i in range(2000)]
    assert max(map(len, tokenizer(captions).input_ids)) <= PROMPT_TOKENS - 2


def test_the_untrained_pipeline_draws(tmp_path: Path) -> None:
    pipe = make_pipeline()
    weights = sum(
        p.numel() for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2) for p in part.parameters()
    )
    assert weights * 2 <= 24e6  # bytes in fp16
    image = pipe("a red ball on grass", height=SIZE, width=SIZE, num_inference_steps=1).images[0]
    assert image.size == (SIZE, SIZE)


def test_rendering_goes_on_where_it_was(tmp_path: Path) -> None:
    first = render_pictures(tmp_path, 2000, workers=1)
    stamp = (tmp_path / "0000000.npz").stat().st_mtime_ns
    again = render_pictures(tmp_path, 2000, workers=1)
    assert (tmp_path / "0000000.npz").stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(first.pixels, again.pixels)
    sample = random_sample(np.random.default_rng([0, 7]))
    assert again.captions[7] == sample.caption
    np.testing.assert_array_equal(again.pixels[7], render(sample.scene)[0])
    shares = render(sample.scene)[1].reshape(16, 4, 16, 4).mean((1, 3))
    np.testing.assert_allclose(again.cover[7] / 255, shares, atol=0.003)
    with pytest.raises(ValueError, match="holds pictures of seed 0, not 1"):
        render_pictures(tmp_path, 2000, seed=1)


def test_subjects_have_five_photos_in_two_places_and_six_places_left() -> None:
    assert len(SUBJECTS) >= 14
    assert set(TUNING) < set(SUBJECTS)
    for name in SUBJECTS:
        assert not set(subject_places(name)) & set(new_places(name))
        assert len(new_places(name)) == 6
    assert photos("robot").shape == (5, SIZE, SIZE, 3)
    looks = {toy.shape + tuple(paint.colour for paint in toy.paints) for toy in SUBJECTS.values()}
    assert len(looks) == len(SUBJECTS)


def test_hard_negatives_share_what_they_say() -> None:
    for toy in SUBJECTS.values():
        assert other_shape(toy, 0).paints == toy.paints
        assert all(a != b for a, b in zip(other_shape(toy, 0).shape, toy.shape, strict=True))
        assert other_paints(toy, 0).shape == toy.shape
        assert other_paints(toy, 0).paints != toy.paints
    assert len({other_paints(toy, i).paints for i, toy in enumerate(SUBJECTS.values())}) == len(SUBJECTS)


def test_a_toy_stays_within_reach() -> None:
    rng = np.random.default_rng(0)
    screen = 1.6 * ray_grid(97)
    for _ in range(60):
        scene = random_scene(rng, toy_parts(random_toy(rng)), "snow")
        _, inside = trace(list(scene.parts), screen, scene.view, FRONT)
        assert np.abs(screen[:, inside]).max() < REACH
    assert {random_toy(rng).body for _ in range(200)} == set(BODIES)


def test_no_toy_is_said_to_wear_what_it_does_not_show() -> None:
    rng = np.random.default_rng(0)
    toys = [random_toy(rng) for _ in range(400)]
    assert all(can_wear(toy.body, toy.face) for toy in toys)
    belted = {toy.body for toy in toys if toy.face == "belt"}
    assert belted == set(BODIES) - {"box", "brick"}


def test_poses_differ_from_picture_to_picture() -> None:
    pictures, masks = true_pictures(SUBJECTS["robot"], ["snow"] * 3, seed=0)
    for a, b in itertools.combinations(range(3), 2):
        assert (pictures[a] != pictures[b]).mean() > 0.3
        assert np.abs(masks[a] - masks[b]).mean() > 0.02
    scene = random_scene(np.random.default_rng(0), [], "snow", plain=True)
    assert scene.original == SIZE
    assert scene.crop == (0, 0)
