"""The training run's options. Each field is a flag of `train_dreambooth_lily.py`, described once, here.

Names are those of diffusers' `train_dreambooth_lora_sdxl.py` wherever the thing is the same.
Imports `config`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import option


class TrainingError(Exception):
    """Something that stops a training run and that the user can mend; the message says how."""


@dataclass
class TrainingConfig:
    """Everything a training run needs beside the adapter's own `LilyConfig`.

    Raises:
        TrainingError: if a value is out of range.
    """

    pretrained_model_name_or_path: str = option("SDXL base model: a local folder in diffusers' format, or a hub id")
    instance_data_dir: str = option("folder with the photos of the subject")
    instance_prompt: str = option("prompt that names the subject with a rare word, such as 'a photo of sks dog'")
    output_dir: str = option(
        "folder for the adapter, checkpoints, logs and validation pictures", default="lily-dreambooth-model"
    )
    pretrained_vae_model_name_or_path: str | None = option(
        "another VAE, such as an fp16-safe one; it is then run in the training precision rather than in float32",
        default=None,
    )
    revision: str | None = option("revision of the base model on the hub", default=None)
    variant: str | None = option("variant of the base model's files, such as 'fp16'", default=None)

    seed: int = option("seed of everything random; the same seed gives the same adapter", default=0)
    resolution: int = option("edge of the square training pictures, in pixels; divisible by 8", default=1024)
    center_crop: bool = option("crop photos at the centre rather than at random", default=False)
    random_flip: bool = option("mirror photos at random (not for subjects with a left and a right)", default=False)
    cache_latents: bool = option(
        "encode the photos once and drop the VAE; with --no_cache_latents it stays and encodes a fresh crop every step",
        default=True,
    )
    crop_variants: int = option("how many random crops of each photo the latent cache holds", default=8)

    train_batch_size: int = option("pictures per device in one forward", default=1)
    gradient_accumulation_steps: int = option("forwards per optimiser step", default=1)
    max_train_steps: int = option("optimiser steps", default=500)
    gradient_checkpointing: bool = option(
        "recompute activations in the backward pass: less memory, slower", default=False
    )
    mixed_precision: str | None = option(
        "precision of the frozen base; the adapter is trained in float32 always. Unset: what `accelerate config` says",
        default=None,
        choices=["no", "fp16", "bf16"],
    )
    allow_tf32: bool = option(
        "let NVIDIA GPUs multiply float32 matrices in TF32: faster, slightly less exact", default=False
    )

    learning_rate: float = option("AdamW's learning rate", default=1e-4)
    lr_scheduler: str = option(
        "shape of the learning rate over the run",
        default="constant",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
    )
    lr_warmup_steps: int = option("optimiser steps of warm-up", default=0)
    lr_num_cycles: int = option("restarts of cosine_with_restarts", default=1)
    lr_power: float = option("power of the polynomial scheduler", default=1.0)
    adam_beta1: float = option("AdamW's first beta", default=0.9)
    adam_beta2: float = option("AdamW's second beta", default=0.999)
    adam_weight_decay: float = option("AdamW's weight decay", default=1e-4)
    adam_epsilon: float = option("AdamW's epsilon", default=1e-8)
    max_grad_norm: float = option("gradients are clipped to this norm", default=1.0)

    checkpointing_steps: int = option("optimiser steps between checkpoints to resume from", default=100)
    checkpoints_total_limit: int | None = option("how many checkpoints are kept; unset: all", default=None)
    resume_from_checkpoint: str | None = option("'latest', or the name or path of a checkpoint folder", default=None)

    validation_prompt: str | None = option("prompt to draw now and then; unset: none", default=None)
    validation_steps: int = option("optimiser steps between validation pictures", default=100)
    num_validation_images: int = option("pictures per validation", default=4)
    num_inference_steps: int = option("denoising steps of a validation picture", default=25)

    report_to: str = option(
        "where the curves go: 'tensorboard', another tracker that accelerate knows, 'all' or 'none'",
        default="tensorboard",
    )
    logging_dir: str = option("folder of the logs inside output_dir", default="logs")
    logging_steps: int = option("optimiser steps between points of the curves", default=10)

    def __post_init__(self) -> None:
        at_least_one = (
            "train_batch_size gradient_accumulation_steps max_train_steps checkpointing_steps validation_steps "
        )
        at_least_one += "num_validation_images num_inference_steps logging_steps crop_variants"
        for name in at_least_one.split():
            if getattr(self, name) < 1:
                raise TrainingError(f"--{name}={getattr(self, name)} must be at least 1.")
        if self.resolution < 8 or self.resolution % 8:
            near = max(8, round(self.resolution / 8) * 8)
            raise TrainingError(f"--resolution={self.resolution} is not divisible by 8, as the VAE needs; use {near}.")
        if self.learning_rate <= 0 or self.max_grad_norm <= 0:
            raise TrainingError(
                f"--learning_rate={self.learning_rate} and --max_grad_norm={self.max_grad_norm} must both be above 0."
            )
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise TrainingError(f"--checkpoints_total_limit={self.checkpoints_total_limit} must be at least 1.")
        if not self.instance_prompt.strip():
            raise TrainingError(
                "--instance_prompt is empty; name the subject with a rare word, as in 'a photo of sks dog'."
            )

    @property
    def output(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)
