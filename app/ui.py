"""The page: Gradio blocks around a `Generator`, and nothing that makes pictures.

Stands at the end of the flow: what is typed becomes a `Request`, each `Picture` that comes back is
shown at once. It imports Gradio and the other files of `app`, not torch and not the library.
"""

from __future__ import annotations

import html
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from app.catalogue import AdapterInfo, GeneratorError, find_adapters
from app.generator import SIZE_STEP, Generator, Request

log = logging.getLogger(__name__)

NO_ADAPTER = "none (base model)"

PROGRESS = gr.Progress()
"""Gradio gives a handler its progress bar where a parameter has such a default."""

Pairs = list[tuple[Image.Image, Image.Image]]
"""(without, with the adapter) for each picture in the gallery; empty where nothing is compared."""


class StopSignals:
    """One stop signal for each browser tab, so that Stop ends the computation of that tab alone."""

    def __init__(self) -> None:
        """Start without any tab."""
        self._events: dict[str | None, threading.Event] = {}

    def begin(self, tab: str | None) -> None:
        """Arm the tab's signal for a new request."""
        self._events[tab] = threading.Event()

    def stop(self, tab: str | None) -> None:
        """Tell the tab's request, running or waiting in the queue, to end."""
        if tab in self._events:
            self._events[tab].set()

    def leave(self, tab: str | None) -> None:
        """Stop for good: the tab was closed."""
        self.stop(tab)
        self._events.pop(tab, None)

    def of(self, tab: str | None) -> threading.Event:
        """The signal of the tab's request; already set if the tab has gone."""
        gone = threading.Event()
        gone.set()
        return self._events.get(tab, gone)


def build_ui(generator: Generator, adapters_dir: Path) -> gr.Blocks:
    """Build the page.

    Args:
        generator: makes the pictures.
        adapters_dir: folder in which adapters are looked for, again at every refresh.

    Returns:
        Blocks with the queue set up; launch them with the theme and style of `app.look`.
    """
    signals = StopSignals()
    page = gr.Blocks(title="Lily", analytics_enabled=False, delete_cache=(3600, 24 * 3600))
    with page:
        gr.HTML(_heading(generator))
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=340):
                fields, about, buttons = _controls(generator)
            with gr.Column(scale=7, min_width=420):
                status = gr.HTML("Ready.", elem_id="status", elem_classes="lily-note")
                gallery = gr.Gallery(
                    show_label=False,
                    columns=2,
                    fit_columns=False,
                    height="auto",
                    object_fit="contain",
                    format="png",
                    elem_id="gallery",
                )
                with gr.Column(visible=False) as comparison:
                    gr.HTML(
                        "Without the adapter (left) and with it (right), from the same seed",
                        padding=True,
                        elem_classes="lily-note",
                    )
                    slider = gr.ImageSlider(
                        show_label=False, format="png", type="pil", interactive=False, elem_id="comparison"
                    )
        pairs = gr.State([])
        _wire_adapters(page, adapters_dir, fields, about, buttons.refresh)
        _wire_generation(generator, signals, fields, buttons, (gallery, comparison, slider, status, pairs))

        def leave(tab: gr.Request) -> None:
            signals.leave(tab.session_hash)

        page.unload(leave)
    page.queue(default_concurrency_limit=1, max_size=16)
    return page


def _heading(generator: Generator) -> str:
    """The page's title and what it draws with; a base in a folder goes by the folder's name."""
    base = Path(generator.base).name if Path(generator.base).is_dir() else generator.base
    where = f"{generator.device}, {str(generator.dtype).removeprefix('torch.')}"
    return (
        "<div class='lily-head'><h1>Lily</h1>"
        f"<p>Pictures of your subject · base model <b>{html.escape(base)}</b> on {where}</p></div>"
    )


class Buttons(NamedTuple):
    """The page's buttons."""

    go: gr.Button
    stop: gr.Button
    refresh: gr.Button


def _controls(generator: Generator) -> tuple[dict[str, Any], gr.HTML, Buttons]:
    """Lay out the left column; the fields' names are those of `Request`."""
    size = generator.default_size
    fields: dict[str, Any] = {}
    with gr.Group(elem_classes="lily-card"):
        with gr.Row():
            fields["adapter"] = gr.Dropdown(
                [(NO_ADAPTER, "")], value="", label="Adapter", scale=5, container=True, elem_id="adapter"
            )
            refresh = gr.Button("Refresh", size="sm", scale=1, min_width=90, elem_id="refresh")
        about = gr.HTML(elem_classes="lily-note", elem_id="about", padding=True)
        fields["strength"] = gr.Slider(
            0, 2, value=1, step=0.05, label="Strength", info="1 is as trained, 0 is the base model"
        )
    with gr.Group(elem_classes="lily-card"):
        fields["prompt"] = gr.Textbox(
            label="Prompt", lines=3, placeholder="a photo of sks dog in the snow", elem_id="prompt"
        )
        fields["negative_prompt"] = gr.Textbox(label="Negative prompt", placeholder="blurry, low quality")
    with gr.Row():
        go = gr.Button("Generate", variant="primary", scale=2, elem_id="generate")
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
    with gr.Group(elem_classes="lily-card"):
        with gr.Row():
            fields["steps"] = gr.Slider(1, 200, value=30, step=1, label="Steps", min_width=140, elem_id="steps")
            fields["guidance"] = gr.Slider(1, 20, value=5, step=0.1, label="Guidance", min_width=140)
        with gr.Row():
            fields["width"] = gr.Number(size, label="Width", precision=0, step=SIZE_STEP, min_width=90, elem_id="width")
            fields["height"] = gr.Number(size, label="Height", precision=0, step=SIZE_STEP, min_width=90)
        with gr.Row():
            fields["seed"] = gr.Number(-1, label="Seed (-1: random)", precision=0, min_width=140, elem_id="seed")
            fields["count"] = gr.Slider(1, 16, value=2, step=1, label="Pictures", min_width=140, elem_id="count")
        fields["compare"] = gr.Checkbox(
            True, label="Compare", info="Draw every picture a second time without the adapter, from the same seed"
        )
    return fields, about, Buttons(go, stop, refresh)


def _wire_adapters(page: gr.Blocks, folder: Path, fields: dict[str, Any], about: gr.HTML, refresh: gr.Button) -> None:
    """Fill the list of adapters when the page opens and at 'Refresh'; describe the chosen one."""

    def refill(chosen: str) -> tuple[Any, str]:
        try:
            found = find_adapters(folder)
        except GeneratorError as error:
            raise gr.Error(str(error), print_exception=False) from error
        choices = [(NO_ADAPTER, "")] + [(adapter.name, str(adapter.path)) for adapter in found.adapters]
        kept = chosen if chosen in {value for _, value in choices} else ""
        text = _describe(_find(folder, kept)) if kept else _summary(folder, len(found.adapters), found.problems)
        return gr.update(choices=choices, value=kept), text

    def choose(chosen: str, prompt: str) -> tuple[str, str]:
        adapter = _find(folder, chosen)
        if adapter is None:
            return _describe(None) if not chosen else _fault("this adapter is gone; refresh the list."), prompt
        return _describe(adapter), prompt if prompt.strip() else adapter.instance_prompt

    shown = [fields["adapter"], about]
    for trigger in (page.load, refresh.click):
        trigger(refill, fields["adapter"], shown, show_progress="hidden", api_visibility="private", concurrency_limit=4)
    fields["adapter"].input(
        choose,
        [fields["adapter"], fields["prompt"]],
        [about, fields["prompt"]],
        show_progress="hidden",
        api_visibility="private",
        concurrency_limit=4,
    )


def _find(folder: Path, chosen: str) -> AdapterInfo | None:
    """The adapter behind a choice of the list, read again from its file."""
    return next((adapter for adapter in find_adapters(folder).adapters if str(adapter.path) == chosen), None)


def _describe(adapter: AdapterInfo | None) -> str:
    """What a header says about an adapter; headers may come from strangers, so everything is escaped."""
    if adapter is None:
        return "The base model alone."
    facts = [("prompt", adapter.instance_prompt), ("base model", adapter.base_model), ("steps", adapter.steps)]
    lines = [f"{name} <b>{html.escape(value)}</b>" for name, value in facts if value not in ("", "unknown")]
    return "Trained with " + " · ".join([*lines, f"rank <b>{adapter.rank}</b>"])


def _summary(folder: Path, number: int, problems: list[str]) -> str:
    """What a search found, with every file that could not be read."""
    head = f"{number or 'No'} adapter{'' if number == 1 else 's'} in <b>{html.escape(str(folder))}</b>."
    return head + "".join(f"<br><span class='fault'>{html.escape(problem)}</span>" for problem in problems)


def _wire_generation(
    generator: Generator,
    signals: StopSignals,
    fields: dict[str, Any],
    buttons: Buttons,
    results: tuple[gr.Gallery, gr.Column, gr.ImageSlider, gr.HTML, gr.State],
) -> None:
    """Join Generate, Stop and the gallery to the generator."""
    go, stop, _ = buttons
    _, _, slider, status, pairs = results

    def begin(tab: gr.Request) -> tuple[Any, Any, str]:
        signals.begin(tab.session_hash)
        return gr.update(interactive=False), gr.update(interactive=True), "Waiting for the model …"

    def run(
        values: dict[Any, Any], tab: gr.Request, progress: gr.Progress = PROGRESS
    ) -> Iterator[tuple[Any, Any, Any, str, Pairs]]:
        request = Request(**{name: values[field] for name, field in fields.items()})
        request = replace(request, adapter=request.adapter or None)  # the list's "" stands for no adapter
        yield from _run(generator, request, signals.of(tab.session_hash), progress)

    def interrupt(tab: gr.Request) -> None:
        signals.stop(tab.session_hash)

    def finish() -> tuple[Any, Any]:
        return gr.update(interactive=True), gr.update(interactive=False)

    def compare(shown: Pairs, event: gr.SelectData) -> Any:
        return gr.update(value=shown[event.index]) if event.index < len(shown) else gr.skip()

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    started = go.click(begin, None, [go, stop, status], queue=False, **quiet)
    drawn = started.then(run, set(fields.values()), list(results), show_progress_on=status, api_visibility="private")
    drawn.then(finish, None, [go, stop], queue=False, **quiet)
    # Gradio 6 skips `then` after a failure, such as a full queue.
    drawn.failure(lambda: (*finish(), "Not drawn."), None, [go, stop, status], queue=False, **quiet)
    # Not `cancels=`: that drops the event and leaves the computation running.
    # Two events in a row, so that 'Stopping …' cannot reach the page after the 'Stopped …' it leads to.
    stopping = stop.click(
        lambda: (gr.update(interactive=False), "Stopping …"), None, [stop, status], queue=False, **quiet
    )
    stopping.then(interrupt, None, None, queue=False, **quiet)
    results[0].select(compare, pairs, slider, queue=False, **quiet)


def _run(
    generator: Generator, request: Request, stopped: threading.Event, progress: gr.Progress
) -> Iterator[tuple[Any, Any, Any, str, Pairs]]:
    """Draw a request's pictures and yield what the page shows after each of them."""
    begun = time.monotonic()
    first: list[float] = []  # when the first step was done: before it there may be a load and a warm-up

    def on_step(done: int, total: int, index: int) -> None:
        if not first:
            first.append(time.monotonic())
        left = f" · {_duration((time.monotonic() - first[0]) / (done - 1) * (total - done))} left" if done > 1 else ""
        progress((done, total), desc=f"Picture {index + 1} of {request.count} · step {done} of {total}{left}")

    kept = (gr.skip(), gr.skip(), gr.skip())
    pictures: list[tuple[Image.Image, str]] = []
    pairs: Pairs = []
    columns = 1 if request.count == 1 else 2  # fixed from the start, so that the page does not jump
    yield gr.update(value=[], columns=columns), gr.update(visible=False), None, "", pairs
    try:
        for picture in generator.generate(request, on_step, stopped.is_set):
            pictures.append((picture.image, f"seed {picture.seed}"))
            if picture.baseline is not None:
                pairs.append((picture.baseline, picture.image))
            comparison = (gr.update(visible=True), pairs[0]) if len(pairs) == 1 else (gr.skip(), gr.skip())
            yield pictures, *comparison, "", pairs
    except GeneratorError as error:
        yield *kept, _fault(error), pairs
        return
    except Exception as error:
        log.exception("drawing failed")
        yield *kept, _fault(f"Drawing failed ({type(error).__name__}); the terminal shows where."), pairs
        return
    made = f"{len(pictures)} picture{'' if len(pictures) == 1 else 's'}"
    if stopped.is_set():
        text = f"Stopped with {made} of {request.count} finished."
    else:
        text = f"{made} in {_duration(time.monotonic() - begun)}."
    yield *kept, text, pairs


def _fault(reason: object) -> str:
    """Show a reason as a notice, and return it for the status line, where it stays.

    A raised `gr.Error` would put the word 'Error' over the pictures that are finished.
    """
    text = html.escape(str(reason))
    gr.Warning(text, title="Not drawn")
    return f"<span class='fault'>{text}</span>"


def _duration(seconds: float) -> str:
    """Say a duration as a person would: '8 s', '3 min 20 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
