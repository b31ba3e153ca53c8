"""Make pictures for the page: keep one pipeline, answer requests one picture at a time.

Stands between the library and the page: it uses `lily_diffusers` and diffusers, and `app.ui` uses
it. It must not import Gradio, so that it can be tested, and used from a notebook, without a page.
Every error meant for the person at the page is a `GeneratorError` of one sentence.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from app.base import load_base, pick_device
from app.catalogue import GeneratorError
from lily_diffusers import delete_lily_adapter, lily_disabled, load_lily_weights, set_lily_adapters

SIZE_STEP = 8
"""Widths and heights are multiples of this (pixels): diffusers' SDXL pipeline asks for it."""

LARGEST_SIZE = 4096
"""Widths and heights end here (pixels): a slip of the finger must not take the machine's memory."""

LARGEST_SEED = 2**32 - 1

ADAPTERS_KEPT = 4
"""Adapters that stay loaded; the one not used for the longest goes first."""

OnStep = Callable[[int, int, int], None]
"""Called after each denoising step with (steps done, steps in all, index of the picture)."""

ShouldStop = Callable[[], bool]
"""Asked after each denoising step; True ends the request. Once True it must stay True."""


class _Stopped(Exception):
    """Leaves diffusers' denoising loop from its step callback; never seen by a caller."""


@dataclass(frozen=True)
class Request:
    """What one press of 'Generate' asks for.

    Args:
        prompt: what to draw.
        negative_prompt: what to keep away from; empty for nothing.
        adapter: path of an adapter file, or None for the base model.
        strength: factor on the adapter's update; 1 is as trained, 0 is the base model.
        steps: inference steps the scheduler is asked for.
        guidance: classifier-free guidance scale; 1 switches guidance off.
        width: of each picture (pixels, a multiple of 8).
        height: of each picture (pixels, a multiple of 8).
        seed: of the first picture, the others count on from it; -1 draws one.
        count: number of pictures.
        compare: also draw each picture without the adapter, from the same seed.
    """

    prompt: str
    negative_prompt: str = ""
    adapter: str | None = None
    strength: float = 1.0
    steps: int = 30
    guidance: float = 5.0
    width: int = 1024
    height: int = 1024
    seed: int = -1
    count: int = 1
    compare: bool = False


@dataclass(frozen=True)
class Picture:
    """One finished picture, the seed that draws it again, and the base model's picture if asked for."""

    image: Image.Image
    seed: int
    baseline: Image.Image | None = None


class Generator:
    """One SDXL pipeline and the adapters it has met, answering requests one picture at a time.

    Safe to call from several threads: pictures of different requests take turns.
    """

    def __init__(
        self,
        base: str | Path,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        """Load the pipeline.

        Args:
            base: folder in diffusers' format, or a hub id such as 'stabilityai/stable-diffusion-xl-base-1.0'.
            device: 'cuda', 'cuda:1', 'cpu', 'mps'; None takes CUDA where there is one.
            dtype: 'float16', 'bfloat16' or 'float32'; None takes float16 on CUDA and float32 elsewhere.
            revision: branch, tag or commit of a hub id.
            variant: file variant such as 'fp16'.

        Raises:
            GeneratorError: no such folder or model, another kind of model, or no such device.
        """
        self.base = str(base)
        self.device = pick_device(device)
        self.dtype = getattr(torch, dtype or ("float16" if self.device.type == "cuda" else "float32"))
        self.pipe: Any = load_base(self.base, self.dtype, revision, variant).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[str, tuple[int, int]]] = {}  # file -> (adapter name, mtime and size)
        self._names = 0

    @property
    def default_size(self) -> int:
        """Edge of the pictures that the model was trained for (pixels)."""
        sample = self.pipe.unet.config.sample_size
        return int(sample if isinstance(sample, int) else sample[0]) * int(self.pipe.vae_scale_factor)

    def generate(
        self, request: Request, on_step: OnStep | None = None, should_stop: ShouldStop | None = None
    ) -> Iterator[Picture]:
        """Draw the pictures of a request, each as soon as it is finished.

        A picture depends on its own seed alone, not on how many are drawn with it. A request that
        is stopped just ends; what was finished has been handed out.

        Raises:
            GeneratorError: at once for a request that cannot be met, or later when memory runs out.
        """
        check(request)
        if request.seed == -1:
            request = replace(request, seed=random.SystemRandom().randint(0, LARGEST_SEED))
        return self._pictures(request, on_step or (lambda *_: None), should_stop or (lambda: False))

    def _pictures(self, request: Request, on_step: OnStep, should_stop: ShouldStop) -> Iterator[Picture]:
        both = request.compare and request.adapter is not None
        done = 0

        def step(pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal done
            done += 1
            # Some schedulers take more steps than were asked for; the pipeline knows the true number.
            on_step(done, pipe.num_timesteps * request.count * (2 if both else 1), index)
            if should_stop():
                raise _Stopped
            return tensors

        for index in range(request.count):
            try:
                # Held for one picture and not for the request: a caller may drop this iterator half-way.
                with self._turn(should_stop):
                    picture = self._picture(request, request.seed + index, step, both)
            except _Stopped:
                return
            yield picture
            if should_stop():
                return

    def _picture(self, request: Request, seed: int, step: Callable[..., dict[str, Any]], both: bool) -> Picture:
        """Draw the picture of one seed, and its baseline; a stop in the baseline keeps the picture."""
        self._activate(request)
        picture = Picture(self._draw(request, seed, step, with_adapter=request.adapter is not None), seed)
        if not both:
            return picture
        try:
            return replace(picture, baseline=self._draw(request, seed, step, with_adapter=False))
        except _Stopped:
            return picture

    @contextmanager
    def _turn(self, should_stop: ShouldStop) -> Iterator[None]:
        """Wait for the pipeline, but not beyond a stop."""
        while not self._lock.acquire(timeout=0.1):
            if should_stop():
                raise _Stopped
        try:
            if should_stop():
                raise _Stopped
            yield
        finally:
            self._lock.release()

    def _activate(self, request: Request) -> None:
        """Make the request's adapter the only active one; load it on first use and when its file changed."""
        if request.adapter is None:
            return
        path = Path(request.adapter)
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            known = self._loaded.get(request.adapter)
            if known is None or known[1] != stamp:
                if known is not None:
                    del self._loaded[request.adapter]
                    delete_lily_adapter(self.pipe, known[0])
                self._names += 1
                name = load_lily_weights(self.pipe, path, adapter_name=f"page_{self._names}")
                known = (name, stamp)
            self._loaded.pop(request.adapter, None)
            self._loaded[request.adapter] = known  # the last used stands last
            while len(self._loaded) > ADAPTERS_KEPT:
                delete_lily_adapter(self.pipe, self._loaded.pop(next(iter(self._loaded)))[0])
        except (OSError, ValueError) as error:
            raise GeneratorError(str(error)) from error  # a sentence that names the file
        set_lily_adapters(self.pipe, self._loaded[request.adapter][0], request.strength)

    def _draw(
        self, request: Request, seed: int, step: Callable[..., dict[str, Any]], with_adapter: bool
    ) -> Image.Image:
        """Draw one picture; the noise comes from the CPU, so that a seed means the same on every device."""
        with nullcontext() if with_adapter or not self._loaded else lily_disabled(self.pipe):
            try:
                return self.pipe(
                    prompt=request.prompt,
                    negative_prompt=request.negative_prompt or None,
                    num_inference_steps=request.steps,
                    guidance_scale=request.guidance,
                    width=request.width,
                    height=request.height,
                    generator=torch.Generator("cpu").manual_seed(seed),
                    callback_on_step_end=step,
                ).images[0]
            except torch.OutOfMemoryError as error:
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                raise GeneratorError(
                    f"a picture of {request.width}x{request.height} pixels does not fit into the memory of "
                    f"{self.device}; choose a smaller width and height."
                ) from error
            finally:  # diffusers decodes in float32 and, when that fails, leaves the VAE so
                if self.pipe.vae.dtype != self.dtype:
                    self.pipe.vae.to(self.dtype)


def check(request: Request) -> None:
    """Refuse a request that cannot be met.

    Raises:
        GeneratorError: with one sentence that names the field, its value and what to do.
    """
    for name in ("strength", "steps", "guidance", "width", "height", "seed", "count"):
        if getattr(request, name) is None:  # a number field of a page can be emptied
            raise GeneratorError(f"{name} is empty; fill in a number.")
    if not request.prompt.strip():
        raise GeneratorError("the prompt is empty; describe the picture you want.")
    for name, size in (("width", request.width), ("height", request.height)):
        if size < SIZE_STEP or size % SIZE_STEP:
            nearest = max(SIZE_STEP, round(size / SIZE_STEP) * SIZE_STEP)
            raise GeneratorError(f"{name} {size} is not a positive multiple of {SIZE_STEP}; {nearest} is the nearest.")
        if size > LARGEST_SIZE:
            raise GeneratorError(f"{name} {size} is too large; {LARGEST_SIZE} is the most.")
    if request.steps < 1:
        raise GeneratorError(f"steps is {request.steps}; ask for 1 or more, 30 is usual.")
    if request.count < 1:
        raise GeneratorError(f"number of pictures is {request.count}; ask for 1 or more.")
    if not -1 <= request.seed <= LARGEST_SEED:
        raise GeneratorError(f"seed {request.seed} is out of range; use 0 to {LARGEST_SEED}, or -1 for a random one.")
    if request.adapter is not None and not Path(request.adapter).is_file():
        raise GeneratorError(f"adapter '{request.adapter}' is not there any more; refresh the list and choose another.")
