"""The training loop: UNet and bank only; everything else has left memory.

Imports everything else of this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm.auto import tqdm

from ..analysis import expert_similarity, routing_entropy
from ..bank import LilyBank
from .cache import LatentSource, PromptEmbeds
from .checkpoints import Checkpoints, find_last
from .config import TrainingConfig, TrainingError
from .data import keyed_generator
from .loss import denoising_loss, draw_batch


@dataclass
class Inputs:
    """What the loop trains on.

    Attributes:
        source: latents of the photos. photos: their names.
        prompt: the instance prompt's embeddings.
        scheduler: adds noise. vae_config: of the VAE that made the latents.
    """

    source: LatentSource
    photos: list[str]
    prompt: PromptEmbeds
    scheduler: DDPMScheduler
    vae_config: object


def train(
    accelerator: Accelerator,
    unet: UNet2DConditionModel,
    bank: LilyBank,
    inputs: Inputs,
    config: TrainingConfig,
    metadata: dict[str, str],
    validate: Callable[[int], object] | None = None,
) -> int:
    """Train a bank, writing checkpoints, curves and validation pictures on the way.

    Args:
        accelerator: with `gradient_accumulation_steps` set as in the configuration.
        unet: frozen, with the bank on it.
        bank: what is trained.
        inputs: what it is trained on.
        config: the run's options.
        metadata: for the adapters inside the checkpoints.
        validate: called on the main process with the number of steps done.

    Returns:
        The number of optimiser steps that the adapter has seen.

    Raises:
        TrainingError: if the loss stops being finite, or a checkpoint cannot be written or resumed.
    """
    unet.train()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        bank.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    model, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    checkpoints = Checkpoints(accelerator, bank, config, inputs.photos, metadata)
    start = checkpoints.resume()
    bar = tqdm(
        range(start, config.max_train_steps),
        initial=start,
        total=config.max_train_steps,
        desc="Training",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    for step in bar:
        log = (step + 1) % config.logging_steps == 0 or step + 1 == config.max_train_steps
        curves = _optimise(accelerator, model, bank, optimizer, inputs, config, step, log)
        checkpoints.prune()
        curves["lr"] = lr_scheduler.get_last_lr()[0]
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()
        bar.set_postfix(loss=f"{curves['loss']:.4f}", lr=f"{curves['lr']:.1e}")
        if log:
            accelerator.log(curves, step=step + 1)
        if (step + 1) % config.checkpointing_steps == 0:
            checkpoints.save(step + 1)
        if validate is not None and ((step + 1) % config.validation_steps == 0 or step + 1 == config.max_train_steps):
            if accelerator.is_main_process:
                validate(step + 1)
            accelerator.wait_for_everyone()
    checkpoints.prune()
    return max(start, config.max_train_steps)


def _optimise(
    accelerator: Accelerator,
    model: torch.nn.Module,
    bank: LilyBank,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    config: TrainingConfig,
    step: int,
    log: bool,
) -> dict[str, float]:
    """Take one optimiser step over all accumulation steps and return what is to be plotted."""
    losses: list[Tensor] = []
    grad_norm = 0.0
    with bank.record_routing() as routing:
        for examples in _micro_batches(accelerator, config):
            with accelerator.accumulate(model):
                batch = draw_batch(
                    inputs.source,
                    photos=len(inputs.photos),
                    seed=config.seed,
                    step=step,
                    examples=examples,
                    global_batch=_global_batch(accelerator, config),
                    train_timesteps=inputs.scheduler.config.num_train_timesteps,
                    vae_config=inputs.vae_config,
                    device=accelerator.device,
                )
                # Dropout draws from the global generator: key it, so that resuming repeats nothing and skips nothing.
                torch.manual_seed(keyed_generator(config.seed, "dropout", step, examples[0]).initial_seed())
                loss = denoising_loss(model, inputs.scheduler, batch, inputs.prompt.prompt_embeds, inputs.prompt.pooled)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    mean_loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
                    grad_norm = float(accelerator.clip_grad_norm_(bank.parameters(), config.max_grad_norm))
                    _check_finite(accelerator, config, step, mean_loss, grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    curves = {"loss": mean_loss, "grad_norm": grad_norm}
    if log:
        curves |= {"expert_similarity": expert_similarity(bank.B), "routing_entropy": routing_entropy(routing)}
    return curves


def _global_batch(accelerator: Accelerator, config: TrainingConfig) -> int:
    """Examples per optimiser step, over all processes and accumulation steps."""
    return config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes


def _micro_batches(accelerator: Accelerator, config: TrainingConfig) -> Iterator[range]:
    """Yield this process's places in the global batch, one range per accumulation step."""
    b = config.train_batch_size
    for micro in range(config.gradient_accumulation_steps):
        first = (micro * accelerator.num_processes + accelerator.process_index) * b
        yield range(first, first + b)


def _check_finite(accelerator: Accelerator, config: TrainingConfig, step: int, loss: float, grad_norm: float) -> None:
    """Stop before a NaN reaches the adapter. With fp16 an infinite gradient is the loss scaler's business."""
    if math.isfinite(loss) and (math.isfinite(grad_norm) or accelerator.scaler is not None):
        return
    last = find_last(config.output, before=step)  # a checkpoint of exactly `step` steps holds the weights that failed
    kept = f"the last good checkpoint is {last}" if last is not None else "there is no good checkpoint yet"
    what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient's norm became {grad_norm}"
    raise TrainingError(
        f"{what} at step {step + 1}, so training stopped; {kept}. Train anew, in another --output_dir, with a lower "
        f"--learning_rate than {config.learning_rate} or with --mixed_precision=bf16."
    )
