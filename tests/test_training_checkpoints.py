"""Which checkpoints are kept, found and passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from lily_diffusers import LilyConfig, inject_lily
from lily_diffusers.checkpoint import WEIGHT_NAME, read_header
from lily_diffusers.training.checkpoints import Checkpoints, all_checkpoints, check_output, find_last, is_whole
from lily_diffusers.training.config import TrainingConfig, TrainingError
from tests.conftest import perturb


@pytest.fixture
def make(unet: UNet2DConditionModel, tmp_path: Path):
    """Make the checkpoints of a run with a real accelerator, UNet and optimiser."""

    def build(**options) -> Checkpoints:
        accelerator = Accelerator(cpu=True)
        bank = inject_lily(unet, LilyConfig(r=4))
        accelerator.prepare(unet, torch.optim.AdamW(bank.parameters()))
        values = {"instance_data_dir": "photos", "instance_prompt": "a photo of sks toy", "output_dir": str(tmp_path)}
        config = TrainingConfig(**{"pretrained_model_name_or_path": "tiny"} | values | options)
        return Checkpoints(accelerator, bank, config, ["a.png"], {"instance_prompt": config.instance_prompt})

    return build


def names(folder: Path) -> list[str]:
    return [path.name for path in all_checkpoints(folder)]


def test_the_newest_are_kept(make, tmp_path: Path) -> None:
    checkpoints = make(checkpoints_total_limit=2)
    for step in (8, 9, 10, 11):
        checkpoints.save(step)
        checkpoints.prune()
    assert names(tmp_path) == ["checkpoint-11", "checkpoint-10"]
    assert not list(tmp_path.glob(".*"))


def test_pruning_never_counts_a_half_written_checkpoint_as_kept(make, tmp_path: Path) -> None:
    checkpoints = make(checkpoints_total_limit=1)
    checkpoints.save(40)
    (tmp_path / "checkpoint-40" / WEIGHT_NAME).write_bytes(b"half")
    checkpoints.save(30)  # resumed from 20, because 40 is not whole
    checkpoints.prune()
    assert names(tmp_path) == ["checkpoint-40", "checkpoint-30"]
    assert find_last(tmp_path) == tmp_path / "checkpoint-30"


def test_the_one_before_stays_until_the_newest_has_proved_itself(make, tmp_path: Path) -> None:
    checkpoints = make(checkpoints_total_limit=1)
    checkpoints.save(1)
    checkpoints.prune()
    checkpoints.save(2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-1"]
    assert find_last(tmp_path, before=2) == tmp_path / "checkpoint-1"
    checkpoints.prune()
    assert names(tmp_path) == ["checkpoint-2"]


def test_half_written_checkpoints_of_the_past_are_removed(make, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    checkpoints = make(checkpoints_total_limit=2)
    checkpoints.save(4)
    checkpoints.prune()
    assert names(tmp_path) == ["checkpoint-4"]


def test_a_save_that_fails_keeps_the_last_one_and_names_it(make, tmp_path: Path) -> None:
    checkpoints = make()
    checkpoints.save(1)
    (tmp_path / ".checkpoint-2.partial").write_text("in the way")
    with pytest.raises(TrainingError, match=r"cannot write .*checkpoint-2 .* resume from checkpoint-1\."):
        checkpoints.save(2)
    assert is_whole(tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_checkpoint_is_an_adapter_that_says_where_it_comes_from(make, tmp_path: Path) -> None:
    make().save(7)
    header = read_header(tmp_path / "checkpoint-7" / WEIGHT_NAME)
    assert header.metadata["steps"] == "7"
    assert header.metadata["instance_prompt"] == "a photo of sks toy"


def test_resuming_brings_the_adapter_back(make, tmp_path: Path) -> None:
    checkpoints = make(resume_from_checkpoint="latest")
    assert checkpoints.resume() == 0
    perturb(checkpoints.bank)
    expected = {name: tensor.clone() for name, tensor in checkpoints.bank.named_tensors().items()}
    checkpoints.save(3)
    perturb(checkpoints.bank, seed=2)
    assert checkpoints.resume() == 3
    assert all(torch.equal(expected[name], tensor) for name, tensor in checkpoints.bank.named_tensors().items())


def test_an_old_folder_is_not_started_over(make, tmp_path: Path) -> None:
    checkpoints = make()
    checkpoints.save(5)
    with pytest.raises(TrainingError, match="holds checkpoint-5 of an earlier run"):
        check_output(checkpoints.config)
    checkpoints.config.resume_from_checkpoint = "latest"
    check_output(checkpoints.config)


def test_an_output_folder_that_cannot_be_written_is_named(make, tmp_path: Path) -> None:
    config = make(output_dir=str(tmp_path / "new")).config
    check_output(config)
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    config.output_dir = str(tmp_path / "file")
    with pytest.raises(TrainingError, match="--output_dir=.*file is a file and cannot be written to"):
        check_output(config)
