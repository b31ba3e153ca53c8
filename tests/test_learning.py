"""Does it learn? The demo's own training, judged by the toy world's scorer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from benchmarks.toyworld.autoencoder import round_trip
from benchmarks.toyworld.drawing import draw
from benchmarks.toyworld.scorer import load_scorer, subject_reference
from benchmarks.toyworld.subjects import SUBJECTS, photos, subject_places, true_pictures
from examples import demo
from lily_diffusers import lily_disabled, load_lily_weights

SUBJECT = demo.PHOTOS.name


def test_the_demos_photos_are_the_subjects() -> None:
    files = sorted(demo.PHOTOS.glob("*.png"))
    for file, picture in zip(files, photos(SUBJECT), strict=True):
        drawn = np.asarray(Image.open(file)).astype(int)
        assert np.abs(drawn - picture).mean() < 0.5, f"{file} is not what the world renders now; render it again"


def test_training_teaches_the_subject_and_keeps_the_prompt(tmp_path: Path) -> None:
    """On snow, where it has never been, the toy is itself: at least half-way from the base to the VAE's ceiling."""
    assert "snow" not in subject_places(SUBJECT)
    demo.train(tmp_path / "adapter", steps=demo.STEPS)
    pipe = StableDiffusionXLPipeline.from_pretrained(demo.BASE, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    load_lily_weights(pipe, tmp_path / "adapter")
    scorer = load_scorer()
    reference = subject_reference(scorer, SUBJECTS[SUBJECT])

    def similarity(pictures: np.ndarray) -> float:
        return (scorer.read(pictures).identity @ reference).mean().item()

    prompts = ["a photo of sks toy on snow"] * 8
    with lily_disabled(pipe):
        before = similarity(np.stack(draw(pipe, prompts)))
    drawn = np.stack(draw(pipe, prompts))
    after = similarity(drawn)
    with torch.no_grad():
        ceiling = similarity(round_trip(pipe.vae, true_pictures(SUBJECTS[SUBJECT], ["snow"] * 8, seed=3)[0]))
    places = scorer.read(drawn).places
    print(f"identity on snow: before {before:.3f}, after {after:.3f}, VAE ceiling {ceiling:.3f}; places {places}")
    assert after >= (before + ceiling) / 2, (before, after, ceiling)
    assert places.count("snow") >= 4, places
