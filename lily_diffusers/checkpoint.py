"""The adapter file: save, read, load.

One safetensors file, each tensor once; its header's metadata holds all that loading needs. See
`bank.LilyBank.named_tensors` for the keys. Imports `config`, `bank`, `inject` and `files`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor

from .bank import LilyBank
from .config import LilyConfig
from .files import write_atomically
from .inject import add_bank, check_attached, get_adapters, remove_lily

WEIGHT_NAME = "pytorch_lily_weights.safetensors"
FORMAT = "lily_diffusers"
FORMAT_VERSION = 1


class LilyFileError(ValueError):
    """A file that cannot be used as a Lily adapter; the message says why and what to do."""


@dataclass(frozen=True)
class Header:
    """What an adapter file says of itself.

    Attributes:
        config: the adapter's configuration.
        metadata: all of the header's metadata: `format`, `format_version`, `lily_config`, `base_model`
            and what the trainer wrote (`steps`, `instance_prompt`, library versions …).
    """

    config: LilyConfig
    metadata: dict[str, str]


def save_bank(bank: LilyBank, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a bank to a file, atomically.

    Args:
        bank: the adapter.
        path: the file, or a folder (existing, or a name without `.safetensors`) for `WEIGHT_NAME` in it.
        metadata: more strings for the header.

    Returns:
        The file written.

    Raises:
        OSError: if it cannot be written.
    """
    path = path if path.suffix == ".safetensors" and not path.is_dir() else path / WEIGHT_NAME
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in bank.named_tensors().items()}
    header = {
        **{f"{library}_version": version(library) for library in ("torch", "diffusers")},
        **{key: str(value) for key, value in (metadata or {}).items()},
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "lily_config": bank.config.to_json(),
    }

    def write(partial: Path) -> None:
        safetensors.torch.save_file(tensors, partial, metadata=header)
        _sort_metadata(partial)

    write_atomically(path, write)
    return path


def _sort_metadata(path: Path) -> None:
    """Put the header's metadata in order: safetensors writes it in another one each time, and bytes should repeat."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def read_header(path: str | Path) -> Header:
    """Read what an adapter file says of itself, without its tensors.

    Raises:
        LilyFileError: if the file is missing, truncated, not a Lily adapter, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise LilyFileError(f"there is no file {path}; pass an adapter file or a folder that holds {WEIGHT_NAME}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise LilyFileError(
            f"{path} is truncated or not a safetensors file ({error}); copy or download it again."
        ) from error
    if metadata.get("format") != FORMAT:
        raise LilyFileError(
            f"{path} is not a Lily adapter: its header has format={metadata.get('format')!r}, not {FORMAT!r}. "
            "LoRA files load with pipe.load_lora_weights()."
        )
    found = metadata.get("format_version", "")
    if not found.isdigit() or int(found) > FORMAT_VERSION:
        raise LilyFileError(
            f"{path} has format version {found!r}, and this lily-diffusers reads up to {FORMAT_VERSION}; "
            "upgrade it with "
            "pip install -U lily-diffusers."
        )
    try:
        return Header(LilyConfig.from_json(metadata.get("lily_config", "")), metadata)
    except ValueError as error:
        raise LilyFileError(f"{path} cannot be used: {error}") from error


def load_bank(unet: UNet2DConditionModel, path: Path, adapter_name: str) -> LilyBank:
    """Put the adapter of a file on a UNet, in the UNet's dtype, frozen, as the only active one.

    Args:
        unet: the UNet.
        path: the adapter file.
        adapter_name: under which to find it again.

    Returns:
        The bank.

    Raises:
        LilyFileError: if the file cannot be read, or was made for another geometry; the UNet is then as
            it was before.
    """
    header = read_header(path)
    tensors = safetensors.torch.load_file(path)
    adapters = get_adapters(unet)
    before = list(adapters.active.banks) if adapters is not None else []
    bank = add_bank(unet, header.config, adapter_name, torch.Generator())
    try:
        fill_bank(bank, tensors, f"{path}, trained on {header.metadata.get('base_model', 'an unnamed base')},")
    except LilyFileError:
        remove_lily(unet, adapter_name)
        if adapters is not None:
            adapters.active.banks = before
        raise
    bank.to(unet.dtype).requires_grad_(False)
    return bank


def fill_bank(bank: LilyBank, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a bank by name.

    Args:
        bank: the bank to fill.
        tensors: as `LilyBank.named_tensors` names them.
        source: where they come from, for the error.

    Raises:
        LilyFileError: naming all missing, unexpected and wrongly shaped keys together.
    """
    wanted = bank.named_tensors()
    problems = [f"missing {name} {tuple(wanted[name].shape)}" for name in wanted.keys() - tensors.keys()]
    problems += [f"unexpected {name} {tuple(tensors[name].shape)}" for name in tensors.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} where this UNet needs {tuple(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if wanted[name].shape != tensors[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise LilyFileError(
            f"{source} was made for a UNet of another geometry than this one; load it into the base model that it was "
            f"trained on ({len(problems)} keys differ: {shown})."
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def bank_to_save(unet: UNet2DConditionModel, adapter_name: str | None) -> LilyBank:
    """Choose the bank that a save means, and check that it still acts.

    Args:
        unet: the UNet.
        adapter_name: which one; None if there is only one.

    Raises:
        ValueError: if there is none, or several and no name.
        RuntimeError: if something replaced Lily's attention processors.
    """
    adapters = get_adapters(unet)
    names = list(adapters.banks) if adapters is not None else []
    if adapters is None or (adapter_name is not None and adapter_name not in names):
        raise ValueError(
            f"no adapter named {adapter_name!r} to save; loaded are {', '.join(map(repr, names)) or 'none'}."
        )
    if adapter_name is None and len(names) != 1:
        raise ValueError(
            f"there are {len(names)} adapters ({', '.join(names)}); say which one to save with adapter_name."
        )
    check_attached(unet)
    return adapters.bank(adapter_name or names[0])
