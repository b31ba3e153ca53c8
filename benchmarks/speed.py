"""Time the UNet without an adapter, with PEFT's LoRA, with PEFT's Lily and with ours, side by side.

    python -m benchmarks.speed --unet sdxl --latent 64 --json speed.json

One process, one copy of the UNet's weights, and every method timed once a round, so that what drifts
drifts for all; each ratio is taken within its round. Two calls are timed: a forward pass under
`no_grad` with the adapter in the UNet's dtype and the same prompt tensor each time, as a pipeline runs all
denoising steps but the first (`--fresh-prompt` times the first, for which ours keeps nothing); and a training step
(forward, backward, AdamW) with float32 adapter weights, under autocast where the UNet is in half
precision, as diffusers' scripts train. fp16 steps are timed without loss scaling. The base has nothing
to train: its step is forward and backward down to the text embeddings, which is the way that
every adapter's gradient takes. Tensors that start as zeros (the B's) are made random in all methods.

May import the other files of this folder, torch, diffusers and peft.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from .measure import MEMORY_LABELS, describe_machine, interleave, memory_growth, ratios
from .methods import METHODS, AdapterOptions, Applied, fill_zeros, set_dtype
from .report import format_report, summarise
from .unets import UNETS, make_inputs, make_unet, share_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LATENTS = {"tiny": 16, "sdxl": 64}
PAIRS = (("lily", "lora"), ("lily", "peft_lily"))


@dataclass(frozen=True)
class Subject:
    """One method, ready to be timed: its view of the UNet, what calls it, and what it trains."""

    view: UNet2DConditionModel
    call: Callable[..., Any]
    applied: Applied


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `--latent` and `--dtype` get the defaults of the chosen UNet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="Time adapters side by side.")
    parser.add_argument("--unet", choices=list(UNETS), default="tiny", help="geometry; the weights are random")
    parser.add_argument("--latent", type=int, help="edge of the latent, 1/8 of the picture's (latent pixels)")
    parser.add_argument("--batch", type=int, default=2, help="samples in a forward; 2 is one picture with guidance")
    parser.add_argument("--train_batch", type=int, default=1, help="samples in a training step")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each method")
    parser.add_argument("--warmup", type=int, help="untimed calls of each method (default: 1, on CUDA 3)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="base always runs")
    parser.add_argument("--forward-only", "--no-train-step", action="store_true", help="time no training steps")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in the training step")
    parser.add_argument("--fresh-prompt", action="store_true", help="give every forward a new prompt tensor")
    parser.add_argument("--compile", action="store_true", help="torch.compile every method's UNet")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the UNet (default: tiny fp32, sdxl bf16)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, adapters and inputs")
    parser.add_argument("--json", type=Path, help="file for the figures, with every raw sample")
    for name, kind in (("r", int), ("stride_A", int), ("num_B", int), ("router", str)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(AdapterOptions, name), help="as in LilyConfig")
    args = parser.parse_args(argv)
    for name in ("latent", "batch", "train_batch", "rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value} must be at least 1")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device={args.device} needs a CUDA build of torch and a GPU; use --device cpu")
    args.latent = args.latent or LATENTS[args.unet]
    if args.latent % 4:
        parser.error(f"--latent={args.latent} must be divisible by 4; the UNet halves it twice")
    args.dtype = args.dtype or ("fp32" if args.unet == "tiny" else "bf16")
    args.warmup = (1 if args.device == "cpu" else 3) if args.warmup is None else args.warmup
    args.methods = [name for name in METHODS if name == "base" or name in args.methods]
    return args


def prepare(unet: UNet2DConditionModel, args: argparse.Namespace) -> dict[str, Subject]:
    """Give every method its own view of the UNet, apply it, and make its zero tensors random."""
    options = AdapterOptions(r=args.r, stride_A=args.stride_A, num_B=args.num_B, router=args.router)
    if args.compile:  # the views share their code, and dynamo counts recompilations by code
        torch._dynamo.config.recompile_limit = 16 * len(args.methods)
    subjects = {}
    for name in args.methods:
        torch.manual_seed(args.seed)
        view = share_weights(unet)
        applied = METHODS[name](view, options)
        fill_zeros(applied.parameters, seed=args.seed)
        if args.gradient_checkpointing:
            view.enable_gradient_checkpointing()
        subjects[name] = Subject(view, torch.compile(view) if args.compile else view, applied)
    return subjects


def make_forward(subject: Subject, inputs: dict[str, Any], fresh_prompt: bool = False) -> Callable[[], Tensor]:
    """Make the call that predicts the noise of one denoising step, without gradients.

    Args:
        subject: the method.
        inputs: of the UNet.
        fresh_prompt: copy the prompt embedding before every call, as if each were the first step of a picture.
    """
    subject.view.eval()

    def forward() -> Tensor:
        prompt = inputs["encoder_hidden_states"]
        with torch.no_grad():
            return subject.call(**inputs | {"encoder_hidden_states": prompt.clone() if fresh_prompt else prompt}).sample

    return forward


def make_step(subject: Subject, inputs: dict[str, Any], dtype: torch.dtype) -> tuple[Callable[[], None], Any]:
    """Make the call that is one training step, and the optimiser whose state it fills (None for the base)."""
    subject.view.train()
    parameters = subject.applied.parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
    device = subject.view.device
    target = torch.zeros_like(inputs["sample"], dtype=torch.float32)
    if optimizer is None:
        inputs = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].clone().requires_grad_()}

    def autocast() -> AbstractContextManager[Any]:
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    def step() -> None:
        with autocast():
            prediction = subject.call(**inputs).sample
        F.mse_loss(prediction.float(), target).backward()
        if optimizer is None:
            inputs["encoder_hidden_states"].grad = None
        else:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step, optimizer


def check_outputs(forwards: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Return how much each method changes the base's output (relative norm).

    Raises:
        RuntimeError: if an output is not finite, or a method changes nothing: then there is nothing to compare.
    """
    outputs = {name: forward().float() for name, forward in forwards.items()}
    base = outputs["base"]
    changes = {name: float((output - base).norm() / base.norm()) for name, output in outputs.items()}
    for name, change in changes.items():
        if not outputs[name].isfinite().all():
            raise RuntimeError(f"the output of method '{name}' is not finite; try --dtype bf16 or fp32.")
        if name != "base" and change == 0:
            raise RuntimeError(f"method '{name}' does not change the UNet's output, so its speed means nothing.")
    return changes


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def time_forward(unet: UNet2DConditionModel, subjects: dict[str, Subject], args: argparse.Namespace) -> dict[str, Any]:
    """Time the forward pass of every method; the adapters take the UNet's dtype."""
    inputs = make_inputs(unet, args.batch, args.latent, args.seed)
    for subject in subjects.values():
        set_dtype(subject.applied.parameters, unet.dtype)
    forwards = {name: make_forward(subject, inputs, args.fresh_prompt) for name, subject in subjects.items()}
    changes = check_outputs(forwards)
    samples = interleave(forwards, args.rounds, args.warmup, unet.device)
    results = {}
    for name, subject in subjects.items():
        first_step = make_forward(subject, inputs, fresh_prompt=True)
        first_step()  # its prompt is gone afterwards, and with it what a method keeps for a prompt
        growth = memory_growth(first_step, unet.device)
        own = _bytes(unet.parameters()) + _bytes(subjects[name].applied.parameters)
        results[name] = summarise(samples, name, growth, own) | {"output_change": changes[name]}
    return results


def time_step(unet: UNet2DConditionModel, subjects: dict[str, Subject], args: argparse.Namespace) -> dict[str, Any]:
    """Time the training step of every method; the adapters are float32."""
    inputs = make_inputs(unet, args.train_batch, args.latent, args.seed)
    for subject in subjects.values():
        set_dtype(subject.applied.parameters, torch.float32)
    steps = {name: make_step(subject, inputs, unet.dtype) for name, subject in subjects.items()}
    calls = {name: call for name, (call, _) in steps.items()}
    samples = interleave(calls, args.rounds, args.warmup, unet.device)
    results = {}
    for name, (call, optimizer) in steps.items():
        growth = memory_growth(call, unet.device)
        state = [t for entry in optimizer.state.values() for t in entry.values()] if optimizer else []
        own = _bytes(unet.parameters()) + _bytes(subjects[name].applied.parameters) + _bytes(state)
        results[name] = summarise(samples, name, growth, own)
    return results


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark and return all figures, ready for JSON."""
    if args.threads:
        torch.set_num_threads(args.threads)
    unet = make_unet(args.unet, DTYPES[args.dtype], torch.device(args.device), args.seed)
    subjects = prepare(unet, args)
    results: dict[str, dict[str, Any]] = {
        name: {"parameters": subject.applied.count, "stored_bytes": subject.applied.stored_bytes}
        for name, subject in subjects.items()
    }
    phases = {"forward": time_forward} if args.forward_only else {"forward": time_forward, "step": time_step}
    pairs: dict[str, dict[str, Any]] = {}
    for phase, measure in phases.items():
        timed = measure(unet, subjects, args)
        for name in results:
            results[name][phase] = timed[name]
        pairs[phase] = {
            f"{ours}/{peer}": ratios(timed[ours]["samples_s"], timed[peer]["samples_s"])
            for ours, peer in PAIRS
            if ours in timed and peer in timed
        }
    return {
        "options": {key: value for key, value in vars(args).items() if key != "json"},
        "unet_parameters": sum(p.numel() for p in unet.parameters()),
        "machine": describe_machine(unet.device),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
        "memory": "UNet weights + this adapter + its optimiser state + growth in a call "
        f"({MEMORY_LABELS[unet.device.type]})",
        "methods": results,
        "pairs": pairs,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line describes, print the table and write the JSON file."""
    args = parse_args(argv)
    report = run(args)
    given = [*(sys.argv[1:] if argv is None else argv)]
    report = {"command": shlex.join(["python", "-m", "benchmarks.speed", *given])} | report
    print(format_report(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwrote {args.json}")


if __name__ == "__main__":
    main()
