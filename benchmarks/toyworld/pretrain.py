"""Make the base from nothing: render the world, train the VAE, then UNet and text encoders, then write it.

    python -m benchmarks.toyworld.pretrain --work build/toyworld --out examples/toy-sdxl

Every stage keeps its result in the work folder and is not run again; the UNet goes on from its last
checkpoint, so that the command can be stopped and repeated at will. On two CPU cores two processes of one
thread take a fifth less time a step than one process of two threads (docs/LOG.md):

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m benchmarks.toyworld.pretrain

May import all of the toy world but the scorer.
"""

from __future__ import annotations

import argparse
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import Tensor

from .autoencoder import encode, peak_signal, train_vae
from .data import Pictures, render_pictures
from .diffusion import Denoiser, Samples, train_denoiser
from .drawing import write_samples
from .model import make_pipeline, make_vae


def _trained_vae(work: Path, pictures: Pictures, steps: int, batch: int, device: torch.device) -> AutoencoderKL:
    folder = work / "vae"
    if (folder / "config.json").exists():
        return AutoencoderKL.from_pretrained(folder).to(device)
    torch.manual_seed(0)
    vae = make_vae().to(device)
    for _ in train_vae(vae, pictures, steps, batch, device):
        pass
    latents = encode(vae, pictures[:4096], device)
    vae.register_to_config(scaling_factor=round(1 / latents.float().std().item(), 5))
    vae.save_pretrained(folder)
    return vae


def _latents(work: Path, vae: AutoencoderKL, pictures: Pictures, device: torch.device) -> Tensor:
    file = work / "latents.pt"
    if not file.exists():
        torch.save(encode(vae, pictures, device), file.with_suffix(".partial"))
        file.with_suffix(".partial").rename(file)
    latents: Tensor = torch.load(file, weights_only=True)
    if len(latents) != len(pictures.pixels):
        raise ValueError(f"{file} holds {len(latents)} latents of {len(pictures.pixels)} pictures: remove it.")
    return latents * vae.config.scaling_factor


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
    if args.warm_start and (args.work / "unet.pt").exists():
        parser.error(
            f"--work={args.work} holds a run of its own; leave out --warm_start to go on with it, or name another"
        )
    device, work = torch.device(args.device), args.work
    first = start_processes()
    work.mkdir(parents=True, exist_ok=True)
    if not first:
        dist.barrier()  # until the first process has what all read
    pictures = render_pictures(work / "pictures", args.pictures)
    pipe = make_pipeline()
    if args.warm_start:
        pipe = StableDiffusionXLPipeline.from_pretrained(args.warm_start, dtype=torch.float32, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        vae = pipe.vae.to(device)
        if first:
            vae.save_pretrained(work / "vae")  # for when the command is repeated without --warm_start
    else:
        vae = _trained_vae(work, pictures, args.vae_steps, args.vae_batch, device)
    print(f"VAE: {peak_signal(vae, pictures.pixels[-256:]):.2f} dB on 256 held-out pictures", flush=True)
    latents = _latents(work, vae, pictures, device)
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
