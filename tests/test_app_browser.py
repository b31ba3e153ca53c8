"""The page in a real browser: from a prompt to pictures, whose pixels are looked at.

`LILY_SCREENSHOT=docs/app.png pytest tests/test_app_browser.py` also writes a picture of the page.
An installed Chromium or Chrome is used, headless; nothing but this machine is called.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from examples.tiny_sdxl import make_unet
from lily_diffusers import LilyConfig, inject_lily, save_lily_weights

pytest.importorskip("gradio", reason="the page needs Gradio; run: pip install 'lily-diffusers[app]'")
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser test needs Playwright; run: pip install playwright"
)
expect = sync_api.expect
expect.set_options(timeout=60_000)  # for busy machines; where speed is the point, a test names its own limit

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
QUIET += ("--disable-component-update", "--disable-sync")
LOCAL = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}
PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter that changes the picture, and one broken file beside it."""
    folder = tmp_path_factory.mktemp("adapters")
    unet = make_unet()
    draw = torch.Generator().manual_seed(0)
    for parameter in inject_lily(unet, LilyConfig(r=4, stride_A=2, num_B=2)).parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    told = {"instance_prompt": PROMPT, "base_model": "tiny-sdxl", "steps": "500"}
    save_lily_weights(unet, folder / "my-dog", metadata=told)
    return folder


@pytest.fixture(scope="module")
def address(tiny_sdxl_dir: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the page as a user would, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = tmp_path_factory.mktemp("server") / "output.txt"
    command = [sys.executable, "-m", "app", "--base", tiny_sdxl_dir, "--adapters", adapters, "--port", port]
    environment = os.environ | LOCAL | {"GRADIO_TEMP_DIR": str(told.parent)}
    with told.open("w") as output:
        server = subprocess.Popen(
            [*map(str, command), "--device", "cpu"], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        patience = time.monotonic() + 120
        while "the page is at" not in told.read_text():
            assert server.poll() is None, f"the server ended:\n{told.read_text()}"
            assert time.monotonic() < patience, f"the server is not up:\n{told.read_text()}"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        sentence = "no Chromium or Chrome is installed, so the page is not tested; run: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(sentence)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=[*QUIET])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: sync_api.Browser, address: str) -> Iterator[sync_api.Page]:
    """The page, opened in a new tab; requests to other machines are refused."""
    context = browser.new_context(viewport={"width": 1440, "height": 1000}, device_scale_factor=1)
    context.route(lambda url: urlsplit(url).hostname not in ("127.0.0.1", None), lambda route: route.abort())
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(address)
    expect(page.locator("#about")).to_contain_text("1 adapter in")
    yield page
    context.close()


def choose_adapter(page: sync_api.Page, name: str) -> None:
    page.locator("#adapter input").click()
    page.get_by_role("option", name=name).click()


def set_number(page: sync_api.Page, field: str, value: int) -> None:
    box = page.locator(f"#{field} input[type=number]")
    box.fill(str(value))
    box.blur()


def pixels(page: sync_api.Page, address: str) -> np.ndarray:
    """Fetch a picture that the page shows; (height, width, 3)."""
    answer = page.request.get(address)
    assert answer.ok, f"{address}: {answer.status}"
    return np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB")).astype(np.int16)


def shown(page: sync_api.Page, where: str) -> list[np.ndarray]:
    """All different pictures in a part of the page."""
    addresses = page.locator(f"{where} img").evaluate_all("images => images.map(image => image.src)")
    return [pixels(page, address) for address in dict.fromkeys(addresses)]


def assert_real(picture: np.ndarray, size: int = 64) -> None:
    assert picture.shape == (size, size, 3)
    assert picture.std() > 5


def generate(page: sync_api.Page) -> None:
    page.locator("#generate").click()
    expect(page.locator("#stop")).to_be_enabled()


def test_from_a_prompt_to_pictures_with_and_without_the_adapter(page: sync_api.Page) -> None:
    choose_adapter(page, "my-dog")
    expect(page.locator("#about")).to_contain_text("base model tiny-sdxl")
    expect(page.locator("#prompt textarea")).to_have_value(PROMPT)
    page.locator("#prompt textarea").fill("a photo of sks dog in the snow")
    set_number(page, "steps", 4)
    set_number(page, "seed", 11)
    set_number(page, "count", 2)
    generate(page)
    expect(page.locator("#status")).to_contain_text("2 pictures in")
    expect(page.locator("#generate")).to_be_enabled()
    expect(page.locator("#gallery")).to_contain_text("seed 11")
    expect(page.locator("#gallery")).to_contain_text("seed 12")
    first, second = shown(page, "#gallery")
    assert_real(first)
    assert_real(second)
    assert np.abs(first - second).mean() > 2
    without, drawn = shown(page, "#comparison")
    assert_real(without)
    np.testing.assert_array_equal(drawn, first)
    assert np.abs(without - drawn).mean() > 2
    if wanted := os.environ.get("LILY_SCREENSHOT"):
        page.wait_for_timeout(500)
        page.screenshot(path=wanted, full_page=True)


def test_a_click_on_a_picture_compares_that_picture(page: sync_api.Page) -> None:
    choose_adapter(page, "my-dog")
    set_number(page, "steps", 2)
    set_number(page, "count", 2)
    generate(page)
    expect(page.locator("#status")).to_contain_text("2 pictures in")
    _, second = shown(page, "#gallery")
    before = page.locator("#comparison img").last.get_attribute("src")
    page.locator("#gallery .thumbnail-lg").nth(1).click()
    expect(page.locator("#comparison img").last).not_to_have_attribute("src", before)
    np.testing.assert_array_equal(shown(page, "#comparison")[1], second)


def test_stop_ends_the_computation_and_the_next_request_works(page: sync_api.Page) -> None:
    page.locator("#prompt textarea").fill("a long walk")
    set_number(page, "steps", 200)
    set_number(page, "count", 16)
    generate(page)
    expect(page.locator("#status")).to_contain_text("of 3200")  # Gradio's progress bar counts
    pressed = time.monotonic()
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped with", timeout=10_000)
    assert time.monotonic() - pressed < 5
    set_number(page, "steps", 2)
    set_number(page, "count", 1)
    generate(page)
    expect(page.locator("#status")).to_contain_text("1 picture in", timeout=10_000)
    assert time.monotonic() - pressed < 15, "the stopped request went on computing"
    [picture] = shown(page, "#gallery")
    assert_real(picture)


def test_a_mistake_is_said_in_one_sentence_and_loses_nothing(page: sync_api.Page) -> None:
    page.locator("#prompt textarea").fill("a dog")
    set_number(page, "width", 100)
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("width 100 is not a positive multiple of 8; 96 is the nearest.")
    expect(page.locator("#generate")).to_be_enabled()
    set_number(page, "width", 64)
    set_number(page, "steps", 2)
    set_number(page, "count", 1)
    generate(page)
    expect(page.locator("#status")).to_contain_text("1 picture in")


def test_a_new_adapter_and_a_broken_one_appear_at_refresh(page: sync_api.Page, adapters: Path) -> None:
    whole = next((adapters / "my-dog").iterdir()).read_bytes()
    added = {"new-dog": whole, "half-dog": whole[: len(whole) // 2]}
    try:
        for name, data in added.items():
            (adapters / name).mkdir()
            (adapters / name / "pytorch_lily_weights.safetensors").write_bytes(data)
        page.locator("#refresh").click()
        expect(page.locator("#about")).to_contain_text("2 adapters in")
        expect(page.locator("#about .fault")).to_contain_text(
            "'half-dog/pytorch_lily_weights.safetensors' is truncated"
        )
        choose_adapter(page, "new-dog")
        expect(page.locator("#about")).to_contain_text(PROMPT)
    finally:
        for name in added:
            shutil.rmtree(adapters / name, ignore_errors=True)


def test_two_tabs_do_not_stop_each_other(page: sync_api.Page) -> None:
    other = page.context.new_page()
    other.goto(page.url)
    for tab in (page, other):
        tab.locator("#prompt textarea").fill("a dog")
        set_number(tab, "steps", 20)
        set_number(tab, "count", 4)
        generate(tab)
    other.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("4 pictures in")
    expect(other.locator("#status")).to_contain_text("Stopped with 0 pictures of 4 finished.")


def test_a_closed_tab_stops_computing(page: sync_api.Page) -> None:
    other = page.context.new_page()
    other.goto(page.url)
    other.locator("#prompt textarea").fill("a long walk")
    set_number(other, "steps", 200)
    set_number(other, "count", 16)
    generate(other)
    expect(other.locator("#status")).to_contain_text("of 3200")
    other.close()
    page.locator("#prompt textarea").fill("a dog")
    set_number(page, "steps", 2)
    set_number(page, "count", 1)
    generate(page)
    expect(page.locator("#status")).to_contain_text("1 picture in", timeout=10_000)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--adapters": "nowhere"}, "the adapters' folder 'nowhere' does not exist; create it, or pass another one."),
        (
            {"--base": "./nowhere"},
            "base './nowhere' is neither a folder that exists nor a hub id such as 'owner/name'.",
        ),
    ],
)
def test_a_wrong_flag_is_one_sentence(tmp_path: Path, change: dict[str, str], sentence: str) -> None:
    flags = {"--base": str(tmp_path), "--adapters": str(tmp_path)} | change
    command = [sys.executable, "-m", "app", *(part for pair in flags.items() for part in pair)]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | LOCAL, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1] == sentence
    assert "Traceback" not in ended.stderr
