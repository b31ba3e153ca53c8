"""The pictures that the base is trained on, rendered once into one folder.

Sample i depends on the seed and i alone, so that an interrupted rendering goes on where it was and
any number of processes gives the same bytes. May import `world` and what is above it, and `lily_diffusers`.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lily_diffusers.files import write_atomically

from .world import LATENT, SIZE, random_sample, render

Array = NDArray[Any]
_CHUNK = 2000


@dataclass(frozen=True)
class Pictures:
    """Rendered samples.

    Attributes:
        pixels: (n, 64, 64, 3) uint8.
        time_ids: (n, 6) int16, SDXL's size conditioning in pixels.
        cover: (n, 16, 16) uint8, how much of each latent cell the object covers, 0 to 255.
        captions: n sentences.
    """

    pixels: Array
    time_ids: Array
    cover: Array
    captions: list[str]

    def __getitem__(self, chosen: slice) -> Pictures:
        return Pictures(self.pixels[chosen], self.time_ids[chosen], self.cover[chosen], self.captions[chosen])


def to_tensor(pictures: Array) -> Tensor:
    """Turn pictures (n, h, w, 3) uint8 into a tensor (n, 3, h, w), -1 to 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def _render_chunk(seed: int, start: int, folder: Path) -> None:
    file = folder / f"{start:07d}.npz"
    if file.exists():
        return
    samples = [random_sample(np.random.default_rng([seed, i])) for i in range(start, start + _CHUNK)]
    drawn = [render(sample.scene) for sample in samples]
    masks = np.stack([mask for _, mask in drawn])
    cover = masks.reshape(_CHUNK, LATENT, SIZE // LATENT, LATENT, SIZE // LATENT).mean((2, 4))

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            np.savez(
                stream,
                pixels=np.stack([picture for picture, _ in drawn]),
                time_ids=np.array([sample.scene.time_ids for sample in samples], np.int16),
                cover=np.round(255 * cover).astype(np.uint8),
            )

    write_atomically(file, write)


def render_pictures(folder: Path, count: int, seed: int = 0, workers: int = 2) -> Pictures:
    """Render samples, or fetch those that are in the folder already; captions are cheap and drawn anew.

    Args:
        folder: where chunks of 2,000 samples are kept.
        count: samples; rounded up to whole chunks.
        seed: of the samples; another seed wants another folder.
        workers: processes.

    Raises:
        ValueError: if the folder holds pictures of another seed, or of a version that drew other samples.
    """
    mark = folder / "seed.json"
    if mark.exists() and json.loads(mark.read_text()) != seed:
        raise ValueError(f"{folder} holds pictures of seed {mark.read_text()}, not {seed}: name another folder.")
    if not mark.exists():
        write_atomically(mark, lambda path: path.write_text(json.dumps(seed)))
    starts = range(0, count, _CHUNK)
    began = time.monotonic()
    with ProcessPoolExecutor(workers) as pool:
        for done, _ in enumerate(pool.map(_render_chunk, *zip(*((seed, s, folder) for s in starts), strict=True)), 1):
            if done % 10 == 0:
                print(f"rendered {done * _CHUNK} of {count} ({time.monotonic() - began:.0f} s)", flush=True)
    chunks = [np.load(folder / f"{start:07d}.npz") for start in starts]
    samples = [random_sample(np.random.default_rng([seed, i])) for i in range(len(chunks) * _CHUNK)]
    time_ids = np.concatenate([chunk["time_ids"] for chunk in chunks])
    if any("cover" not in chunk for chunk in chunks) or (time_ids != [s.scene.time_ids for s in samples]).any():
        raise ValueError(f"{folder} holds pictures of an earlier version: remove it to render anew.")
    return Pictures(
        pixels=np.concatenate([chunk["pixels"] for chunk in chunks]).reshape(-1, SIZE, SIZE, 3),
        time_ids=time_ids,
        cover=np.concatenate([chunk["cover"] for chunk in chunks]),
        captions=[sample.caption for sample in samples],
    )
