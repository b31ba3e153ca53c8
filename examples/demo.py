"""The main job from end to end, offline: photos -> training -> adapter -> fresh pipeline -> pictures.

    python -m examples.demo --out runs/demo

It makes the tiny SDXL, trains on the example photos with the command that a user would type, loads the
adapter into a fresh pipeline and writes a sheet: the photos, the base's pictures and the same seeds with
the adapter. The tiny base has random weights and draws coloured noise; what the demo shows is that every
step works on this machine and that the adapter changes the pictures.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw, ImageFont, ImageOps

from examples.tiny_sdxl import SIZE, make_pipeline
from lily_diffusers import lily_disabled, load_lily_weights

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "examples" / "photos"
PROMPT = "a photo of sks teapot"
TILE = 160
"""Edge of a picture on the sheet (pixels)."""


def train(base: Path, out: Path, steps: int) -> None:
    """Run the training script on the example photos, showing its progress."""
    flags = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": PHOTOS,
        "instance_prompt": PROMPT,
        "output_dir": out,
        "resolution": SIZE,
        "train_batch_size": 4,
        "max_train_steps": steps,
        "checkpointing_steps": steps,
        "learning_rate": 3e-3,
        "r": 8,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "train_dreambooth_lily.py")]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    print("$", shlex.join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def draw(pipe: StableDiffusionXLPipeline, count: int) -> list[Image.Image]:
    """Draw the prompt with the seeds 0 to count - 1."""
    return [
        pipe(
            PROMPT,
            height=SIZE,
            width=SIZE,
            num_inference_steps=20,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        for seed in range(count)
    ]


def sheet(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Lay rows of pictures under their titles."""
    title, gap = 28, 6
    width = max(len(pictures) for pictures in rows.values()) * (TILE + gap) + gap
    result = Image.new("RGB", (width, len(rows) * (TILE + title + gap) + gap), "white")
    pen = ImageDraw.Draw(result)
    for row, (text, pictures) in enumerate(rows.items()):
        top = gap + row * (TILE + title + gap)
        pen.text((gap, top + 4), text, fill="black", font=ImageFont.load_default(16))
        for column, picture in enumerate(pictures):
            tile = ImageOps.fit(ImageOps.exif_transpose(picture), (TILE, TILE), Image.Resampling.BICUBIC)
            result.paste(tile, (gap + column * (TILE + gap), top + title))
    return result


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Train on the example photos with a tiny SDXL and draw before/after.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything the demo makes")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps")
    args = parser.parse_args()
    out = args.out.resolve()
    base = out / "tiny-sdxl"
    shutil.rmtree(out / "teapot", ignore_errors=True)  # of an earlier demo
    make_pipeline().save_pretrained(base)
    train(base, out / "teapot", args.steps)

    pipe = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    load_lily_weights(pipe, out / "teapot")
    photos: list[Image.Image] = [Image.open(path) for path in sorted(PHOTOS.glob("*.jpg"))]
    with lily_disabled(pipe):
        before = draw(pipe, len(photos))
    after = draw(pipe, len(photos))
    path = out / "before_after.png"
    sheet({"photos": photos, f"before: '{PROMPT}'": before, "after, the same seeds": after}).save(path)
    print(f"\nthe adapter is in {out / 'teapot'}\nthe before/after sheet is {path}")


if __name__ == "__main__":
    main()
