"""The attention processor: scaled dot-product attention plus the deltas of the active banks.

A processor is a plain callable that holds references; parameters are owned by the banks on the UNet.
Imports `functional`, `targets` and `bank`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from . import functional
from .bank import LilyBank
from .targets import Read


@dataclass(eq=False)
class ActiveBanks:
    """Which adapters a UNet applies now, shared by all its processors.

    Attributes:
        banks: pairs of a bank and its strength, in the order in which their deltas are added.
        disabled: how many `inject.disabled` blocks are open; the base runs while it is not 0.
    """

    banks: list[tuple[LilyBank, float]] = field(default_factory=list)
    disabled: int = 0


class PromptDeltas:
    """Updates of one layer's to_k and to_v, which depend on nothing but the prompt embedding.

    All denoising steps pass the same embedding tensor, so what the first step computed serves the others.
    It is kept for the last embedding only, is freed with it, and holds only while neither the embedding
    nor the adapter's tensors nor the strength have changed. Changes through a tensor's `.data`, which torch
    does not count, are seen when the next embedding comes, or after `set_lily_adapters`.
    """

    def __init__(self) -> None:
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __deepcopy__(self, memo: dict) -> PromptDeltas:
        return PromptDeltas()  # a copied UNet computes its own

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def get(self, bank: LilyBank, read: Read, x: Tensor, scale: float) -> Tensor | None:
        """Return the updates of the slots that read the prompt embedding.

        Args:
            bank: the adapter.
            read: the slots.
            x: the prompt embedding, (b, n, i).
            scale: strength of the call.

        Returns:
            (s, b, n, o); None where nothing may be kept: under gradients, autocast, or anything that records
            the computation to replay it; or while routing is recorded or h is dropped out.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or _is_captured(x):
            return None
        if bank.is_recording or (bank.training and bank.config.dropout):
            return None
        used = bank.tensors_of(read)
        if any(tensor.is_inference() for tensor in (x, *used)):  # they do not count their changes
            return None
        state = (x._version, scale, *((tensor.data_ptr(), tensor._version) for tensor in used))
        kept = self._kept.get(x)
        if kept is None:
            self._kept.clear()
            kept = self._kept[x] = {}
        if id(bank) not in kept or kept[id(bank)][0] != state:
            kept[id(bank)] = (state, torch.matmul(*bank.deltas(x, read, scale)))
        return kept[id(bank)][1]


def _is_captured(x: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


class LilyAttnProcessor:
    """Compute one attention layer with the adapters that are active.

    Without an active adapter, or with updates of zero, the result equals that of diffusers'
    `AttnProcessor2_0` bit for bit.

    Args:
        name: the attention layer's name in the UNet.
        active: the UNet's active banks.
    """

    def __init__(self, name: str, active: ActiveBanks) -> None:
        self.name = name
        self.active = active
        self.prompt_deltas = PromptDeltas()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        lily_scale: float = 1.0,
    ) -> Tensor:
        """Attend.

        Args:
            attn: the layer, whose frozen projections are used.
            hidden_states: (b, n, i).
            encoder_hidden_states: (b, m, context width), or None for self-attention.
            attention_mask: additive, (b·heads, 1 or n, m) or (b, 1, m), as diffusers passes it.
            temb: not used; diffusers passes it to every processor.
            lily_scale: strength of all adapters in this call, through
                `cross_attention_kwargs={"lily_scale": 0.8}`.

        Returns:
            (b, n, i).
        """
        residual = hidden_states
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        query, key, value = self._project(
            {"to_q": (attn.to_q, hidden_states), "to_k": (attn.to_k, context), "to_v": (attn.to_v, context)}, lily_scale
        )
        # (b, heads, n or m, head width)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if attention_mask is not None:
            b, m = context.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, m, b)
            attention_mask = attention_mask.view(b, attn.heads, -1, attention_mask.shape[-1])
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        attended = attended.transpose(1, 2).flatten(2).to(query.dtype)  # (b, n, heads·head width)

        (output,) = self._project({"to_out.0": (attn.to_out[0], attended)}, lily_scale)
        output = attn.to_out[1](output)
        if attn.residual_connection:
            output = output + residual
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor

    def _project(self, work: dict[str, tuple[nn.Module, Tensor]], scale: float) -> list[Tensor]:
        """Apply frozen projections to their inputs, (b, n, i) each, and add every active bank's updates.

        Returns:
            (b, n, o) for each projection, in the order of `work`.
        """
        outputs = {projection: frozen(x) for projection, (frozen, x) in work.items()}
        for bank, strength in [] if self.active.disabled else self.active.banks:
            for read in bank.reads.get(self.name, ()):
                first = read.projections[0]
                if first not in work:
                    continue
                x = work[first][1]
                kept = self.prompt_deltas.get(bank, read, x, scale * strength) if read.reads_context else None
                if kept is not None:
                    for j, projection in enumerate(read.projections):
                        outputs[projection].add_(kept[j])
                    continue
                h, M = bank.deltas(x, read, scale * strength)
                for j, projection in enumerate(read.projections):
                    functional.add_delta_(outputs[projection], h[j], M[j])
        return list(outputs.values())
