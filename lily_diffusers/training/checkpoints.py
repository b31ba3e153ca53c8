"""Checkpoints to resume from: written whole or not at all, found again, pruned.

A checkpoint is a folder `checkpoint-{step}` with accelerate's state, the adapter in its own format, and
`checkpoint.json`, which lists every file with its size: that is how a half-written folder is told from a
whole one. Imports `checkpoint`, `bank`, `files` and `config` of this package.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from pathlib import Path

import safetensors.torch
from accelerate import Accelerator

from ..bank import LilyBank
from ..checkpoint import WEIGHT_NAME, fill_bank, save_bank
from ..files import write_atomically
from .config import TrainingConfig, TrainingError

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
_NAME = re.compile(r"checkpoint-\d+")
_MAY_CHANGE = {
    "output_dir", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
    "validation_prompt", "validation_steps", "num_validation_images", "num_inference_steps", "report_to", "logging_dir",
    "logging_steps", "gradient_checkpointing", "allow_tf32",
}  # fmt: skip
"""Options that a resumed run may be given anew; with any other one changed it would not be the run it continues."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        accelerator: whose state is saved; `bank` is saved instead of the models prepared with it.
        bank: the adapter that is trained.
        config: the run's options.
        photos: names of the photos, which a resumed run must have again.
        metadata: for the adapter in each checkpoint, beside the number of steps.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        bank: LilyBank,
        config: TrainingConfig,
        photos: list[str],
        metadata: dict[str, str],
    ) -> None:
        self.accelerator, self.bank, self.config = accelerator, bank, config
        self.photos, self.metadata = photos, metadata
        self._step = 0
        accelerator.register_save_state_pre_hook(self._save_adapter_instead)
        accelerator.register_load_state_pre_hook(self._load_adapter_instead)

    def save(self, step: int) -> None:
        """Write `checkpoint-{step}`; all processes call it.

        Raises:
            TrainingError: if it cannot be written; earlier checkpoints are untouched.
        """
        folder = self.config.output / f"checkpoint-{step}"
        partial = self.config.output / f".checkpoint-{step}.partial"
        main = self.accelerator.is_main_process
        self._step = step
        try:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()
            if main:
                self._write_manifest(partial, step)
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            last = find_last(self.config.output)
            raise TrainingError(
                f"cannot write {folder} ({error}); free some space and resume from "
                f"{last.name if last else 'the start: there is no earlier checkpoint'}."
            ) from error

    def resume(self) -> int:
        """Load the checkpoint that `--resume_from_checkpoint` means.

        Returns:
            The step it was written after; 0 if 'latest' finds none.

        Raises:
            TrainingError: if a named checkpoint is not there or not whole, or is of another run.
        """
        wanted = self.config.resume_from_checkpoint
        if wanted is None:
            return 0
        folder = find_last(self.config.output) if wanted == "latest" else self._named(wanted)
        if folder is None:
            logger.warning(
                "--resume_from_checkpoint=latest: no whole checkpoint in %s; starting anew", self.config.output
            )
            return 0
        manifest = json.loads((folder / MANIFEST).read_text())
        self._check_same_run(folder, manifest)
        self.accelerator.load_state(str(folder))
        logger.info("resumed from %s", folder)
        return int(manifest["step"])

    def _named(self, wanted: str) -> Path:
        folder = next((path for path in (self.config.output / wanted, Path(wanted)) if path.is_dir()), None)
        if folder is None or not is_whole(folder):
            state = "is half written" if folder is not None else "is not there"
            raise TrainingError(
                f"--resume_from_checkpoint={wanted} {state}; use 'latest' for the last whole checkpoint."
            )
        return folder

    def _check_same_run(self, folder: Path, manifest: dict) -> None:
        now = self._describe_run()
        changed = [
            f"{name} was {before!r} and is {now[name]!r}"
            for name, before in manifest["run"].items()
            if now.get(name) != before
        ]
        if changed:
            raise TrainingError(
                f"{folder} belongs to a run with other options: {'; '.join(changed)}. Set them back, "
                "or start anew in another "
                "--output_dir."
            )

    def _describe_run(self) -> dict[str, object]:
        run = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in _MAY_CHANGE}
        run |= {"mixed_precision": self.accelerator.mixed_precision, "photos": self.photos}
        return run | {"num_processes": self.accelerator.num_processes} | dataclasses.asdict(self.bank.config)

    def _write_manifest(self, folder: Path, step: int) -> None:
        files = {
            str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()
        }
        text = json.dumps({"step": step, "run": self._describe_run(), "files": files}, indent=1)
        write_atomically(folder / MANIFEST, lambda path: path.write_text(text))

    def prune(self) -> None:
        """Delete checkpoints beyond the limit, once the newest has proved itself in a step with a finite loss.

        Half-written ones do not count as kept, and go if they are older than the newest of this run.
        """
        limit, step, self._step = self.config.checkpoints_total_limit, self._step, 0
        if limit is None or not step or not self.accelerator.is_main_process:
            return
        done = [folder for folder in all_checkpoints(self.config.output) if step_of(folder) <= step]
        kept = [folder for folder in done if is_whole(folder)][:limit]
        for folder in set(done) - set(kept):
            shutil.rmtree(folder, ignore_errors=True)

    def _save_adapter_instead(self, models: list, weights: list, output_dir: str) -> None:
        weights.clear()  # of the frozen UNet; nothing else is prepared as a model
        if self.accelerator.is_main_process:
            save_bank(self.bank, Path(output_dir) / WEIGHT_NAME, self.metadata | {"steps": str(self._step)})

    def _load_adapter_instead(self, models: list, input_dir: str) -> None:
        models.clear()
        path = Path(input_dir) / WEIGHT_NAME
        fill_bank(self.bank, safetensors.torch.load_file(path), str(path))


def all_checkpoints(output: Path) -> list[Path]:
    """List the checkpoint folders of a run, the newest first, whole or not."""
    return sorted(
        (path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=step_of, reverse=True
    )


def step_of(folder: Path) -> int:
    """Return the number of optimiser steps in a checkpoint folder's name."""
    return int(folder.name.removeprefix("checkpoint-"))


def is_whole(folder: Path) -> bool:
    """Whether every file that the checkpoint's manifest lists is there in full."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def find_last(output: Path, before: int | None = None) -> Path | None:
    """Return the newest whole checkpoint, saying which newer ones are half written.

    Args:
        output: the run's folder.
        before: only checkpoints of fewer optimiser steps count; None: all.
    """
    for folder in all_checkpoints(output):
        if before is not None and step_of(folder) >= before:
            continue
        if is_whole(folder):
            return folder
        logger.warning("%s is half written and is not used", folder)
    return None


def check_output(config: TrainingConfig) -> None:
    """Make the output folder and prove, before anything slow, that it can be written and is not another run's.

    Raises:
        TrainingError: if it cannot, or if nothing is to be resumed and it holds checkpoints.
    """
    output = config.output
    probe = output / f".write-probe-{os.getpid()}"  # each process its own
    if output.exists() and not output.is_dir():
        raise TrainingError(
            f"--output_dir={output} is a file and cannot be written to as a folder; choose another name."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise TrainingError(f"--output_dir={output} cannot be written ({error}); choose another folder.") from error
    earlier = all_checkpoints(output)
    if earlier and config.resume_from_checkpoint is None:
        raise TrainingError(
            f"--output_dir={output} holds {earlier[0].name} of an earlier run; continue it with "
            "--resume_from_checkpoint latest, or choose another folder."
        )
