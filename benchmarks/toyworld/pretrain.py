"""Make the base from nothing: render the world, train the VAE, then UNet and text encoders, then write it.

    python -m benchmarks.toyworld.pretrain --work build/toyworld --out examples/toy-sdxl

Every stage keeps its result in the work folder and is not run again; the UNet goes on from its last
checkpoint, so that the command can be stopped and repeated at will, with other `--steps` too. On two CPU
cores two processes of one thread take a fifth less time a step than one process of two (docs/LOG.md):

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m benchmarks.toyworld.pretrain

May import all of the toy world but the scorer, and `lily_diffusers`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import Tensor

from lily_diffusers.files import write_atomically

from .autoencoder import encode, peak_signal, train_vae
from .data import Pictures, render_pictures
from .diffusion import Denoiser, Samples, train_denoiser
from .drawing import write_samples
from .model import make_pipeline, make_vae

PLANNED = ("pictures", "warm_start", "vae_steps", "vae_batch", "batch")
"""Options that stay what they were when the work folder was begun."""


def _trained_vae(work: Path, pictures: Pictures, steps: int, batch: int, device: torch.device) -> AutoencoderKL:
    folder, partial = work / "vae", work / "vae.partial"
    if folder.exists():
        return AutoencoderKL.from_pretrained(folder).to(device)
    torch.manual_seed(0)
    vae = make_vae().to(device)
    train_vae(vae, pictures, steps, batch, device)
    latents = encode(vae, pictures[:4096], device)
    vae.register_to_config(scaling_factor=round(1 / latents.float().std().item(), 5))
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    vae.save_pretrained(partial)
    partial.rename(folder)
    return vae


def encode_once(work: Path, vae: AutoencoderKL, pictures: Pictures, device: torch.device) -> Tensor:
    """Encode the pictures, or fetch the latents that the work folder holds.

    Returns:
        (n, 4, 16, 16) float16, scaled.

    Raises:
        ValueError: if the folder's latents are another VAE's or other pictures'.
    """
    file, whole = work / "latents.pt", hashlib.blake2b(digest_size=8)
    for tensor in vae.state_dict().values():
        whole.update(tensor.cpu().numpy().tobytes())
    origin = f"{whole.hexdigest()} {len(pictures.pixels)}"
    if not file.exists():
        made = {"origin": origin, "latents": encode(vae, pictures, device)}
        write_atomically(file, lambda partial: torch.save(made, partial))
    kept = torch.load(file, weights_only=True)
    if not isinstance(kept, dict) or kept["origin"] != origin:
        raise ValueError(f"{file} was made by another VAE or from other pictures: remove it.")
    latents: Tensor = kept["latents"] * vae.config.scaling_factor
    return latents


def keep_to_plan(work: Path, plan: dict[str, object]) -> None:
    """Write down with what options a work folder was begun, or compare them with those of before.

    Raises:
        ValueError: naming the first option that differs: going on would mix two runs.
    """
    file, plan = work / "plan.json", {name: None if value is None else str(value) for name, value in plan.items()}
    if not file.exists():
        write_atomically(file, lambda partial: partial.write_text(json.dumps(plan, indent=1) + "\n"))
    for name, began in json.loads(file.read_text()).items():
        if plan[name] != began:
            raise ValueError(
                f"--work={work} was begun with --{name}={began}, not {plan[name]}; repeat it so, or name another folder"
            )


def start_processes() -> bool:
    """Join the other processes, if torchrun started several; say whether this is the first."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo", timeout=timedelta(hours=12))
        return dist.get_rank() == 0
    return True


def main() -> None:
    """Run every stage that has not been run."""
    parser = argparse.ArgumentParser(description="Pre-train the toy SDXL.")
    parser.add_argument(
        "--work", type=Path, default=Path("build/toyworld"), help="folder for what is kept between runs"
    )
    parser.add_argument("--out", type=Path, default=Path("examples/toy-sdxl"), help="folder for the finished pipeline")
    parser.add_argument(
        "--warm_start", type=Path, help="pipeline of this kind to go on from, instead of random weights"
    )
    parser.add_argument("--pictures", type=int, default=160_000, help="pictures to render")
    parser.add_argument("--vae_steps", type=int, default=6_500, help="optimiser steps of the VAE")
    parser.add_argument("--vae_batch", type=int, default=32, help="32-pixel crops a step")
    parser.add_argument("--steps", type=int, default=17_000, help="optimiser steps of the UNet and the text encoders")
    parser.add_argument("--batch", type=int, default=32, help="samples a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args()
    if args.warm_start and not (args.warm_start / "model_index.json").is_file():
        parser.error(f"--warm_start={args.warm_start} holds no model_index.json; pass a pipeline's folder")
    device, work = torch.device(args.device), args.work
    first = start_processes()
    if first:
        try:
            keep_to_plan(work, {name: getattr(args, name) for name in PLANNED})
        except ValueError as error:
            parser.error(str(error))
    else:
        dist.barrier()  # until the first process has what all read
    pictures = render_pictures(work / "pictures", args.pictures)
    pipe = make_pipeline()
    if args.warm_start:
        pipe = StableDiffusionXLPipeline.from_pretrained(args.warm_start, dtype=torch.float32, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        vae = pipe.vae.to(device)
    else:
        vae = _trained_vae(work, pictures, args.vae_steps, args.vae_batch, device)
    if first:
        print(f"VAE: {peak_signal(vae, pictures.pixels[-256:]):.2f} dB on 256 held-out pictures", flush=True)
    latents = encode_once(work, vae, pictures, device)
    if first and dist.is_initialized():
        dist.barrier()

    pipe.vae = vae
    pipe.to(device)
    ids = pipe.tokenizer(
        pictures.captions, padding="max_length", truncation=True, max_length=pipe.tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids.short()  # fmt: skip
    samples = Samples(latents, ids, torch.from_numpy(pictures.time_ids), torch.from_numpy(pictures.cover))
    del pictures, latents
    denoiser = Denoiser(pipe).to(device)
    began = time.monotonic()
    checkpoint = work / "unet.pt"
    for done in train_denoiser(denoiser, samples, args.steps, args.batch, checkpoint):
        if first and done % 2000 == 0:
            pipe.save_pretrained(work / "newest")
            write_samples(pipe, work / f"samples-{done:06d}.png")
    if not first:
        return
    print(f"trained for {(time.monotonic() - began) / 60:.0f} min in this run", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    write_samples(pipe, args.out / "samples.jpg")
    for part in (pipe.unet, pipe.vae):  # transformers would keep float16 where diffusers loads float32
        part.half()
    pipe.to("cpu").save_pretrained(args.out, safe_serialization=True)
    size = sum(file.stat().st_size for file in args.out.rglob("*.safetensors"))
    print(f"wrote {args.out}: {size / 1e6:.1f} MB of weights", flush=True)


if __name__ == "__main__":
    main()
