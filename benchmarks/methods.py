"""The methods that a benchmark compares: the base UNet, PEFT's LoRA, PEFT's Lily, and ours.

Each is one function that changes a view of the UNet in place (`unets.share_weights`); adding a peer
is adding one entry to `METHODS`. May import torch, diffusers, peft, safetensors and `lily_diffusers`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from lily_diffusers import LilyConfig, inject_lily, save_lily_weights
from lily_diffusers.initialisation import INITS
from lily_diffusers.routers import ROUTERS

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class AdapterOptions:
    """What the adapters of all methods have in common (LoRA takes r only).

    Attributes:
        r: rank.
        stride_A: how many consecutive slots share one A.
        num_B: experts in a pool.
        router: our router kind; PEFT's Lily has one kind, our 'batch'.
        init: how ours starts; PEFT's Lily has one way, our 'zero'.
    """

    r: int = 32
    stride_A: int = 4
    num_B: int = 4
    router: str = "token"
    init: str = "zero"


@dataclass(frozen=True)
class Applied:
    """What a method left on its view.

    Attributes:
        parameters: the trainable ones, each once, float32.
        stored_bytes: size of the file that the method's own save writes, in float32.
        experts: (e, r, o) of each pool, in the memory of the parameters; none without experts.
        record_routing: opens a block that collects slot -> S (b or 1, e) of the forwards inside; None without experts.
    """

    parameters: list[nn.Parameter] = field(default_factory=list)
    stored_bytes: int = 0
    experts: list[Tensor] = field(default_factory=list)
    record_routing: Callable[[], AbstractContextManager[Mapping[int, Tensor]]] | None = None

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters)


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters if p.requires_grad}.values())


def _base(unet: UNet2DConditionModel, options: AdapterOptions) -> Applied:
    return Applied()


def _peft(unet: UNet2DConditionModel, config: peft.PeftConfig) -> Applied:
    """Inject a PEFT adapter as diffusers does, and weigh its state dict as PEFT saves it: shared tensors cloned."""
    peft.inject_adapter_in_model(config, unet, adapter_name="default")
    parameters = _trainable(unet.parameters())
    set_dtype(parameters, torch.float32)  # they come in the UNet's dtype; diffusers' scripts do the same
    state = {key: value.clone() for key, value in peft.get_peft_model_state_dict(unet, adapter_name="default").items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter_model.safetensors"
        save_file(state, file)
        return Applied(parameters, file.stat().st_size)


def _lora(unet: UNet2DConditionModel, options: AdapterOptions) -> Applied:
    return _peft(unet, peft.LoraConfig(r=options.r, lora_alpha=options.r, target_modules=TARGETS))


def _peft_lily(unet: UNet2DConditionModel, options: AdapterOptions) -> Applied:
    config = peft.LilyConfig(
        r=options.r, stride_A=options.stride_A, num_B=options.num_B, scaling=1.0, target_modules=TARGETS
    )
    applied = _peft(unet, config)
    pools = {id(module.weight): module.weight for module in _modules(unet, ".lily_B.default")}
    experts = [weight.detach().view(options.num_B, -1, weight.shape[1]) for weight in pools.values()]

    @contextmanager
    def record_routing() -> Iterator[dict[int, Tensor]]:
        log: dict[int, Tensor] = {}

        def listen(slot: int) -> Callable[[nn.Module, object, Tensor], None]:
            def hook(router: nn.Module, inputs: object, logits: Tensor) -> None:  # logits: (b, n, e)
                log[slot] = logits.detach().float().softmax(-1).flatten(0, -2).mean(0, keepdim=True)

            return hook

        routers = _modules(unet, ".lily_router.default")
        handles = [router.register_forward_hook(listen(slot)) for slot, router in enumerate(routers)]
        try:
            yield log
        finally:
            for handle in handles:
                handle.remove()

    return dataclasses.replace(applied, experts=experts, record_routing=record_routing)


def _modules(unet: UNet2DConditionModel, suffix: str) -> list[nn.Linear]:
    """The linear modules whose names end so, shared ones as often as they are used."""
    named = unet.named_modules(remove_duplicate=False)
    return [module for name, module in named if name.endswith(suffix) and isinstance(module, nn.Linear)]


def _lily(unet: UNet2DConditionModel, options: AdapterOptions) -> Applied:
    config = LilyConfig(
        r=options.r,
        stride_A=options.stride_A,
        num_B=options.num_B,
        router=options.router,
        router_bias=INITS[options.init].needs_bias and ROUTERS[options.router].reads_input,
        init=options.init,
    )
    bank = inject_lily(unet, config)
    with tempfile.TemporaryDirectory() as folder:
        stored_bytes = save_lily_weights(unet, folder).stat().st_size
    return Applied(_trainable(bank.parameters()), stored_bytes, [*bank.B], bank.record_routing)


METHODS: dict[str, Callable[[UNet2DConditionModel, AdapterOptions], Applied]] = {
    "base": _base,
    "lora": _lora,
    "peft_lily": _peft_lily,
    "lily": _lily,
}
"""Name -> function that puts the method on a view of the UNet."""


def fill_zeros(parameters: Iterable[nn.Parameter], std: float = 0.01, seed: int = 0) -> None:
    """Replace every parameter that starts as all zeros (the B's), so that no method's work is trivially zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def set_dtype(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Convert parameters in place, whoever holds them."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
