"""The configuration's checks and its JSON."""

from __future__ import annotations

import pytest

from lily_diffusers import LilyConfig
from lily_diffusers.initialisation import INITS
from lily_diffusers.routers import ROUTERS


def test_json_brings_every_option_back() -> None:
    config = LilyConfig(
        r=8, stride_A=3, num_B=5, scaling=0.5, dropout=0.1, target_modules=["to_v", "to_q"], router="sequence",
        router_bias=True, router_sharing="A", pool_scope="width", layer_order="registration", init="staggered",
    )  # fmt: skip
    assert LilyConfig.from_json(config.to_json()) == config
    assert config.target_modules == ["to_q", "to_v"]  # always in the order of computation


def test_unknown_option_says_upgrade() -> None:
    with pytest.raises(ValueError, match="'?novelty'?; upgrade"):
        LilyConfig.from_json('{"novelty": 1}')


def test_json_that_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="not a JSON object"):
        LilyConfig.from_json("[1]")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"stride_A": 1.5}, "stride_A=1.5 must be a whole number"),
        ({"num_B": True}, "num_B=True must be a whole number"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"scaling": float("nan")}, "scaling=nan must be a finite number"),
        ({"router": "topk"}, "router='topk' is not known; choose one of token, sequence"),
        ({"init": "magic"}, "init='magic' is not known"),
        ({"pool_scope": "all"}, "pool_scope='all' is not known"),
        ({"target_modules": ["to_q", "ff"]}, "must name some of to_q, to_k, to_v, to_out.0"),
        ({"target_modules": []}, "must name some of"),
        ({"router": "static", "router_bias": True}, "does not go with router='static'"),
        ({"init": "staggered"}, "pass router_bias=True"),
        ({"router_bias": "false"}, "router_bias='false' must be a bool"),
        ({"dropout": "0.1"}, "dropout='0.1' must be a float"),
        ({"scaling": True}, "scaling=True must be a float"),
        ({"router": ["token"]}, "must be a str"),
        ({"target_modules": "to_q"}, "target_modules='to_q' must be a list of names"),
        ({"init": "staggered", "router": "uniform"}, "choose another router"),
        ({"init": "staggered", "router": "static", "router_sharing": "pool"}, "router_sharing='slot' or 'A'"),
    ],
)
def test_bad_values_are_named_with_the_way_out(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LilyConfig(**options)


def test_help_describes_every_registered_kind() -> None:
    fields = LilyConfig.__dataclass_fields__
    for registry, name in ((ROUTERS, "router"), (INITS, "init")):
        assert list(fields[name].metadata["choices"]) == list(registry)
        assert all(f"'{kind}'" in fields[name].metadata["help"] for kind in registry)
