"""The speed benchmark: runs on the tiny UNet, compares like with like, and reports true figures."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks import measure, methods, speed, unets
from lily_diffusers import LilyConfig, inject_lily

CPU = torch.device("cpu")


def _args(*more: str) -> list[str]:
    return ["--unet", "tiny", "--latent", "8", "--rounds", "2", "--r", "4", "--stride_A", "2", "--num_B", "3", *more]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON file of one run with all methods, forward and training step."""
    file = tmp_path_factory.mktemp("speed") / "speed.json"
    speed.main(_args("--json", str(file)))
    return json.loads(file.read_text())


def test_every_method_is_timed_in_every_round(report: dict[str, Any]) -> None:
    assert list(report["methods"]) == ["base", "lora", "peft_lily", "lily"]
    for result in report["methods"].values():
        for phase in ("forward", "step"):
            assert len(result[phase]["samples_s"]) == 2
            assert min(result[phase]["samples_s"]) > 0
            assert result[phase]["ratio"]["median"] > 0


def test_ratios_are_taken_within_a_round(report: dict[str, Any]) -> None:
    ours, base = (report["methods"][name]["forward"]["samples_s"] for name in ("lily", "base"))
    ratio = report["methods"]["lily"]["forward"]["ratio"]
    assert ratio["median"] == pytest.approx((ours[0] / base[0] + ours[1] / base[1]) / 2)
    assert ratio["min"] <= ratio["q1"] <= ratio["median"] <= ratio["q3"] <= ratio["max"]
    assert set(report["pairs"]["step"]) == {"lily/lora", "lily/peft_lily"}


def test_every_adapter_acts_and_the_base_trains_nothing(report: dict[str, Any]) -> None:
    assert report["methods"]["base"]["parameters"] == report["methods"]["base"]["stored_bytes"] == 0
    assert report["methods"]["base"]["forward"]["output_change"] == 0
    for name in ("lora", "peft_lily", "lily"):
        assert report["methods"][name]["forward"]["output_change"] > 1e-6


def test_parameters_and_stored_bytes_are_those_of_the_adapter(report: dict[str, Any]) -> None:
    bank = inject_lily(unets.make_unet("tiny", torch.float32, CPU), LilyConfig(r=4, stride_A=2, num_B=3))
    ours, peer = report["methods"]["lily"], report["methods"]["peft_lily"]
    assert ours["parameters"] == peer["parameters"] == sum(p.numel() for p in bank.parameters())
    assert 0 <= ours["stored_bytes"] - 4 * ours["parameters"] < 30_000  # each number once, and the header
    assert peer["stored_bytes"] > 4.5 * peer["parameters"]  # PEFT stores shared tensors once for each layer


def test_command_and_versions_are_recorded(report: dict[str, Any]) -> None:
    assert report["command"].startswith("python -m benchmarks.speed --unet tiny --latent 8 ")
    assert set(report["versions"]) == {"torch", "diffusers", "peft"}
    assert report["machine"]["threads"] == torch.get_num_threads()


def test_half_precision_step_trains_float32_adapters() -> None:
    args = speed.parse_args(_args("--dtype", "bf16", "--gradient_checkpointing", "--rounds", "1"))
    unet = unets.make_unet("tiny", torch.bfloat16, CPU)
    subjects = speed.prepare(unet, args)
    before = {name: [p.clone() for p in subject.applied.parameters] for name, subject in subjects.items()}
    speed.time_forward(unet, subjects, args)
    assert all(p.dtype == torch.bfloat16 for subject in subjects.values() for p in subject.applied.parameters)
    speed.time_step(unet, subjects, args)
    for name, subject in subjects.items():
        for old, new in zip(before[name], subject.applied.parameters, strict=True):
            assert new.dtype == torch.float32
            assert not torch.equal(old, new)


def test_views_share_every_weight_and_no_module() -> None:
    unet = unets.make_unet("tiny", torch.float32, CPU)
    view = unets.share_weights(unet)
    inputs = unets.make_inputs(unet, batch=1, latent=8)
    plain = unet(**inputs).sample
    assert [p.data_ptr() for p in view.parameters()] == [p.data_ptr() for p in unet.parameters()]
    assert not set(map(id, view.modules())) & set(map(id, unet.modules()))
    applied = methods.METHODS["lily"](view, methods.AdapterOptions(r=4))
    methods.fill_zeros(applied.parameters)
    assert not torch.equal(view(**inputs).sample, plain)
    assert torch.equal(unet(**inputs).sample, plain)


def test_sdxl_geometry_is_sdxl() -> None:
    unet = unets.UNETS["sdxl"]()  # on the meta device; asserts the number of parameters
    assert sum(p.numel() for p in unet.parameters()) == unets.SDXL_PARAMETERS == 2_567_463_684


def test_method_that_changes_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "lily", methods.METHODS["base"])
    with pytest.raises(RuntimeError, match="method 'lily' does not change the UNet's output"):
        speed.run(speed.parse_args(_args("--methods", "lily", "--forward-only")))


def test_order_turns_from_round_to_round() -> None:
    seen: list[str] = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    samples = measure.interleave(calls, rounds=6, warmup=0, device=CPU)
    assert ["".join(seen[3 * k : 3 * k + 3]) for k in range(6)] == ["abc", "cba", "bca", "acb", "cab", "bac"]
    assert {len(times) for times in samples.values()} == {6}


def test_bad_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in ((["--latent", "6"], "--latent=6 must be divisible by 4"), (["--rounds", "0"], "--rounds=0")):
        with pytest.raises(SystemExit):
            speed.parse_args(given)
        assert message in capsys.readouterr().err


def test_forward_only_leaves_the_step_out() -> None:
    report = speed.run(speed.parse_args(_args("--forward-only", "--methods", "lily", "--rounds", "1")))
    assert list(report["methods"]) == ["base", "lily"]
    assert "step" not in report["methods"]["lily"]
    assert "| lily |" in speed.format_report(report)
