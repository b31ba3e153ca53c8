"""Photos of every kind, crops, caches and the keyed draw of batches."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from lily_diffusers.training.cache import CachedLatents, LiveLatents, encode, encode_prompts, scale_latents
from lily_diffusers.training.config import TrainingConfig, TrainingError
from lily_diffusers.training.data import (
    Crop,
    crop_variants,
    cut,
    find_photos,
    keyed_generator,
    load_photo,
    load_photos,
    photo_of,
    random_crop,
    time_ids,
)
from lily_diffusers.training.loss import Batch, denoising_loss, draw_batch, training_target

RED, BLUE = (200, 30, 20), (20, 40, 190)


def two_tone(width: int = 96, height: int = 64) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def options(folder: Path, **more) -> TrainingConfig:
    values = {"instance_prompt": "a photo of sks toy", "resolution": 64, "instance_data_dir": str(folder)}
    return TrainingConfig(**{"pretrained_model_name_or_path": "unused"} | values | more)


def corner_colours(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.asarray(image).astype(int)
    return pixels[4, 4], pixels[-5, -5]


def save_as(kind: str, path: Path) -> Path:
    """Save the two-tone picture in one of the ways that photos come."""
    image = two_tone()
    if kind == "exif":  # stored lying on its side, with a tag that says so
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".jpg"), exif=exif, quality=95)
        return path.with_suffix(".jpg")
    if kind == "cmyk":
        image.convert("CMYK").save(path.with_suffix(".jpg"), quality=95)
        return path.with_suffix(".jpg")
    if kind == "palette":
        image.quantize(16).save(path)
    elif kind == "rgba":
        image.putalpha(255)
        image.save(path)
    elif kind == "greyscale":
        image.convert("L").save(path)
    elif kind == "16-bit":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
    else:
        image.save(path)
    return path


@pytest.mark.parametrize("kind", ["rgb", "exif", "cmyk", "palette", "rgba"])
def test_colour_photos_of_every_kind_come_out_upright_and_right(tmp_path: Path, kind: str) -> None:
    photo = load_photo(save_as(kind, tmp_path / "photo.png"), 64)
    assert photo.pixels.mode == "RGB" and photo.pixels.size == (96, 64) and photo.original_size == (64, 96)
    first, last = corner_colours(photo.pixels)
    assert np.abs(first - RED).max() < 12 and np.abs(last - BLUE).max() < 12


@pytest.mark.parametrize("kind", ["greyscale", "16-bit"])
def test_grey_photos_keep_their_range(tmp_path: Path, kind: str) -> None:
    photo = load_photo(save_as(kind, tmp_path / "photo.png"), 64)
    grey = np.asarray(two_tone().convert("L").convert("RGB")).astype(int)
    assert np.abs(np.asarray(photo.pixels).astype(int) - grey).max() <= 1


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = two_tone()
    image.putalpha(0)
    image.save(tmp_path / "clear.png")
    assert corner_colours(load_photo(tmp_path / "clear.png", 64).pixels)[0].tolist() == [255, 255, 255]


def test_files_that_are_not_photos_are_ignored_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    two_tone().save(tmp_path / "b.png")
    two_tone().save(tmp_path / "a.JPG", format="jpeg")
    (tmp_path / "notes.txt").write_text("not a photo")
    (tmp_path / ".hidden.png").write_text("not a photo")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "folder.png").mkdir()
    with caplog.at_level(logging.INFO):
        assert [path.name for path in find_photos(tmp_path)] == ["a.JPG", "b.png"]
    assert "notes.txt" in caplog.text


def test_pictures_that_pillow_cannot_read_are_not_dropped_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_tone().save(tmp_path / "a.jfif", format="jpeg")
    (tmp_path / "IMG_0001.HEIC").write_bytes(b"heic")
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in find_photos(tmp_path)] == ["a.jfif"]
    assert "convert them to JPEG to train on them: IMG_0001.HEIC" in caplog.text


def test_strips_are_refused(tmp_path: Path) -> None:
    two_tone(900, 100).save(tmp_path / "strip.png")
    with pytest.raises(TrainingError, match=r"strip\.png \(a strip of 900×100 pixels; crop it to 8:1 or less\)"):
        load_photos(tmp_path, 64)


def test_a_folder_without_photos_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=f"{tmp_path} holds no photos .* put 3 to 30 there"):
        load_photos(tmp_path, 64)
    with pytest.raises(TrainingError, match="missing is not a folder"):
        load_photos(tmp_path / "missing", 64)


def test_all_corrupt_photos_are_named_together(tmp_path: Path) -> None:
    two_tone().save(tmp_path / "good.png")
    two_tone().save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:300])
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(TrainingError, match=r"cannot read .*cut\.jpg .*text\.png .*Remove or replace them"):
        load_photos(tmp_path, 64)


def test_small_photos_are_enlarged_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    two_tone(32, 16).save(tmp_path / "small.png")
    assert load_photo(tmp_path / "small.png", 64).pixels.size == (128, 64)
    assert "is only 32×16 pixels" in caplog.text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"resolution": 1020}, "--resolution=1020 is not divisible by 8.*use 1024|use 1016"),
        ({"train_batch_size": 0}, "--train_batch_size=0 must be at least 1"),
        ({"learning_rate": 0.0}, "--learning_rate=0.0"),
        ({"instance_prompt": " "}, "--instance_prompt is empty"),
        ({"checkpoints_total_limit": 0}, "--checkpoints_total_limit=0"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, change: dict, sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        options(tmp_path, **change)


def test_size_conditioning_is_the_originals_height_first(tmp_path: Path) -> None:
    two_tone(192, 100).save(tmp_path / "photo.png")
    photo = load_photo(tmp_path / "photo.png", 64)
    assert time_ids(photo, Crop(False, 3, 7), 64).tolist() == [100, 192, 3, 7, 64, 64]


def test_cutting_mirrors_first(tmp_path: Path) -> None:
    two_tone().save(tmp_path / "photo.png")
    photo = load_photo(tmp_path / "photo.png", 64)
    left, mirrored = (cut(photo, Crop(flip, 0, 0), 64) for flip in (False, True))
    assert left.shape == (3, 64, 64) and left.min() >= -1 and left.max() <= 1
    red, blue = (torch.tensor(colour) / 127.5 - 1 for colour in (RED, BLUE))
    torch.testing.assert_close(left[:, 0, 0], red)
    torch.testing.assert_close(mirrored[:, 0, 0], blue)


def test_the_cache_holds_as_many_variants_as_the_flags_can_tell_apart(tmp_path: Path) -> None:
    two_tone(64, 64).save(tmp_path / "a.png")
    two_tone(128, 64).save(tmp_path / "b.png")
    square, wide = load_photos(tmp_path, 64)

    def count(photo, **flags) -> int:
        return len(crop_variants(photo, 0, options(tmp_path, crop_variants=5, **flags)))

    assert count(square) == count(wide, center_crop=True) == 1
    assert count(square, random_flip=True) == count(wide, center_crop=True, random_flip=True) == 2
    assert count(wide) == 5 and count(wide, random_flip=True) == 10


def test_random_crops_reach_both_edges_and_stay_inside(tmp_path: Path) -> None:
    two_tone(70, 64).save(tmp_path / "photo.png")
    photo = load_photo(tmp_path / "photo.png", 64)
    generator = keyed_generator("test")
    crops = [random_crop(photo, options(tmp_path, random_flip=True), generator) for _ in range(300)]
    assert {crop.left for crop in crops} == set(range(7)) and {crop.top for crop in crops} == {0}
    assert {crop.flip for crop in crops} == {False, True}


def test_every_epoch_shows_every_photo_once_in_a_new_order() -> None:
    epochs = [[photo_of(0, 7 * epoch + i, 7) for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


class TestBatches:
    """Batches drawn from a real VAE's latents."""

    @pytest.fixture
    def photos(self, tmp_path: Path):
        for i in range(3):
            two_tone(80 + 8 * i, 64).save(tmp_path / f"{i}.png")
        return load_photos(tmp_path, 64)

    @pytest.fixture
    def vae(self, tiny_sdxl_dir: Path) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(tiny_sdxl_dir, subfolder="vae")

    def batch(self, source, vae, examples, step: int = 3, seed: int = 0) -> Batch:
        return draw_batch(
            source, photos=3, seed=seed, step=step, examples=examples, global_batch=4, train_timesteps=1000,
            vae_config=vae.config, device=torch.device("cpu"),
        )  # fmt: skip

    @pytest.mark.parametrize("cached", [True, False])
    def test_an_example_does_not_depend_on_how_the_batch_is_split(
        self, photos, vae, tmp_path: Path, cached: bool
    ) -> None:
        config = options(tmp_path, random_flip=True)
        source = CachedLatents(photos, vae, config) if cached else LiveLatents(photos, vae, config)
        whole = self.batch(source, vae, range(4))
        parts = [self.batch(source, vae, [i]) for i in range(4)]
        for name in ("latents", "noise", "timesteps", "time_ids"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name

    def test_sampling_noise_and_crops_stay_fresh(self, photos, vae, tmp_path: Path) -> None:
        source = CachedLatents(photos, vae, options(tmp_path))
        batches = [self.batch(source, vae, range(4), step) for step in range(20)]
        latents = torch.cat([batch.latents for batch in batches])
        assert len({tuple(latent.flatten().tolist()) for latent in latents}) == 80
        assert len({tuple(ids.tolist()) for batch in batches for ids in batch.time_ids}) > 6
        other_seed = self.batch(source, vae, range(4), 0, seed=1)
        assert not torch.equal(other_seed.noise, batches[0].noise)

    def test_cached_latents_are_the_vaes_distribution(self, photos, vae, tmp_path: Path) -> None:
        source = CachedLatents(photos, vae, options(tmp_path, center_crop=True))
        pixels = cut(photos[1], Crop(False, 0, 12), 64)[None]
        with torch.no_grad():
            distribution = vae.encode(pixels).latent_dist
        torch.testing.assert_close(source.variants[1][0].mean, distribution.mean[0])
        torch.testing.assert_close(source.variants[1][0].std, distribution.std[0])
        assert source.variants[1][0].std.min() > 0

    def test_latents_of_a_broken_vae_are_named(self, photos, vae, tmp_path: Path) -> None:
        with torch.no_grad():
            vae.quant_conv.weight.fill_(float("nan"))
        with pytest.raises(TrainingError, match=r"latents of .*0\.png are not finite in torch\.float32"):
            encode(vae, photos[0], Crop(False, 0, 0), 64)


def test_latents_are_scaled_as_the_vae_says(tiny_sdxl_dir: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_sdxl_dir, subfolder="vae")
    ones = torch.ones(1, 4, 2, 2)
    torch.testing.assert_close(scale_latents(vae.config, ones), ones * vae.config.scaling_factor)
    vae.register_to_config(latents_mean=[1.0, 0.0, 0.0, 0.0], latents_std=[2.0] * 4, scaling_factor=0.5)
    assert scale_latents(vae.config, ones)[0, :, 0, 0].tolist() == [0, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_targets(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    g = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    batch = Batch(latents, noise, torch.tensor([10, 900]), torch.zeros(2, 6))
    a = scheduler.alphas_cumprod[batch.timesteps].view(2, 1, 1, 1)
    expected = noise if kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
    torch.testing.assert_close(training_target(scheduler, batch), expected)


def test_unknown_prediction_types_are_named() -> None:
    batch = Batch(*[torch.zeros(1)] * 4)
    with pytest.raises(TrainingError, match="prediction_type='sample'"):
        training_target(DDPMScheduler(prediction_type="sample"), batch)


def test_prompts_are_encoded_as_the_pipeline_does(tiny_sdxl_dir: Path, tmp_path: Path) -> None:
    config = options(tmp_path, pretrained_model_name_or_path=str(tiny_sdxl_dir))
    embeds = encode_prompts(config, {"a duck", ""}, torch.device("cpu"), torch.float32)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_dir, add_watermarker=False)
    expected, negative, pooled, _ = pipe.encode_prompt("a duck")
    assert torch.equal(embeds["a duck"].prompt_embeds, expected) and torch.equal(embeds["a duck"].pooled, pooled)
    assert torch.equal(embeds["a duck"].negative_prompt_embeds, negative)
    assert not negative.any()  # SDXL's own negative, and not the encoded empty prompt
    assert not torch.equal(embeds[""].prompt_embeds, expected)


def test_a_base_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = options(tmp_path, pretrained_model_name_or_path=str(tmp_path / "nothing"))
    with pytest.raises(
        TrainingError, match=r"cannot load --pretrained_model_name_or_path=.*nothing: it is no folder here"
    ):
        encode_prompts(config, {"a duck"}, torch.device("cpu"), torch.float32)


def test_sizes_reach_the_unet_unrounded_in_half_precision(unet: UNet2DConditionModel) -> None:
    seen: list[torch.Tensor] = []
    unet.to(torch.bfloat16)
    unet.add_time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sizes = torch.tensor([[1365.0, 3001.0, 341.0, 0.0, 1024.0, 1024.0]])
    batch = Batch(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.tensor([5]), sizes)
    prompt = torch.zeros(1, 7, 48, dtype=torch.bfloat16)
    denoising_loss(unet, DDPMScheduler(), batch, prompt, torch.zeros(1, 32, dtype=torch.bfloat16))
    assert seen[0].tolist() == sizes[0].tolist()
    # what the cast would have done
    embed = unet.add_time_proj
    rounded = sizes.to(torch.bfloat16).float()
    cosine = torch.cosine_similarity(embed(sizes[0])[0], embed(rounded[0])[0], dim=0)
    assert rounded[0, 0] == 1368
    assert cosine < 0.99
