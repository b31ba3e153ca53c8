"""One cell of the comparison: one contender learns one subject from one seed, and draws it.

The training loop is plain and the same for all contenders; its parts (batches keyed by seed, step and
example, the loss) are those of the library's training script. May import `contenders`, `quality_score`,
`methods`, `unets`, the toy world and `lily_diffusers`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor
from transformers.utils import logging as transformers_logging

from lily_diffusers.analysis import expert_similarity, routing_entropy
from lily_diffusers.config import option
from lily_diffusers.training.cache import CachedLatents, PromptEmbeds
from lily_diffusers.training.config import TrainingConfig
from lily_diffusers.training.data import Photo, keyed_generator
from lily_diffusers.training.loss import denoising_loss, draw_batch

from . import BenchError
from .contenders import CONTENDERS
from .methods import METHODS, AdapterOptions, Applied
from .quality_score import INSTANCE_PROMPT, evaluation_prompts
from .toyworld.scorer import Scorer, load_scorer
from .toyworld.subjects import photos
from .toyworld.world import SIZE, Array
from .unets import share_weights

_TAIL = 50  # steps whose mean is the final loss


@dataclass(frozen=True)
class Settings:
    """What all cells of a run have in common; each field is a flag of `benchmarks.quality`."""

    steps: int = option("optimiser steps of a training", default=200)
    batch: int = option("examples in a step", default=5)
    warmup: int = option("optimiser steps over which the learning rate rises to its constant value", default=10)
    pictures: int = option("pictures of each evaluation prompt", default=3)
    sampling_steps: int = option("denoising steps of a picture", default=16)
    guidance: float = option("classifier-free guidance scale", default=2.5)


@dataclass(frozen=True)
class Cell:
    """What is run once.

    Attributes:
        subject: key of `SUBJECTS`.
        seed: of the adapter's start, the batches and the pictures; all contenders get the same.
        contender: key of `CONTENDERS`.
        budget: rank of the LoRA whose parameter count is the budget; 0 for the base.
        rate: learning rate; 0 for the base.
        options: of the adapter.
    """

    subject: str
    seed: int
    contender: str = "base"
    budget: int = 0
    rate: float = 0.0
    options: AdapterOptions = field(default_factory=AdapterOptions)

    @property
    def name(self) -> str:
        """A readable name, unique among cells of the same settings and adapter options."""
        return f"{self.subject}-seed{self.seed}-{self.contender}-r{self.budget}-{self.rate:g}"

    @property
    def base(self) -> Cell:
        """The cell in which the base draws the same prompts from the same seeds."""
        return Cell(self.subject, self.seed)


@dataclass(frozen=True)
class Bench:
    """What cells run on, loaded once a process.

    Attributes:
        base: folder that the pipeline came from.
        scorer_file: that the scorer came from.
        pipe: the base, float32, frozen.
        noise: the schedule it was trained with.
        scorer: reads pictures.
        embeds: prompts encoded so far.
    """

    base: Path
    scorer_file: Path
    pipe: StableDiffusionXLPipeline
    noise: DDPMScheduler
    scorer: Scorer
    embeds: dict[str, PromptEmbeds] = field(default_factory=dict)


def load_bench(base: Path, scorer_file: Path) -> Bench:
    """Load the base from its folder and the scorer from its file.

    Raises:
        BenchError: if either is not there.
    """
    if not (base / "model_index.json").is_file():
        raise BenchError(
            f"--base={base} holds no model_index.json; pass a pipeline's folder, "
            "or make one with: python -m benchmarks.toyworld.pretrain"
        )
    if not scorer_file.is_file():
        raise BenchError(
            f"--scorer={scorer_file} is not there; pass the scorer's weights, "
            f"or make them with: python -m benchmarks.toyworld.train_scorer --out {scorer_file}"
        )
    diffusers_logging.disable_progress_bar()  # of loading: there is one of the cells
    transformers_logging.disable_progress_bar()
    pipe = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        module.eval().requires_grad_(False)
    noise = DDPMScheduler.from_config(pipe.scheduler.config)
    return Bench(base, scorer_file, pipe, noise, load_scorer(scorer_file))


@torch.no_grad()
def embed(bench: Bench, text: str) -> PromptEmbeds:
    """Encode a prompt, or fetch what was encoded before."""
    if text not in bench.embeds:
        positive, negative, pooled, negative_pooled = bench.pipe.encode_prompt(text, device=torch.device("cpu"))
        bench.embeds[text] = PromptEmbeds(positive, pooled, negative, negative_pooled)
    return bench.embeds[text]


@dataclass
class Training:
    """How a training went.

    Attributes:
        losses: of the steps done.
        seconds: that they took.
        failed: a sentence, if the loss or the gradient stopped being finite.
        routing_entropy: on the last step's batch after training, see `analysis.routing_entropy`; None without experts.
    """

    losses: list[float]
    seconds: float = 0.0
    failed: str | None = None
    routing_entropy: float | None = None


def train(bench: Bench, view: UNet2DConditionModel, applied: Applied, cell: Cell, settings: Settings) -> Training:
    """Train an adapter on the subject's photos: AdamW, constant rate after a short warm-up, clipped gradients.

    Args:
        bench: the base.
        view: of the base's UNet, with the adapter.
        applied: the adapter on it.
        cell: names subject, seed and rate.
        settings: steps, batch and warm-up.
    """
    config = TrainingConfig(
        pretrained_model_name_or_path="", instance_data_dir="", instance_prompt=INSTANCE_PROMPT,
        resolution=SIZE, center_crop=True, seed=cell.seed, learning_rate=cell.rate,
    )  # fmt: skip
    pictures = [Photo(Path(cell.subject), Image.fromarray(pixels), (SIZE, SIZE)) for pixels in photos(cell.subject)]
    parameters, prompt = applied.parameters, embed(bench, INSTANCE_PROMPT)
    source = CachedLatents(pictures, bench.pipe.vae, config)
    optimizer = torch.optim.AdamW(
        parameters, cell.rate, (config.adam_beta1, config.adam_beta2), config.adam_epsilon, config.adam_weight_decay
    )

    def loss_of(step: int) -> Tensor:
        batch = draw_batch(
            source,
            photos=len(pictures),
            seed=cell.seed,
            step=step,
            examples=range(settings.batch),
            global_batch=settings.batch,
            train_timesteps=bench.noise.config.num_train_timesteps,
            vae_config=bench.pipe.vae.config,
            device=torch.device("cpu"),
        )
        return denoising_loss(view, bench.noise, batch, prompt.prompt_embeds, prompt.pooled)

    view.train()
    training, began = Training([]), time.perf_counter()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = cell.rate * min(1.0, (step + 1) / settings.warmup)
        loss = loss_of(step)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
        training.losses.append(loss.item())
        if not (math.isfinite(training.losses[-1]) and math.isfinite(norm)):
            training.failed = f"loss {training.losses[-1]:g} and gradient norm {norm:g} at step {step + 1}"
            break
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    training.seconds = time.perf_counter() - began
    view.eval()
    if training.failed is None and not all(parameter.isfinite().all() for parameter in parameters):
        training.failed = f"a weight is not finite after step {settings.steps}"
    if training.failed is None and applied.record_routing is not None:
        with torch.no_grad(), applied.record_routing() as routing:
            loss_of(settings.steps - 1)
        training.routing_entropy = _number(routing_entropy(routing))
    return training


def draw(bench: Bench, view: UNet2DConditionModel, subject: str, seed: int, settings: Settings) -> Array:
    """Draw the evaluation prompts, one call a prompt, as a user asks for several pictures of one.

    PEFT's Lily averages its routing over the batch, so what stands in one batch with a picture matters there.

    Returns:
        (p·k, 64, 64, 3) uint8, prompt by prompt.
    """
    untouched, pictures = bench.pipe.unet, []
    bench.pipe.unet = view
    try:
        for prompt in evaluation_prompts(subject):
            embeds = embed(bench, prompt.text)
            drawn = bench.pipe(
                prompt_embeds=embeds.prompt_embeds,
                pooled_prompt_embeds=embeds.pooled,
                negative_prompt_embeds=embeds.negative_prompt_embeds,
                negative_pooled_prompt_embeds=embeds.negative_pooled,
                num_images_per_prompt=settings.pictures,
                height=SIZE,
                width=SIZE,
                num_inference_steps=settings.sampling_steps,
                guidance_scale=settings.guidance,
                generator=[keyed_generator(seed, "picture", prompt.text, i) for i in range(settings.pictures)],
            )
            pictures += [np.asarray(image) for image in drawn.images]
    finally:
        bench.pipe.unet = untouched
    return np.stack(pictures)


def run_cell(bench: Bench, cell: Cell, settings: Settings) -> tuple[dict[str, object], Array]:
    """Train the cell's contender (the base is not trained) and draw the evaluation prompts.

    Returns:
        The figures of the training, ready for JSON, and the pictures (p·k, 64, 64, 3) uint8, none after a failure.
    """
    view = share_weights(bench.pipe.unet)
    torch.manual_seed(keyed_generator(cell.seed, "adapter").initial_seed())
    applied = METHODS[CONTENDERS[cell.contender].method](view, cell.options)
    training = train(bench, view, applied, cell, settings) if applied.parameters else Training([])
    pictures, began = np.zeros((0, SIZE, SIZE, 3), np.uint8), time.perf_counter()
    if training.failed is None:
        pictures = draw(bench, view, cell.subject, cell.seed, settings)
    tail = training.losses[-_TAIL:]
    return {
        "parameters": applied.count,
        "failed": training.failed,
        "train_seconds": training.seconds,
        "draw_seconds": time.perf_counter() - began,
        "final_loss": sum(tail) / len(tail) if tail and training.failed is None else None,
        "expert_similarity": _number(expert_similarity(applied.experts)),
        "routing_entropy": training.routing_entropy,
    }, pictures


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
