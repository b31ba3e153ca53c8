"""Put adapters on a UNet, take them off, choose and scale the active ones.

All state sits in one submodule of the UNet, `unet.lily`: it holds the banks (so that `.to()`, offloading,
DDP and `parameters()` see each tensor once), keeps them out of the UNet's own state dict, and remembers
what to restore. Imports `targets`, `config`, `bank` and `processors`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor as diffusers_processors
from torch import nn

from .bank import LilyBank
from .config import LilyConfig
from .processors import ActiveBanks, LilyAttnProcessor
from .routers import ROUTERS
from .targets import attention_modules, find_slots

logger = logging.getLogger(__name__)

_ATTRIBUTE = "lily"
_REPLACEABLE = tuple(
    getattr(diffusers_processors, name)
    for name in (
        "AttnProcessor",
        "AttnProcessor2_0",
        "FusedAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    )
)
"""Processors that compute plain attention, which ours computes as well."""


class LilyAdapters(nn.Module):
    """The adapters of one UNet: registered on it as `unet.lily`.

    Attributes:
        banks: name -> bank.
        active: which banks are applied, with their strengths.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.banks = nn.ModuleDict()
        self.active = ActiveBanks()
        self._originals: dict[str, Any] = {}
        self._attentions = attention_modules(unet)  # a plain dict: walking a UNet's modules takes milliseconds
        self._processors = {name: LilyAttnProcessor(name, self.active) for name in self._attentions}
        self._hooks = [
            unet.register_forward_pre_hook(_check_before_forward),
            unet.register_state_dict_post_hook(_leave_out_of_state_dict),
            unet.register_load_state_dict_post_hook(_not_missing_from_state_dict),
        ]

    def bank(self, name: str) -> LilyBank:
        """Return the bank of that name, which must be there."""
        return cast(LilyBank, self.banks[name])

    def attach(self) -> None:
        """Install our processors wherever another one stands, remembering that one."""
        for name, attention in self._attentions.items():
            if attention.processor is self._processors[name]:
                continue
            if not isinstance(attention.processor, _REPLACEABLE):
                raise ValueError(
                    f"attention layer '{name}' is computed by {type(attention.processor).__name__}, which Lily would "
                    "silently replace; take it off first (for an IP-Adapter: pipe.unload_ip_adapter())."
                )
            self._originals[name] = attention.processor
        for name, attention in self._attentions.items():
            attention.set_processor(self._processors[name])
            self._processors[name].prompt_deltas.clear()

    def detach(self) -> None:
        """Restore the processors that ours replaced, and remove our hooks."""
        for name, attention in self._attentions.items():
            if attention.processor is self._processors[name]:
                attention.set_processor(self._originals[name])
        for hook in self._hooks:
            hook.remove()
        self.active.banks = []  # processors that someone kept then compute the base

    def replaced(self) -> list[str]:
        """Describe the attention layers whose processor is no longer ours."""
        return [
            f"{name} ({type(attention.processor).__name__})"
            for name, attention in self._attentions.items()
            if attention.processor is not self._processors[name]
        ]


def inject_lily(
    unet: UNet2DConditionModel,
    config: LilyConfig,
    adapter_name: str = "default",
    *,
    generator: torch.Generator | None = None,
) -> LilyBank:
    """Add a fresh adapter to a UNet and make it the only active one.

    The parameters are float32 (train them so; `unet.to(dtype)` casts them with the rest) and require
    gradients. The base weights are neither changed nor frozen.

    Args:
        unet: an SDXL UNet.
        config: the adapter's configuration.
        adapter_name: under which to find it again; no dots.
        generator: CPU generator of the random start; None for torch's global one.

    Returns:
        The bank, whose `parameters()` are all there is to train.

    Raises:
        ValueError: if the name is taken or not allowed, or the UNet cannot be adapted.
    """
    if ROUTERS[config.router].warning:
        logger.warning(ROUTERS[config.router].warning)
    return add_bank(unet, config, adapter_name, generator)


def add_bank(
    unet: UNet2DConditionModel, config: LilyConfig, adapter_name: str, generator: torch.Generator | None = None
) -> LilyBank:
    """Do what `inject_lily` does, for callers that fill the bank themselves (loading)."""
    adapters = get_adapters(unet)
    if adapters is not None and adapter_name in adapters.banks:
        raise ValueError(
            f"an adapter named '{adapter_name}' is already there; delete it first, or choose another adapter_name."
        )
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} must be a name without dots, and none that torch's ModuleDict uses itself; "
            "'duck' will do."
        )
    device = next(unet.parameters()).device
    if device.type == "meta":
        raise ValueError(
            "the UNet's weights are offloaded one by one (enable_sequential_cpu_offload), "
            "where shared adapter weights cannot "
            "follow; use pipe.enable_model_cpu_offload() instead."
        )
    bank = LilyBank(find_slots(unet, config.target_modules, config.layer_order), config, generator).to(device)
    if adapters is not None:
        adapters.attach()
    else:
        adapters = LilyAdapters(unet)
        try:
            adapters.attach()
        except ValueError:
            adapters.detach()
            raise
        setattr(unet, _ATTRIBUTE, adapters)
    adapters.banks[adapter_name] = bank.train(unet.training)
    activate(unet, [adapter_name])
    return bank


def remove_lily(unet: UNet2DConditionModel, adapter_name: str | None = None) -> None:
    """Take an adapter off a UNet; without the last one, the UNet is as it was before the first.

    Args:
        unet: the UNet.
        adapter_name: which one; None for all. A UNet without adapters is left alone.

    Raises:
        ValueError: if there is no adapter of that name.
    """
    adapters = get_adapters(unet)
    if adapter_name is not None:
        adapters = _require(unet, [adapter_name])
        adapters.active.banks = [pair for pair in adapters.active.banks if pair[0] is not adapters.banks[adapter_name]]
        del adapters.banks[adapter_name]
        if adapters.banks:
            return
    if adapters is not None:
        adapters.detach()
        delattr(unet, _ATTRIBUTE)


def activate(unet: UNet2DConditionModel, names: Sequence[str], weights: Sequence[float] | None = None) -> None:
    """Apply these adapters and no others, and put our attention processors back if something replaced them.

    Args:
        unet: a UNet with adapters.
        names: which ones; the order is that of addition and does not matter otherwise.
        weights: strength of each, 1.0 by default.

    Raises:
        ValueError: if a name is unknown or given twice, the lengths differ, or a weight is not finite.
    """
    adapters = _require(unet, names)
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names) or len(set(names)) != len(names):
        raise ValueError(
            f"{len(names)} adapter names {list(names)} and {len(weights)} weights {weights}: give one weight a name."
        )
    bad = [weight for weight in weights if isinstance(weight, str) or not math.isfinite(weight)]
    if bad:
        raise ValueError(f"adapter weights {weights} must be finite numbers; 1.0 is as trained, 0.0 is the base.")
    adapters.attach()
    adapters.active.banks = [(adapters.bank(name), float(weight)) for name, weight in zip(names, weights, strict=True)]


@contextmanager
def disabled(unet: UNet2DConditionModel) -> Iterator[None]:
    """Run the base model inside the block; a UNet without adapters is left alone."""
    adapters = get_adapters(unet)
    if adapters is None:
        yield
        return
    adapters.active.disabled += 1
    try:
        yield
    finally:
        adapters.active.disabled -= 1


def get_adapters(unet: UNet2DConditionModel) -> LilyAdapters | None:
    """Return the UNet's adapters, or None if it has none."""
    return getattr(unet, _ATTRIBUTE, None)


def _require(unet: UNet2DConditionModel, names: Sequence[str]) -> LilyAdapters:
    adapters = get_adapters(unet)
    if adapters is None:
        raise ValueError("this UNet has no Lily adapter; load one with load_lily_weights() or inject_lily() first.")
    unknown = [name for name in names if name not in adapters.banks]
    if unknown:
        raise ValueError(
            f"no adapter named {', '.join(map(repr, unknown))}; loaded are {', '.join(map(repr, adapters.banks))}."
        )
    return adapters


def check_attached(unet: UNet2DConditionModel) -> None:
    """Raise if something replaced our attention processors since the adapters were put on.

    Raises:
        RuntimeError: naming the layers and the call that puts the adapters back.
    """
    adapters = get_adapters(unet)
    replaced = adapters.replaced() if adapters is not None else []
    if replaced:
        raise RuntimeError(
            f"{len(replaced)} attention processors of the UNet were replaced after Lily was put on it, "
            "so the adapter would "
            f"silently do nothing there: {', '.join(replaced[:3])}{', …' if len(replaced) > 3 else ''}. Calls such as "
            "set_attn_processor, fuse_qkv_projections, enable_attention_slicing or load_ip_adapter do that. Call "
            "set_lily_adapters(pipe, names) to put Lily back, or remove_lily(unet) to run without it."
        )


def _check_before_forward(unet: UNet2DConditionModel, args: Any) -> None:
    check_attached(unet)
    for bank, _ in getattr(unet, _ATTRIBUTE).active.banks:
        if bank.A[0].is_meta:
            raise RuntimeError(
                "the adapter's weights were offloaded one by one (enable_sequential_cpu_offload), "
                "where shared weights cannot "
                "follow; use pipe.enable_model_cpu_offload() instead."
            )


def _leave_out_of_state_dict(unet: UNet2DConditionModel, state_dict: dict, prefix: str, metadata: Any) -> None:
    """Keep `unet.save_pretrained()` writing the base model; adapters are saved with `save_lily_weights`."""
    for key in [key for key in state_dict if key.startswith(f"{prefix}{_ATTRIBUTE}.")]:
        del state_dict[key]


def _not_missing_from_state_dict(unet: UNet2DConditionModel, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not f".{key}".count(f".{_ATTRIBUTE}.banks.")]
