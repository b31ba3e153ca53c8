"""Draw the validation prompt with the adapter as it stands.

Text encoders are gone by then and the VAE is loaded for the moment only, so that validation does not
raise the run's memory. Imports `cache` and `config` of this package.
"""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import free_memory
from PIL import Image

from .cache import PromptEmbeds
from .config import TrainingConfig


def validate(
    accelerator: Accelerator,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    config: TrainingConfig,
    prompt: PromptEmbeds,
    step: int,
) -> list[Image.Image]:
    """Draw the validation pictures, save them and send them to TensorBoard. The main process calls it.

    Args:
        accelerator: the run's.
        unet: unwrapped, with the adapter.
        vae: in float32, as SDXL's must decode; the caller may drop it afterwards.
        config: the run's options.
        prompt: the validation prompt's embeddings.
        step: optimiser steps done, for the file names.

    Returns:
        The pictures, which also stand in `output_dir/validation/step-{step}/`.
    """
    pipe = StableDiffusionXLPipeline.from_pretrained(
        config.pretrained_model_name_or_path,
        unet=unet,
        vae=vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        revision=config.revision,
        variant=config.variant,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    was_training = unet.training
    unet.eval()
    images = []
    try:
        for index in range(config.num_validation_images):
            # No autocast here: the prepared UNet brings its own and answers in float32, which the VAE must stay in.
            images += pipe(
                prompt_embeds=prompt.prompt_embeds,
                pooled_prompt_embeds=prompt.pooled,
                negative_prompt_embeds=prompt.negative_prompt_embeds,
                negative_pooled_prompt_embeds=prompt.negative_pooled,
                height=config.resolution,
                width=config.resolution,
                num_inference_steps=config.num_inference_steps,
                generator=torch.Generator().manual_seed(config.seed + index),
            ).images
    finally:
        unet.train(was_training)
        del pipe
        free_memory()
    folder = config.output / "validation" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images(
                "validation", np.stack([np.asarray(image) for image in images]), step, dataformats="NHWC"
            )
    return images
