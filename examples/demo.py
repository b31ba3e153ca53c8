"""The main job from end to end, offline: photos -> training -> adapter -> fresh pipeline -> pictures.

    python -m examples.demo --out runs/demo

It trains on five photos of a toy with the command that a user would type, loads the adapter into a fresh
pipeline and writes a sheet: the photos, and one prompt in six places that the photos do not show, drawn
before and after with the same seeds. The base is `examples/toy-sdxl`, a tiny SDXL that has learnt a small
rendered world (`benchmarks/toyworld`).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw, ImageFont

from lily_diffusers import lily_disabled, load_lily_weights

ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "toy-sdxl"
PHOTOS = ROOT / "examples" / "robot"
PROMPT = "a photo of sks toy"
PLACES = ("on snow", "on sand", "on grass", "on wood", "in the night sky", "in front of a brick wall")
SIZE = 64
"""Edge of the toy SDXL's pictures (pixels)."""
STEPS = 400
"""Optimiser steps of the training."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""A second thread trains half as fast again on a quiet machine, and five times slower on a busy one (docs/LOG.md)."""
TILE = 152
"""Edge of a picture on the sheet (pixels)."""


def train(out: Path, steps: int) -> None:
    """Run the training script on the photos, showing its progress."""
    flags = {
        "pretrained_model_name_or_path": BASE,
        "instance_data_dir": PHOTOS,
        "instance_prompt": PROMPT,
        "output_dir": out,
        "resolution": SIZE,
        "train_batch_size": 5,
        "max_train_steps": steps,
        "checkpointing_steps": steps,
        "learning_rate": 5e-4,
        "r": 16,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "train_dreambooth_lily.py")]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    print("$", shlex.join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True, env=ONE_THREAD | os.environ)


def draw(pipe: StableDiffusionXLPipeline, seed: int) -> list[Image.Image]:
    """Draw the prompt once in every place, all from the same seed."""
    drawn = pipe(
        [f"{PROMPT} {place}" for place in PLACES],
        height=SIZE,
        width=SIZE,
        num_inference_steps=20,
        guidance_scale=2.5,
        generator=[torch.Generator().manual_seed(seed) for _ in PLACES],
    )
    images: list[Image.Image] = drawn.images
    return images


def sheet(rows: list[tuple[str, list[Image.Image]]], columns: tuple[str, ...]) -> Image.Image:
    """Lay rows of pictures under their titles; the columns' names stand over the second row."""
    title, gap = 28, 6
    width = max(len(pictures) for _, pictures in rows) * (TILE + gap) + gap
    result = Image.new("RGB", (width, len(rows) * (TILE + gap) + gap + title * (len(rows) + 1)), "white")
    pen, top = ImageDraw.Draw(result), gap
    for row, (text, pictures) in enumerate(rows):
        pen.text((gap, top + 4), text, fill="black", font=ImageFont.load_default(16))
        top += title
        if row == 1:
            for column, name in enumerate(columns):
                pen.text((gap + column * (TILE + gap), top), name, fill="dimgray", font=ImageFont.load_default(13))
            top += title - 8
        for column, picture in enumerate(pictures):
            tile = picture.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)
            result.paste(tile, (gap + column * (TILE + gap), top))
        top += TILE + gap
    return result.crop((0, 0, width, top))


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Teach the toy SDXL a toy from five photos and draw before/after.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything the demo makes")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps")
    args = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    out = args.out.resolve()
    adapter = out / f"{PHOTOS.name}-lily"  # a name that no folder of photos has
    shutil.rmtree(adapter, ignore_errors=True)  # of an earlier demo
    began = time.monotonic()
    train(adapter, args.steps)
    print(f"trained in {time.monotonic() - began:.0f} s", flush=True)

    pipe = StableDiffusionXLPipeline.from_pretrained(BASE, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    load_lily_weights(pipe, adapter)
    photos: list[Image.Image] = [Image.open(path) for path in sorted(PHOTOS.glob("*.png"))]
    with lily_disabled(pipe):
        before = draw(pipe, seed=0)
    rows = [("five photos", photos), (f"before: '{PROMPT} …'", before)]
    rows += [(f"after {args.steps} steps, seed {seed}", draw(pipe, seed)) for seed in (0, 1)]
    path = out / "before_after.png"
    sheet(rows, PLACES).save(path)
    print(f"\nthe adapter is in {adapter}\nthe sheet of photos, before and after is {path}")


if __name__ == "__main__":
    main()
