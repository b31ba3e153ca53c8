"""Teach SDXL a subject from a few photos, with Lily adapters (arXiv 2407.09946).

    accelerate launch train_dreambooth_lily.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --instance_data_dir photos/duck --instance_prompt "a photo of sks duck" --output_dir runs/duck

This file is the table of contents: parse, encode the photos and prompts, inject, train, save. The
chapters are in `lily_diffusers/training/`; every flag is a field of `TrainingConfig` or `LilyConfig`.
"""

from __future__ import annotations

import logging
from dataclasses import asdict

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import free_memory
from transformers import HfArgumentParser

from lily_diffusers import LilyConfig, inject_lily
from lily_diffusers.checkpoint import LilyFileError, save_bank
from lily_diffusers.training.cache import CachedLatents, LatentSource, LiveLatents, encode_prompts, loading
from lily_diffusers.training.checkpoints import check_output
from lily_diffusers.training.config import TrainingConfig, TrainingError
from lily_diffusers.training.data import keyed_generator, load_photos
from lily_diffusers.training.loop import Inputs, train
from lily_diffusers.training.validation import validate

logger = logging.getLogger("train_dreambooth_lily")


def parse_args() -> tuple[TrainingConfig, LilyConfig]:
    """Read both configurations from the command line."""
    parser = HfArgumentParser((TrainingConfig, LilyConfig), description=__doc__.splitlines()[0], allow_abbrev=False)
    try:
        config, lily, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    except ValueError as error:  # raised by LilyConfig
        raise TrainingError(str(error)) from error
    if unknown:
        raise TrainingError(
            f"unknown arguments: {' '.join(unknown)}; --help lists all there are (a run's length is --max_train_steps)."
        )
    return config, lily


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Set up devices, precision and trackers, and prove that the output folder can be written."""
    check_output(config)
    try:
        accelerator = Accelerator(
            # as a plugin, so that an environment variable of the launcher does not override the flag
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
            mixed_precision=config.mixed_precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(str(config.output), str(config.output / config.logging_dir)),
            step_scheduler_with_optimizer=False,
        )
    except (ValueError, ImportError) as error:
        options = f"--mixed_precision={config.mixed_precision}, --report_to={config.report_to}"
        raise TrainingError(f"cannot start with {options}: {error}") from error
    if config.report_to not in ("none", "all") and not accelerator.log_with:
        raise TrainingError(
            f"--report_to={config.report_to} needs a package that is not installed; pip install {config.report_to} "
            "(TensorBoard comes with 'lily-diffusers[train]'), or pass --report_to none."
        )
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    return accelerator


def load_vae(config: TrainingConfig, accelerator: Accelerator, dtype: torch.dtype) -> AutoencoderKL:
    """Load the VAE: the base's in float32 (it overflows in float16), another one in the given precision."""
    other = config.pretrained_vae_model_name_or_path
    if other is not None:
        with loading("pretrained_vae_model_name_or_path", other):
            vae = AutoencoderKL.from_pretrained(other, dtype=dtype)
    else:
        base = config.pretrained_model_name_or_path
        with loading("pretrained_model_name_or_path", base):
            vae = AutoencoderKL.from_pretrained(base, subfolder="vae", revision=config.revision, variant=config.variant)
    return vae.to(accelerator.device).requires_grad_(False)


def load_unet(config: TrainingConfig, dtype: torch.dtype) -> tuple[UNet2DConditionModel, DDPMScheduler]:
    """Load the frozen UNet in the training precision, and the noise schedule it was trained with."""
    base = config.pretrained_model_name_or_path
    with loading("pretrained_model_name_or_path", base):
        scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler", revision=config.revision)
        unet = UNet2DConditionModel.from_pretrained(
            base, subfolder="unet", revision=config.revision, variant=config.variant, dtype=dtype
        )
    return unet.requires_grad_(False), scheduler


def main() -> None:
    """Train an adapter as the command line says."""
    config, lily = parse_args()
    accelerator = make_accelerator(config)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    # Photos and prompts become latents and embeddings; the VAE and the text encoders then leave memory.
    photos = load_photos(config.instance_data_dir, config.resolution)
    prompts = {config.instance_prompt, *([config.validation_prompt] if config.validation_prompt else [])}
    embeds = encode_prompts(config, prompts, accelerator.device, dtype)
    vae = load_vae(config, accelerator, dtype)
    vae_config = vae.config
    source: LatentSource
    if config.cache_latents:
        source = CachedLatents(photos, vae, config, progress=accelerator.is_local_main_process)
    else:
        source = LiveLatents(photos, vae, config)
    del vae
    free_memory()

    # The frozen UNet in the training precision, the adapter on it in float32.
    unet, noise_scheduler = load_unet(config, dtype)
    unet.to(accelerator.device)
    bank = inject_lily(unet, lily, generator=keyed_generator(config.seed, "adapter"))
    logger.info("%d photos; %s trainable parameters", len(photos), f"{sum(p.numel() for p in bank.parameters()):,}")

    def draw_validation(step: int) -> None:
        decoder = load_vae(config, accelerator, torch.float32)
        validate(accelerator, unet, decoder, config, embeds[config.validation_prompt or ""], step)

    metadata = {"base_model": config.pretrained_model_name_or_path, "instance_prompt": config.instance_prompt}
    metadata |= {key: str(getattr(config, key)) for key in ("seed", "resolution", "learning_rate")}
    metadata |= {"photos": str(len(photos))}
    accelerator.init_trackers("lily", {key: str(value) for key, value in (asdict(config) | asdict(lily)).items()})
    names = [photo.path.name for photo in photos]
    inputs = Inputs(source, names, embeds[config.instance_prompt], noise_scheduler, vae_config)
    steps = train(
        accelerator, unet, bank, inputs, config, metadata, draw_validation if config.validation_prompt else None
    )
    if accelerator.is_main_process:
        path = save_bank(bank, config.output, metadata | {"steps": str(steps)})
        logger.info("the adapter is in %s (%.1f MB)", path, path.stat().st_size / 1e6)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (TrainingError, LilyFileError, OSError) as error:
        raise SystemExit(f"train_dreambooth_lily.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(
            "train_dreambooth_lily.py: interrupted; continue with --resume_from_checkpoint latest"
        ) from None
