"""The quality benchmark: equal noise, scores, kept cells, the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from PIL import Image

from benchmarks import BenchError, contenders, quality, quality_report, quality_score
from benchmarks.methods import METHODS, AdapterOptions, fill_zeros
from benchmarks.quality_cell import Bench, Cell, Settings, draw, embed, load_bench, run_cell, train
from benchmarks.quality_store import Store
from benchmarks.toyworld.model import make_pipeline
from benchmarks.toyworld.scorer import Scorer, save_scorer
from benchmarks.toyworld.subjects import SUBJECTS, TUNING, new_places, subject_places, true_pictures
from benchmarks.unets import share_weights

TRAINED = [name for name in contenders.CONTENDERS if name != "base"]
TINY = Settings(steps=2, batch=2, warmup=1, pictures=2, sampling_steps=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy base with random weights, in diffusers' folder format."""
    folder = tmp_path_factory.mktemp("toy-sdxl")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Weights of two random scorers."""
    files = []
    for seed in range(2):
        torch.manual_seed(seed)
        files.append(tmp_path_factory.mktemp("scorers") / f"{seed}.safetensors")
        save_scorer(Scorer(), files[-1])
    return files


@pytest.fixture(scope="module")
def bench(base: Path, scorer_files: list[Path]) -> Bench:
    """The random base with a random scorer."""
    return load_bench(base, scorer_files[0])


# Learning rates


def test_rate_of_the_highest_mean_is_chosen_and_a_failure_rules_one_out() -> None:
    choice = quality.choose_rate({1e-3: [0.2, 0.4], 2e-3: [0.5, 0.3], 4e-3: [0.9, None]})
    assert choice.rate == 2e-3 and not choice.at_edge
    assert choice.tried == {1e-3: pytest.approx(0.3), 2e-3: pytest.approx(0.4), 4e-3: None}
    assert quality.choose_rate({2e-3: [0.4], 1e-3: [0.4]}) == quality.Choice(1e-3, {1e-3: 0.4, 2e-3: 0.4}, True)
    with pytest.raises(ValueError, match="training failed at every learning rate of \\[0.1\\]; pass lower --rates"):
        quality.choose_rate({0.1: [None]})


# Prompts and scores


@pytest.mark.parametrize("subject", ["teapot", "robot", "toy05"])
def test_prompts_ask_for_what_the_photos_do_not_show(subject: str, bench: Bench) -> None:
    prompts = quality_score.evaluation_prompts(subject)
    places = [prompt.asked for prompt in prompts if prompt.purpose == "place"]
    assert len(places) == 6 and not set(places) & set(subject_places(subject))
    assert prompts[0].text.startswith("a photo of sks toy ")
    edits = quality_score.edit_colours(subject)
    body = SUBJECTS[subject].paints[0].colour
    nearest = min(
        quality_score.COLOURS, key=lambda c: float(np.linalg.norm(np.subtract(quality_score.COLOURS[c], body)))
    )
    assert len(edits) == 3 and nearest not in edits
    tokens = bench.pipe.tokenizer([prompt.text for prompt in prompts]).input_ids
    assert max(map(len, tokens)) <= bench.pipe.tokenizer.model_max_length
    assert embed(bench, prompts[0].text) is embed(bench, prompts[0].text)


def test_scores_are_those_of_a_naive_count(bench: Bench) -> None:
    scorer, rng = bench.scorer, np.random.default_rng(0)
    prompts = quality_score.evaluation_prompts("teapot")
    pictures = np.concatenate([true_pictures(SUBJECTS["teapot"], new_places("teapot"), seed)[0] for seed in range(5)])
    pictures = pictures[: 2 * len(prompts)]
    other = rng.permutation(pictures)
    scores = quality_score.score_pictures(scorer, "teapot", pictures, other)
    reading, was = scorer.read(pictures), scorer.read(other)
    reference = quality_score.reference(scorer, "teapot")
    places = [float(reading.identity[i] @ reference) for i in range(12)]
    right = [reading.places[i] == prompts[i // 2].asked for i in range(12)]
    assert scores["identity"] == pytest.approx(np.mean(places), abs=1e-6)
    assert scores["place"] == pytest.approx(np.mean(right))
    recoloured = [reading.colours[i] == prompts[i // 2].asked for i in range(12, 18)]
    assert scores["colour"] == pytest.approx(np.mean(recoloured))
    assert scores["kind_kept"] == pytest.approx(np.mean([reading.kinds[i] == was.kinds[i] for i in range(18, 26)]))
    assert scores["drift"] == pytest.approx(np.abs(pictures[18:] / 255 - other[18:] / 255).mean(), abs=1e-6)
    apart = [np.abs(pictures[i] / 255 - pictures[i + 1] / 255).mean() for i in range(0, 12, 2)]
    assert scores["diversity"] == pytest.approx(np.mean(apart), abs=1e-6)
    assert scores["fidelity"] == pytest.approx((scores["identity"] + scores["place"]) / 2)


def test_base_does_not_drift_from_itself_and_one_picture_has_no_spread(bench: Bench) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (13, 64, 64, 3), np.uint8)
    scores = quality_score.score_pictures(bench.scorer, "robot", pictures, pictures)
    assert (scores["drift"], scores["kind_kept"], scores["diversity"]) == (0.0, 1.0, None)
    with pytest.raises(ValueError, match="12 pictures and 12 of the base do not fit 13 prompts of 'robot'"):
        quality_score.score_pictures(bench.scorer, "robot", pictures[1:], pictures[1:])


# One cell


def _first_losses(bench: Bench, name: str, seed: int) -> list[float]:
    contender = contenders.CONTENDERS[name]
    view = share_weights(bench.pipe.unet)
    applied = METHODS[contender.method](view, AdapterOptions(2, 2, 3, contender.router, contender.init))
    return train(bench, view, applied, Cell("teapot", seed, name, 1, 1e-3), TINY).losses


def test_all_contenders_start_as_the_base_and_see_the_same_noise(bench: Bench) -> None:
    losses = {name: _first_losses(bench, name, seed=3) for name in TRAINED}
    for first, second in losses.values():
        assert first == pytest.approx(losses["lora"][0], rel=1e-5)
        assert second != first
    assert _first_losses(bench, "lora", seed=4)[0] != pytest.approx(losses["lora"][0], rel=1e-3)


def test_loss_that_is_not_finite_is_a_result(bench: Bench) -> None:
    settings = Settings(**{**vars(TINY), "steps": 6})
    figures, pictures = run_cell(bench, Cell("teapot", 0, "lora", 1, 1e30, AdapterOptions(1)), settings)
    assert str(figures["failed"]).startswith("loss ") and "at step " in str(figures["failed"])
    assert len(pictures) == 0 and figures["final_loss"] is None
    view = share_weights(bench.pipe.unet)
    applied = METHODS["lora"](view, AdapterOptions(1))
    broken = dataclasses.replace(applied, parameters=[*applied.parameters, torch.nn.Parameter(torch.tensor(np.inf))])
    assert (
        train(bench, view, broken, Cell("teapot", 0, rate=1e-3), TINY).failed == "a weight is not finite after step 2"
    )


@pytest.mark.parametrize("name", TRAINED)
def test_an_untrained_contender_draws_the_bases_pictures(bench: Bench, name: str) -> None:
    contender, view = contenders.CONTENDERS[name], share_weights(bench.pipe.unet)
    METHODS[contender.method](view, AdapterOptions(2, 2, 3, contender.router, contender.init))
    drawn = draw(bench, view.eval(), "teapot", 0, TINY)
    base = draw(bench, bench.pipe.unet, "teapot", 0, TINY)
    assert np.abs(drawn.astype(int) - base).max() <= (1 if name == "token-zero_sum" else 0)  # zero_sum: to rounding


def test_expert_figures_of_pefts_lily_are_those_of_its_parts(bench: Bench) -> None:
    view = share_weights(bench.pipe.unet)
    applied = METHODS["peft_lily"](view, AdapterOptions(2, 2, 3))
    fill_zeros(applied.parameters)
    inside = {id(p): p for name, p in view.named_parameters() if ".lily_B." in name}
    assert len(applied.experts) == len(inside)
    assert {tuple(B.shape) for B in applied.experts} == {(3, 2, p.shape[1]) for p in inside.values()}
    one = next(module for module in view.modules() if isinstance(module, peft.tuners.lily.Linear))
    assert torch.equal(applied.experts[0].flatten(0, 1), one.lily_B["default"].weight)
    assert applied.record_routing is not None
    x = torch.randn(2, 5, one.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), applied.record_routing() as routing:
        one(x)
        logits = one.lily_router["default"](one.lily_A["default"](x))
    assert list(routing) == [0]
    torch.testing.assert_close(routing[0], logits.softmax(-1).mean((0, 1))[None])
    assert one(x) is not None and list(routing) == [0]


def test_the_base_has_no_expert_figures_and_is_left_alone(bench: Bench) -> None:
    before = bench.pipe.unet
    ours, pictures = run_cell(bench, Cell("teapot", 0, "token-staggered", 1, 1e-3, AdapterOptions(2, 2, 3)), TINY)
    base, untrained = run_cell(bench, Cell("teapot", 0), TINY)
    assert bench.pipe.unet is before and not any(p.requires_grad for p in before.parameters())
    assert pictures.shape == untrained.shape == (26, 64, 64, 3) and pictures.dtype == np.uint8
    assert not np.array_equal(pictures, untrained)
    peers, _ = run_cell(bench, Cell("teapot", 0, "peft_lily", 1, 1e-3, AdapterOptions(2, 2, 3)), TINY)
    for figures in (ours, peers):
        assert 0 <= figures["expert_similarity"] <= 1 and 0 < figures["routing_entropy"] <= 1  # type: ignore[operator]
    assert base["expert_similarity"] is base["routing_entropy"] is base["final_loss"] is None
    assert (base["parameters"], base["train_seconds"]) == (0, 0.0)


# The whole


def _given(bench: Bench, work: Path, *more: str) -> list[str]:
    return [
        "--base", str(bench.base), "--scorer", str(bench.scorer_file), "--work", str(work), "--subjects", "teapot",
        "--seeds", "1", "--contenders", "lora", "--budgets", "1", "--rates", "1e-3", "--steps", "2", "--batch", "2",
        "--warmup", "1", "--pictures", "1", "--sampling_steps", "1", *more,
    ]  # fmt: skip


def _run(bench: Bench, work: Path, *more: str) -> dict[str, Any]:
    return quality.run(quality.parse_args(_given(bench, work, *more)))


def _times(work: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in work.iterdir()}


def test_report_holds_every_figure_and_a_second_run_runs_nothing(bench: Bench, tmp_path: Path) -> None:
    work, files = tmp_path / "work", {kind: tmp_path / f"quality.{kind}" for kind in ("json", "markdown", "jpg")}
    given = ["--contenders", "lora", "token-staggered", "--json", str(files["json"])]
    given += ["--markdown", str(files["markdown"]), "--sheet", str(files["jpg"])]
    quality.main(_given(bench, work, *given))
    report = json.loads(files["json"].read_text())
    assert report["command"].startswith("python -m benchmarks.quality --base ")
    part = report["budgets"]["1"]
    assert list(part["summary"]) == ["base", "lora", "token-staggered"]
    assert part["parameters"] == part["fits"]["lora"]["parameters"] == 33_984
    for name, result in part["summary"].items():
        assert (result["cells"], result["failed"]) == (1, {})
        assert -1 <= result["metrics"]["identity"]["mean"] <= 1
        assert set(result["differences"]) == (set() if name == "lora" else set(quality_report.PAIRED))
        assert f"| {contenders.CONTENDERS[name].label} |" in files["markdown"].read_text()
    drift = {name: result["metrics"]["drift"]["mean"] for name, result in part["summary"].items()}
    assert drift["base"] == 0 < drift["lora"]
    assert [record["cell"]["contender"] for record in report["cells"]] == ["base", "lora", "token-staggered"]
    with Image.open(files["jpg"]) as sheet:
        assert (sheet.format, sheet.size) == ("JPEG", (190 + 4 * 132, 58 + 13 * 132))

    before = _times(work)
    assert len(before) == 9  # figures, scores and pictures of three cells
    quality.main(_given(bench, work, *given))
    assert json.loads(files["json"].read_text()) == report
    assert _times(work) == before
    next(work.glob("teapot-seed0-lora-*.scores-*.json")).unlink()
    next(path for path in work.glob("teapot-seed0-lora-*.json") if ".scores" not in path.name).unlink()
    quality.main(_given(bench, work, *given))
    after = _times(work)
    assert set(after) == set(before)
    assert {name for name in before if after[name] != before[name]} == {n for n in before if "-lora-" in n}


def test_new_scorer_reads_the_old_pictures_and_new_steps_train_anew(
    bench: Bench, scorer_files: list[Path], tmp_path: Path
) -> None:
    first = _run(bench, tmp_path)
    before = _times(tmp_path)
    second = _run(bench, tmp_path, "--scorer", str(scorer_files[1]))
    assert before.items() < _times(tmp_path).items()  # scores were added, nothing was written anew
    identity = [r["budgets"]["1"]["summary"]["lora"]["metrics"]["identity"]["mean"] for r in (first, second)]
    assert identity[0] != identity[1]
    _run(bench, tmp_path, "--steps", "1")
    assert len(list(tmp_path.glob("*.png"))) == 4  # base and LoRA, twice


def test_rates_are_chosen_on_other_subjects_and_shown(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _run(bench, tmp_path, "--rates", "1e30", "1e-3", "--tuning_subjects", "toy00", "--steps", "3")
    fit = report["budgets"]["1"]["fits"]["lora"]
    assert fit["rate"] == 1e-3 and fit["at_edge"] and fit["tuning"]["1e+30"] is None
    assert "lora learns at 0.001 (fidelity at 0.001: " in capsys.readouterr().out
    text = quality_report.format_report(report | {"command": "python -m benchmarks.quality"})
    assert "0.001 (edge of the grid)" in text and "fidelity at 0.001 | fidelity at 1e+30 |" in text
    assert {record["cell"]["subject"] for record in report["cells"]} == {"teapot"}
    assert report["bounds"]["true renders (upper bound)"]["n"] == 1  # of the reported subject alone
    assert {record["cell"]["subject"] for record in report["tuning_cells"]} == {"toy00"}
    assert "| true renders through the VAE (ceiling) | " in text


def test_a_cells_files_are_named_after_all_that_it_follows_from(tmp_path: Path) -> None:
    cell, store = Cell("teapot", 0, "lora", 1, 1e-3, AdapterOptions(1)), Store(tmp_path, TINY, "base", "scorer")
    others = [
        (dataclasses.replace(store, base="other"), cell),
        (dataclasses.replace(store, settings=dataclasses.replace(TINY, guidance=3.0)), cell),
        *((store, dataclasses.replace(cell, **{field: value})) for field, value in (
            ("subject", "robot"), ("seed", 1), ("contender", "peft_lily"), ("budget", 4), ("rate", 2e-3),
            ("options", AdapterOptions(2)),
        )),
    ]  # fmt: skip
    paths = {where.path(what, ".json") for where, what in [(store, cell), *others]}
    assert len(paths) == len(others) + 1
    assert store.path(cell, ".json") == dataclasses.replace(store, scorer="other").path(cell, ".json")


def test_pictures_that_are_gone_are_named(bench: Bench, tmp_path: Path) -> None:
    _run(bench, tmp_path)
    lost = next(tmp_path.glob("teapot-seed0-base-*.png"))
    lost.unlink()
    next(tmp_path.glob("teapot-seed0-lora-*.scores-*.json")).unlink()
    with pytest.raises(BenchError, match=f"{lost} is missing, though it is needed here; remove .*json"):
        _run(bench, tmp_path)


def test_two_jobs_give_the_figures_of_one(bench: Bench, tmp_path: Path) -> None:
    both = ("--contenders", "lora", "token-zero")
    alone = _run(bench, tmp_path / "one", *both)
    together = _run(bench, tmp_path / "two", *both, "--jobs", "2")
    assert len(alone["cells"]) == 3
    for one, two in zip(alone["cells"], together["cells"], strict=True):
        assert one["cell"] == two["cell"]
        assert two["scores"] == pytest.approx(one["scores"], abs=1e-5)


# The command line


def test_bad_options_are_named(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        (["--seeds", "0"], "--seeds=0 must be at least 1"),
        (["--rates", "0.001", "-1"], "--rates 0.001 -1.0 must all be above 0"),
        (["--subjects", TUNING[0]], f"invalid choice: '{TUNING[0]}'"),
    ):
        with pytest.raises(SystemExit):
            quality.parse_args(given)
        assert message in capsys.readouterr().err
    for flag, message in (("--base", "holds no model_index.json; pass a pipeline"), ("--scorer", "is not there")):
        with pytest.raises(SystemExit, match=f"benchmarks.quality: {flag}={tmp_path} {message}"):
            quality.main(_given(bench, tmp_path / "work", flag, str(tmp_path)))
