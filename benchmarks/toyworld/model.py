"""The base's parts, untrained: SDXL's classes in SDXL's arrangement, sized for 64-pixel pictures.

May import `world` and what is above it, and `examples.tiny_sdxl`.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from examples.tiny_sdxl import SDXL_FORM, make_tokenizer

from .objects import BODIES, CLASSES, COLOURS, FACES, FEET, PATTERNS, SIDES, TOPS
from .places import PLACES
from .world import LATENT, SIZE, TEMPLATES

IDENTIFIER = "sks"
"""The rare word: one token, in no caption of pre-training."""
PROMPT_TOKENS = 32
"""Longest prompt, start and end included (SDXL: 77; a caption of the world has at most 30)."""


def vocabulary() -> list[str]:
    """Every word of the world, once, and the identifier."""
    phrases = [*TEMPLATES, *(phrase for phrase, _ in PLACES.values())]
    words = {word for phrase in phrases for word in phrase.replace("{}", "").replace(",", "").split()}
    words |= {*CLASSES, *COLOURS, *PATTERNS, *BODIES, *TOPS, *SIDES, *FEET, *FACES}
    words |= {"an", "with", "stripes", "dots", "toy", IDENTIFIER}
    return sorted(word for word in words if len(word) > 1)


def make_world_tokenizer() -> CLIPTokenizer:
    """Make the tokenizer: a word of the world is one token, anything else is spelt in bytes."""
    return make_tokenizer(vocabulary(), PROMPT_TOKENS)


def make_vae() -> AutoencoderKL:
    """Make the VAE: 4 pixels a latent pixel, 4 channels, no attention, so that crops train it too."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 80),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
        force_upcast=False,
    )


def make_unet() -> UNet2DConditionModel:
    """Make the UNet: SDXL's, with the most layers in the last stage; unlike SDXL's it has attention in the first, too.

    SDXL's finest attention sees 64 × 64 places of a picture, a UNet of 16 × 16 latents would see 8 × 8 without it. The
    adapters act on attention alone: without it a subject's shape was out of their reach (docs/LOG.md).
    """
    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(64, 96, 128),
        norm_num_groups=16,
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 3),
        attention_head_dim=(2, 3, 4),
        cross_attention_dim=160,
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 96,
        **SDXL_FORM
        | {"down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3},
    )


def make_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Make the two text encoders (64 and 96 channels); the pooled prompt comes from the second."""
    shared = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 3,
        "max_position_embeddings": PROMPT_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    first = CLIPTextConfig(hidden_size=64, intermediate_size=192, num_attention_heads=2, **shared)
    second = CLIPTextConfig(hidden_size=96, intermediate_size=288, num_attention_heads=3, projection_dim=96, **shared)
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def make_scheduler() -> EulerDiscreteScheduler:
    """Make SDXL's scheduler, with v-prediction."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="leading",
        steps_offset=1,
    )


def make_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """Put the untrained parts together (float32, on the CPU).

    Args:
        seed: of the weights; the global random state is left as it was.
    """
    tokenizer = make_world_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, encoder_2 = make_text_encoders(tokenizer)
        pipe = StableDiffusionXLPipeline(
            vae=make_vae(),
            text_encoder=encoder,
            text_encoder_2=encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=make_world_tokenizer(),
            unet=make_unet(),
            scheduler=make_scheduler(),
            add_watermarker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
