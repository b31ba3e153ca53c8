"""What a user calls on a diffusers pipeline (or on its UNet): load, save, mix, switch off, unload.

Argument names follow diffusers' `load_lora_weights`. Imports `checkpoint` and `inject`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import huggingface_hub
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from . import inject
from .checkpoint import WEIGHT_NAME, LilyFileError, bank_to_save, load_bank, save_bank

logger = logging.getLogger(__name__)

PipelineOrUNet: TypeAlias = DiffusionPipeline | UNet2DConditionModel


def load_lily_weights(
    pipe: PipelineOrUNet,
    pretrained_model_name_or_path: str | Path,
    *,
    adapter_name: str | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> str:
    """Load an adapter and make it the only active one.

    Args:
        pipe: an SDXL pipeline, or its UNet.
        pretrained_model_name_or_path: an adapter file, a folder that holds one, or a hub id.
        adapter_name: name for `set_lily_adapters`; by default `default_0`, `default_1` …
        weight_name: the file's name in the folder or repository, `pytorch_lily_weights.safetensors` by default.
        subfolder, revision, token, cache_dir, local_files_only: as for `load_lora_weights`.

    Returns:
        The adapter's name.

    Raises:
        LilyFileError: if there is no such file, or it cannot be used with this UNet (a ValueError).
        ValueError: if the name is taken.
    """
    unet = get_unet(pipe)
    path = _find_file(
        pretrained_model_name_or_path,
        weight_name=weight_name or WEIGHT_NAME,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    adapters = inject.get_adapters(unet)
    taken = set(adapters.banks) if adapters is not None else set()
    if adapter_name is None:
        adapter_name = next(name for i in range(len(taken) + 1) if (name := f"default_{i}") not in taken)
    load_bank(unet, path, adapter_name)
    return adapter_name


def save_lily_weights(
    pipe: PipelineOrUNet,
    save_directory: str | Path,
    *,
    adapter_name: str | None = None,
    weight_name: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter to one safetensors file, atomically.

    Args:
        pipe: a pipeline or UNet with adapters.
        save_directory: a folder, or a path that ends in `.safetensors`.
        adapter_name: which adapter; may be left out if there is only one.
        weight_name: the file's name in the folder, `pytorch_lily_weights.safetensors` by default.
        metadata: strings to store in the header, such as `instance_prompt`.

    Returns:
        The file written.

    Raises:
        ValueError: if it is not clear which adapter is meant, or `weight_name` has another ending.
        RuntimeError: if something replaced Lily's attention processors since.
        OSError: if the file cannot be written.
    """
    unet = get_unet(pipe)
    path = Path(save_directory)
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise ValueError(f"weight_name={weight_name!r} must end in .safetensors, such as 'duck.safetensors'.")
    bank = bank_to_save(unet, adapter_name)
    base_model = str(getattr(pipe.config, "_name_or_path", None) or "unknown")
    return save_bank(bank, path / weight_name if weight_name else path, {"base_model": base_model, **(metadata or {})})


def unload_lily_weights(pipe: PipelineOrUNet) -> None:
    """Take all adapters off; the UNet is as it was before the first was loaded."""
    inject.remove_lily(get_unet(pipe))


def set_lily_adapters(
    pipe: PipelineOrUNet, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
) -> None:
    """Apply these adapters together and no others.

    It also puts Lily's attention processors back where a later call, such as `set_attn_processor`,
    replaced them.

    Args:
        pipe: a pipeline or UNet with adapters.
        adapter_names: one name or several.
        adapter_weights: strength of each (one number serves all), 1.0 by default.

    Raises:
        ValueError: if a name is unknown or given twice, or there are more or fewer weights than names.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    if isinstance(adapter_weights, int | float):
        adapter_weights = [adapter_weights] * len(names)
    inject.activate(get_unet(pipe), names, adapter_weights)


def get_lily_adapters(pipe: PipelineOrUNet) -> dict[str, float]:
    """Return every loaded adapter with its strength; 0.0 says that it is loaded but not active."""
    adapters = inject.get_adapters(get_unet(pipe))
    if adapters is None:
        return {}
    strengths = {id(bank): weight for bank, weight in adapters.active.banks}
    return {name: strengths.get(id(bank), 0.0) for name, bank in adapters.banks.items()}


def delete_lily_adapter(pipe: PipelineOrUNet, adapter_name: str) -> None:
    """Take one adapter off and free its memory.

    Raises:
        ValueError: if there is no adapter of that name.
    """
    inject.remove_lily(get_unet(pipe), adapter_name)


@contextmanager
def lily_disabled(pipe: PipelineOrUNet) -> Iterator[None]:
    """Run the base model inside the block."""
    with inject.disabled(get_unet(pipe)):
        yield


def get_unet(pipe: Any) -> UNet2DConditionModel:
    """Return the UNet of a pipeline, or the UNet itself, also from inside `torch.compile`'s wrapper.

    Raises:
        TypeError: if there is no UNet to be found.
    """
    unet = getattr(pipe, "unet", pipe)
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(
            f"{type(pipe).__name__} has no UNet2DConditionModel; Lily works on SDXL pipelines and their UNets."
        )
    return unet


def _find_file(name_or_path: str | Path, *, weight_name: str, subfolder: str | None, **hub: Any) -> Path:
    """Resolve a file, a folder or a hub id to a local file."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        path = path / (subfolder or "")
        if not (path / weight_name).is_file():
            others = sorted(file.name for file in path.glob("*.safetensors"))
            hint = "pass the output_dir of a training run"
            if "pytorch_lora_weights.safetensors" in others:
                hint = "it holds a LoRA, which loads with pipe.load_lora_weights()"
            elif others:
                hint = f"it holds {', '.join(others)}: pass one as weight_name"
            raise LilyFileError(f"the folder {path} holds no {weight_name}; {hint}.")
        return path / weight_name
    try:
        return Path(huggingface_hub.hf_hub_download(str(name_or_path), weight_name, subfolder=subfolder, **hub))
    except (HFValidationError, LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LilyFileError(
            f"'{name_or_path}' is neither a file nor a folder here, and as a hub id it gave no {weight_name} "
            f"({reason}); "
            "check the path or the id."
        ) from error
