"""Photos, and which crop of which photo every example of every step sees.

Everything random is drawn from a generator keyed by (seed, step, example), where an example is a place
in the global batch. A result then depends neither on the number of processes nor on how a batch is split
into accumulation steps, and resuming needs no stored random state.

Imports `config` of this package; Pillow and torch.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .config import TrainingConfig, TrainingError

logger = logging.getLogger(__name__)

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})

_UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".jxl", ".psd"})
"""Pictures, too, but Pillow cannot read them."""

MAX_ASPECT = 8
"""Photos longer than this times their width are refused: one crop says little of them, and resized they fill memory."""


@dataclass(frozen=True)
class Photo:
    """One photo, upright, RGB, resized so that its short side is the training resolution.

    Attributes:
        path: where it came from.
        pixels: the resized picture.
        original_size: (height, width) of the upright photo before resizing, in pixels.
    """

    path: Path
    pixels: Image.Image
    original_size: tuple[int, int]


@dataclass(frozen=True)
class Crop:
    """A square cut from a resized photo, after it was mirrored or not.

    Attributes:
        flip: whether the photo is mirrored first.
        top, left: the square's corner in the resized (mirrored) photo, in pixels.
    """

    flip: bool
    top: int
    left: int


def keyed_generator(*key: object) -> torch.Generator:
    """Make a CPU generator whose stream depends on the key and on nothing else."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def find_photos(folder: str | Path) -> list[Path]:
    """List the photos of a folder by name; other files, dot files and folders are ignored.

    Raises:
        TrainingError: if the folder is missing, or holds no photo.
    """
    folder = Path(folder)
    if folder.is_file():
        raise TrainingError(f"--instance_data_dir={folder} is a file; pass the folder that it is in.")
    if not folder.is_dir():
        raise TrainingError(
            f"--instance_data_dir={folder} is not a folder; make it and put 3 to 30 photos of the subject in it."
        )
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    photos = [file for file in files if file.suffix.lower() in PHOTO_SUFFIXES]
    if not photos:
        raise TrainingError(
            f"--instance_data_dir={folder} holds no photos (looked for {', '.join(sorted(PHOTO_SUFFIXES))}); "
            "put 3 to 30 there."
        )
    if len(photos) < len(files):
        ignored = [file for file in files if file not in set(photos)]
        logger.info("ignored in %s, not photos: %s", folder, ", ".join(file.name for file in ignored))
        unread = [file.name for file in ignored if file.suffix.lower() in _UNREAD_SUFFIXES]
        if unread:
            logger.warning("ignored in %s, convert them to JPEG to train on them: %s", folder, ", ".join(unread))
    return photos


def load_photos(folder: str | Path, resolution: int) -> list[Photo]:
    """Read all photos of a folder, upright and in RGB.

    Args:
        folder: `--instance_data_dir`.
        resolution: short side of the result, in pixels.

    Raises:
        TrainingError: naming every file that cannot be read, or that there are none.
    """
    photos, broken = [], []
    for path in find_photos(folder):
        try:
            photos.append(load_photo(path, resolution))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            broken.append(f"{path} ({error})")
    if broken:
        raise TrainingError(
            f"cannot read {'; '.join(broken)}. Remove or replace {'it' if len(broken) == 1 else 'them'}."
        )
    return photos


def load_photo(path: Path, resolution: int) -> Photo:
    """Read one photo: turn it upright by its EXIF tag, convert it to RGB, resize its short side.

    Raises:
        OSError, ValueError: if it is not a picture, is truncated, is a long strip, or has a mode without a
            known range.
    """
    with warnings.catch_warnings(), Image.open(path) as file:
        warnings.simplefilter("ignore")  # Pillow warns of harmless oddities in EXIF and palette data
        file.load()
        upright = to_rgb(ImageOps.exif_transpose(file))
    width, height = upright.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"a strip of {width}×{height} pixels; crop it to {MAX_ASPECT}:1 or less")
    scale = resolution / min(width, height)
    if scale > 1:
        logger.warning(
            "%s is only %d×%d pixels and is enlarged to %d; larger photos train better", path, width, height, resolution
        )
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    return Photo(path, upright.resize(size, Image.Resampling.LANCZOS), (height, width))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB: 16-bit is scaled, transparency is laid on white.

    Raises:
        ValueError: for floating-point pictures, whose range is not known.
    """
    if image.mode == "F":
        raise ValueError("a floating-point picture; save it with 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        eight_bit = values / 257 if values.max(initial=0) > 255 else values
        image = Image.fromarray(eight_bit.round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def random_crop(photo: Photo, config: TrainingConfig, generator: torch.Generator) -> Crop:
    """Draw a crop as the augmentation flags allow; always the same number of draws."""
    width, height = photo.pixels.size
    flip, top, left = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    rows, columns = height - config.resolution, width - config.resolution
    if config.center_crop:
        return Crop(config.random_flip and flip < 0.5, rows // 2, columns // 2)
    return Crop(config.random_flip and flip < 0.5, int(top * (rows + 1)), int(left * (columns + 1)))


def crop_variants(photo: Photo, index: int, config: TrainingConfig) -> list[Crop]:
    """List the crops of a photo that the cache holds: as few as the augmentation flags can tell apart.

    A photo that can be cut in only one way has one crop, otherwise `--crop_variants` random ones;
    mirroring doubles them.
    """
    width, height = photo.pixels.size
    fixed = config.center_crop or (width == config.resolution and height == config.resolution)
    generator = keyed_generator(config.seed, "crop variants", index)
    crops = [random_crop(photo, config, generator) for _ in range(1 if fixed else config.crop_variants)]
    flips = (False, True) if config.random_flip else (False,)
    return list(dict.fromkeys(Crop(flip, crop.top, crop.left) for crop in crops for flip in flips))


def cut(photo: Photo, crop: Crop, resolution: int) -> Tensor:
    """Cut a crop out of a photo.

    Returns:
        pixel_values: (3, resolution, resolution), float32 in [-1, 1].
    """
    image = ImageOps.mirror(photo.pixels) if crop.flip else photo.pixels
    image = image.crop((crop.left, crop.top, crop.left + resolution, crop.top + resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def time_ids(photo: Photo, crop: Crop, resolution: int) -> Tensor:
    """SDXL's size conditioning of one example: original size, crop corner, target size.

    Returns:
        (6,), float32: original height and width, top, left, target height and width, in pixels.
    """
    return torch.tensor([*photo.original_size, crop.top, crop.left, resolution, resolution], dtype=torch.float32)


def photo_of(seed: int, example: int, photos: int) -> int:
    """Say which photo the run's `example`-th example shows: each epoch is a fresh shuffle of all photos.

    Args:
        seed: of the run.
        example: counted over the whole run and all processes, from 0.
        photos: how many there are.
    """
    epoch, place = divmod(example, photos)
    return int(torch.randperm(photos, generator=keyed_generator(seed, "order", epoch))[place])
