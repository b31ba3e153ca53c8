"""The configuration of one adapter: what `LilyConfig` may hold, checked against the registries.

It travels inside the adapter file, and its fields are the training script's flags: each option is
described once, here. Imports `routers`, `targets` and `initialisation`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .initialisation import INITS
from .routers import ROUTERS
from .targets import LAYER_ORDERS, POOL_SCOPES, PROJECTIONS, ROUTER_SHARINGS


def option(help: str, *, default: Any = dataclasses.MISSING, default_factory: Any = dataclasses.MISSING, **more: Any):
    """Declare a dataclass field that is also a command-line flag.

    Args:
        help: the flag's description, which the documentation shows too.
        default, default_factory: as in `dataclasses.field`.
        more: further arguments for argparse, such as `choices` and `aliases`.
    """
    if default_factory is not dataclasses.MISSING:
        return field(default_factory=default_factory, metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})


def _describe(registry: dict[str, Any]) -> str:
    return "; ".join(f"'{name}': {kind.summary}" for name, kind in registry.items()).replace("%", "%%")


@dataclass(frozen=True)
class LilyConfig:
    """Shape, sharing and routing of one Lily adapter.

    Raises:
        ValueError: if a value is out of range, or two options contradict each other.
    """

    r: int = option("rank of every A and B; write --rank under torchrun", default=32, aliases=["--rank"])
    stride_A: int = option("how many consecutive slots of a group share one A", default=4)
    num_B: int = option("how many B experts each pool holds", default=4)
    scaling: float = option("factor on every update", default=1.0)
    dropout: float = option("probability of dropping an element of h = x Aᵀ while training", default=0.0)
    target_modules: list[str] = option(
        "attention projections that are adapted", default_factory=lambda: list(PROJECTIONS), choices=list(PROJECTIONS)
    )
    router: str = option(f"how experts are weighed. {_describe(ROUTERS)}", default="token", choices=list(ROUTERS))
    router_bias: bool = option("give every router that reads its input a learned bias as well", default=False)
    router_sharing: str = option(
        "one router per slot, per A, or per pool", default="slot", choices=list(ROUTER_SHARINGS)
    )
    pool_scope: str = option(
        "which slots share a pool of B's. 'shape': same projection and weight shape; "
        "'output': same projection and output "
        "width; 'width': same output width",
        default="shape",
        choices=list(POOL_SCOPES),
    )
    layer_order: str = option(
        "order in which slots are neighbours. 'forward': down, mid, up; "
        "'registration': the order of named_modules, as PEFT",
        default="forward",
        choices=list(LAYER_ORDERS),
    )
    init: str = option(f"how the adapter starts. {_describe(INITS)}", default="zero", choices=list(INITS))

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("r", "stride_A", "num_B"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
        if not math.isfinite(self.scaling):
            raise ValueError(f"scaling={self.scaling!r} must be a finite number; 1.0 is the usual start.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be at least 0 and below 1.")
        choices: dict[str, Iterable[str]] = {
            "router": ROUTERS,
            "init": INITS,
            "pool_scope": POOL_SCOPES,
            "router_sharing": ROUTER_SHARINGS,
            "layer_order": LAYER_ORDERS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in set(allowed):
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(allowed)}.")
        unknown = [target for target in self.target_modules if target not in PROJECTIONS]
        if unknown or not self.target_modules:
            raise ValueError(
                f"target_modules={list(self.target_modules)!r} must name some of "
                f"{', '.join(PROJECTIONS)}, and nothing else."
            )
        object.__setattr__(self, "target_modules", [name for name in PROJECTIONS if name in set(self.target_modules)])
        self._check_routing()

    def _check_types(self) -> None:
        """Configurations also come from files, where nothing else checks types."""
        kinds: dict[str, tuple[type, ...]] = {"scaling": (int, float), "dropout": (int, float), "router_bias": (bool,)}
        kinds |= dict.fromkeys(("router", "router_sharing", "pool_scope", "layer_order", "init"), (str,))
        for name, allowed in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise ValueError(f"{name}={value!r} must be a {allowed[-1].__name__}.")
        if isinstance(self.target_modules, str) or not all(isinstance(name, str) for name in self.target_modules):
            raise ValueError(
                f"target_modules={self.target_modules!r} must be a list of names, such as ['to_q', 'to_v']."
            )

    def _check_routing(self) -> None:
        router, init = ROUTERS[self.router], INITS[self.init]
        if self.router_bias and not router.reads_input:
            raise ValueError(
                f"router_bias=True does not go with router={self.router!r}, "
                "which does not read its input; leave it off."
            )
        if init.needs_bias and not self.has_rho:
            way_out = "pass router_bias=True" if router.reads_input else "choose another router, or init='zero'"
            raise ValueError(
                f"init={self.init!r} works through the routers' bias, and these routers have none; {way_out}."
            )
        if init.needs_bias and self.router_sharing == "pool":
            raise ValueError(
                f"init={self.init!r} gives slots of different depth different experts, "
                "but router_sharing='pool' leaves one "
                "router for all of them; use router_sharing='slot' or 'A'."
            )

    @property
    def has_R(self) -> bool:
        """Whether every router owns a matrix R: (num_B, r)."""
        return ROUTERS[self.router].reads_input

    @property
    def has_rho(self) -> bool:
        """Whether every router owns a bias ρ: (num_B,)."""
        return ROUTERS[self.router].has_bias or self.router_bias

    def to_json(self) -> str:
        """Return the configuration as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LilyConfig:
        """Read a configuration from JSON.

        Raises:
            ValueError: if it is not JSON, or holds an option that this version does not know.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the Lily configuration is not valid JSON ({error}).") from error
        if not isinstance(values, dict):
            raise ValueError(f"the Lily configuration is {values!r} and not a JSON object.")
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"the Lily configuration has options that this version does not know: {', '.join(unknown)}; "
                "upgrade lily-diffusers."
            )
        return cls(**values)
