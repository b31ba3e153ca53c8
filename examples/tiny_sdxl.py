"""Build a tiny SDXL offline: every class is the real one, only the sizes are small.

    python -m examples.tiny_sdxl OUT_DIR

The result is a folder that `StableDiffusionXLPipeline.from_pretrained` loads like any SDXL
checkpoint: UNet with text-time conditioning, two CLIP text encoders with byte-level tokenizers,
VAE and Euler scheduler, a few MB of random weights drawn from a fixed seed. It draws noise; it
exists so that tests and the speed benchmark run the true code paths without a hub. (The tiny SDXL that
can draw is `examples/toy-sdxl`.)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIZE = 64
"""Edge of the pictures the tiny model is built for (pixels)."""

SDXL_FORM: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
"""What a UNet of SDXL's form has at any size."""

_START, _END = "<|startoftext|>", "<|endoftext|>"


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE uses, in byte order (GPT-2's convention)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Order BPE merges so that every word grows letter by letter from its start, undisturbed by the others' merges."""
    chains = {}
    for word in words:
        ends = [*word[:-1], word[-1] + "</w>"]
        chains[word] = [("".join(ends[:i]), ends[i]) for i in range(1, len(ends))], ends
    known = {pair for chain, _ in chains.values() for pair in chain}
    order: TopologicalSorter[tuple[str, str]] = TopologicalSorter()
    for chain, ends in chains.values():
        for i, pair in enumerate(chain):
            order.add(pair, *chain[:i])
            for later in zip(ends[i + 1 :], ends[i + 2 :], strict=False):  # letters still single when `pair` merges
                if later in known:
                    order.add(later, pair)
    return list(order.static_order())


def make_tokenizer(words: Sequence[str] = (), length: int = 77) -> CLIPTokenizer:
    """Make a CLIP tokenizer that spells any prompt in bytes, but for words that are one token each.

    Args:
        words: lower-case words; without any, 514 tokens and no merges.
        length: tokens of a prompt, start and end included.
    """
    letters = _byte_alphabet()
    merges = _merges(words)
    pieces = ["".join(pair) for pair in merges]
    tokens = letters + [letter + "</w>" for letter in letters] + pieces + [_START, _END]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=length)


def make_unet() -> UNet2DConditionModel:
    """Make SDXL's UNet in small: 3 stages, attention in the last two, 36 transformer slots of work.

    Kept from SDXL: no attention in the first stage, linear projections, text-time embeddings, a
    cross-attention width that differs from both stages' widths, more layers where it is narrow.
    """
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=48,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        **SDXL_FORM,
    )


def make_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """Make the tiny pipeline in memory (float32, on the CPU).

    Args:
        seed: of the random weights; the global random state is left as it was.
    """
    tokenizer, tokenizer_2 = make_tokenizer(), make_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusionXLPipeline(
            vae=AutoencoderKL(
                block_out_channels=(16, 16, 16),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                norm_num_groups=8,
                sample_size=SIZE,
            ).eval(),
            text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=16, **text)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(
                CLIPTextConfig(hidden_size=32, projection_dim=32, **text)
            ).eval(),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=make_unet().eval(),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="leading",
                steps_offset=1,
            ),
            add_watermarker=False,
        )


def main() -> None:
    """Write the tiny SDXL to the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Write a tiny random SDXL for tests and the demo.")
    parser.add_argument("out", type=Path, help="folder to write, in diffusers' format")
    out = parser.parse_args().out
    make_pipeline().save_pretrained(out, safe_serialization=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"wrote {out} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
