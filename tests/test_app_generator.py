"""The generator behind the page, on a real tiny SDXL: pictures, seeds, stop, adapters, errors. No Gradio."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from app.catalogue import GeneratorError, find_adapters
from app.generator import ADAPTERS_KEPT, LARGEST_SEED, Generator, Request
from examples.tiny_sdxl import make_unet
from lily_diffusers import LilyConfig, get_lily_adapters, inject_lily, save_lily_weights
from lily_diffusers.checkpoint import WEIGHT_NAME

ASK = Request("a photo of sks dog", steps=3, width=64, height=64, seed=7)
ROOT = Path(__file__).parent.parent


def write_adapter(folder: Path, seed: int = 0, **metadata: str) -> Path:
    """Save an adapter that changes the picture: every parameter is drawn anew."""
    unet = make_unet()
    bank = inject_lily(unet, LilyConfig(r=4, stride_A=2, num_B=2))
    draw = torch.Generator().manual_seed(seed)
    for parameter in bank.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    return save_lily_weights(unet, folder, metadata=metadata)


def pixels(image: Image.Image | None) -> np.ndarray:
    """The picture as numbers (height, width, 3), so that differences do not wrap around."""
    assert image is not None
    return np.asarray(image).astype(np.int16)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is no faster with more threads, and many times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def generator(tiny_sdxl_dir: Path) -> Generator:
    return Generator(tiny_sdxl_dir, device="cpu")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "dog" / "checkpoint-1000", seed=2)
    write_adapter(folder / "dog" / "checkpoint-500", seed=1)
    write_adapter(folder / "dog", seed=0, instance_prompt="a photo of sks dog", base_model="tiny", steps="20")
    return folder


@pytest.fixture
def dog(adapters: Path) -> str:
    return str(adapters / "dog" / WEIGHT_NAME)


class TestFindingAdapters:
    def test_lists_names_in_natural_order_with_what_the_header_says(self, adapters: Path) -> None:
        found = find_adapters(adapters)
        assert [adapter.name for adapter in found.adapters] == ["dog", "dog/checkpoint-500", "dog/checkpoint-1000"]
        first = found.adapters[0]
        assert (first.instance_prompt, first.base_model, first.steps) == ("a photo of sks dog", "tiny", "20")
        assert first.rank == 4
        assert found.problems == []

    def test_goes_by_the_header_and_not_by_the_name(self, adapters: Path, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "renamed.safetensors").write_bytes((adapters / "dog" / WEIGHT_NAME).read_bytes())
        (tmp_path / "peer").mkdir()
        save_file({"lora": torch.zeros(2)}, tmp_path / "peer" / WEIGHT_NAME, metadata={"format": "pt"})
        save_file({"lora": torch.zeros(2)}, tmp_path / "no_metadata.safetensors")
        (tmp_path / "notes.txt").write_text("not an adapter")
        found = find_adapters(tmp_path)
        assert [adapter.name for adapter in found.adapters] == ["mine/renamed"]
        assert found.problems == []

    def test_a_folder_that_is_itself_an_adapter_shows_under_its_own_name(self, adapters: Path) -> None:
        found = find_adapters(adapters / "dog")
        assert [adapter.name for adapter in found.adapters] == ["checkpoint-500", "checkpoint-1000", "dog"]

    @pytest.mark.parametrize("keep", [0, 5, 200, -100])
    def test_a_truncated_file_is_a_problem_and_hides_nothing(self, adapters: Path, tmp_path: Path, keep: int) -> None:
        whole = (adapters / "dog" / WEIGHT_NAME).read_bytes()
        for name, data in (("good", whole), ("bad", whole[:keep])):
            (tmp_path / name).mkdir()
            (tmp_path / name / WEIGHT_NAME).write_bytes(data)
        found = find_adapters(tmp_path)
        assert [adapter.name for adapter in found.adapters] == ["good"]
        assert len(found.problems) == 1
        assert found.problems[0].startswith(f"'bad/{WEIGHT_NAME}' is truncated")

    def test_a_missing_folder_is_one_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(GeneratorError, match="nowhere' does not exist; create it"):
            find_adapters(tmp_path / "nowhere")


class TestPictures:
    def test_the_adapter_changes_the_picture_and_the_baseline_is_the_base(self, generator: Generator, dog: str) -> None:
        [base] = generator.generate(ASK)
        [drawn] = generator.generate(replace(ASK, adapter=dog, compare=True))
        assert base.baseline is None
        assert base.image.size == (64, 64)
        np.testing.assert_allclose(pixels(drawn.baseline), pixels(base.image), atol=1)
        assert np.abs(pixels(drawn.image) - pixels(base.image)).mean() > 2

    def test_strength_zero_is_the_base_and_half_lies_apart_from_both(self, generator: Generator, dog: str) -> None:
        none, half, full = (
            pixels(next(generator.generate(replace(ASK, adapter=dog, strength=strength))).image)
            for strength in (0.0, 0.5, 1.0)
        )
        np.testing.assert_allclose(none, pixels(next(generator.generate(ASK)).image), atol=1)
        assert np.abs(half - none).mean() > 1
        assert np.abs(half - full).mean() > 1

    def test_adapters_are_switched_and_none_leaks_into_the_next(self, generator: Generator, adapters: Path) -> None:
        paths = [str(adapter.path) for adapter in find_adapters(adapters).adapters]
        first = [pixels(next(generator.generate(replace(ASK, adapter=path))).image) for path in paths]
        again = [pixels(next(generator.generate(replace(ASK, adapter=path))).image) for path in paths]
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, other)
        assert np.abs(first[0] - first[1]).mean() > 1
        assert np.abs(first[1] - first[2]).mean() > 1

    def test_each_picture_is_that_of_its_own_seed(self, generator: Generator, dog: str) -> None:
        three = list(generator.generate(replace(ASK, adapter=dog, count=3)))
        assert [picture.seed for picture in three] == [7, 8, 9]
        for picture in three:
            [alone] = generator.generate(replace(ASK, adapter=dog, seed=picture.seed))
            np.testing.assert_allclose(pixels(picture.image), pixels(alone.image), atol=1)
        assert np.abs(pixels(three[0].image) - pixels(three[1].image)).mean() > 2

    def test_a_drawn_seed_is_returned_and_draws_the_same_again(self, generator: Generator) -> None:
        [picture] = generator.generate(replace(ASK, seed=-1))
        assert 0 <= picture.seed <= LARGEST_SEED
        [again] = generator.generate(replace(ASK, seed=picture.seed))
        np.testing.assert_array_equal(pixels(picture.image), pixels(again.image))

    def test_a_file_that_changed_is_loaded_again(self, generator: Generator, tmp_path: Path) -> None:
        path = write_adapter(tmp_path, seed=1)
        ask = replace(ASK, adapter=str(path))
        before = pixels(next(generator.generate(ask)).image)
        write_adapter(tmp_path, seed=2)
        os.utime(path, ns=(1, 1))  # coarse clocks may give both files one time
        assert np.abs(pixels(next(generator.generate(ask)).image) - before).mean() > 1

    def test_two_requests_at_once_get_what_each_gets_alone(self, generator: Generator, adapters: Path) -> None:
        paths = [str(adapter.path) for adapter in find_adapters(adapters).adapters[:2]]
        asks = [replace(ASK, adapter=path, count=2, compare=True) for path in paths]
        alone = [list(generator.generate(ask)) for ask in asks]
        together: list[list] = [[], []]
        threads = [threading.Thread(target=lambda i=i: together[i].extend(generator.generate(asks[i]))) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for expected, got in zip(alone, together, strict=True):
            for one, other in zip(expected, got, strict=True):
                np.testing.assert_allclose(pixels(one.image), pixels(other.image), atol=1)
                np.testing.assert_allclose(pixels(one.baseline), pixels(other.baseline), atol=1)


class TestSteps:
    def test_every_step_of_every_picture_is_counted(self, generator: Generator, dog: str) -> None:
        seen: list[tuple[int, int, int]] = []
        list(generator.generate(replace(ASK, count=2), lambda *step: seen.append(step)))
        assert seen == [(done, 6, (done - 1) // 3) for done in range(1, 7)]
        seen.clear()
        list(generator.generate(replace(ASK, adapter=dog, compare=True), lambda *step: seen.append(step)))
        assert seen == [(done, 6, 0) for done in range(1, 7)]

    def test_stop_ends_within_a_step_keeps_finished_pictures_and_leaves_it_usable(
        self, generator: Generator, dog: str
    ) -> None:
        seen: list[int] = []
        ask = replace(ASK, adapter=dog, count=3)
        kept = list(generator.generate(ask, lambda done, *_: seen.append(done), lambda: len(seen) >= 4))
        assert seen == [1, 2, 3, 4]
        assert [picture.seed for picture in kept] == [7]
        [after] = generator.generate(replace(ask, count=1))
        np.testing.assert_array_equal(pixels(after.image), pixels(kept[0].image))

    def test_stop_in_the_baseline_keeps_the_picture(self, generator: Generator, dog: str) -> None:
        seen: list[int] = []
        ask = replace(ASK, adapter=dog, count=2, compare=True)
        kept = list(generator.generate(ask, lambda done, *_: seen.append(done), lambda: len(seen) >= 5))
        assert seen == [1, 2, 3, 4, 5]
        assert [picture.baseline for picture in kept] == [None]

    def test_stop_before_the_first_step_draws_nothing(self, generator: Generator) -> None:
        assert list(generator.generate(ASK, should_stop=lambda: True)) == []

    def test_stop_from_another_thread(self, generator: Generator) -> None:
        stop, started, kept = threading.Event(), threading.Event(), []
        ask = replace(ASK, steps=1000, count=50)
        work = threading.Thread(
            target=lambda: kept.extend(generator.generate(ask, lambda *_: started.set(), stop.is_set))
        )
        work.start()
        assert started.wait(30)
        stop.set()
        work.join(20)
        assert not work.is_alive()
        assert len(list(generator.generate(ASK))) == 1

    def test_an_iterator_dropped_half_way_does_not_hold_the_pipeline(self, generator: Generator) -> None:
        half = generator.generate(replace(ASK, count=2))
        next(half)
        assert len(list(generator.generate(ASK, should_stop=None))) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": "  "}, "the prompt is empty; describe the picture you want"),
        ({"width": 100}, "width 100 is not a positive multiple of 8; 96 is the nearest"),
        ({"width": 100_000}, "width 100000 is too large; 4096 is the most"),
        ({"height": 0}, "height 0 is not a positive multiple of 8; 8 is the nearest"),
        ({"steps": 0}, "steps is 0; ask for 1 or more"),
        ({"count": 0}, "number of pictures is 0; ask for 1 or more"),
        ({"seed": -2}, "seed -2 is out of range; use 0 to 4294967295, or -1"),
        ({"seed": None}, "seed is empty; fill in a number"),
        ({"adapter": "gone.safetensors"}, "adapter 'gone.safetensors' is not there any more; refresh the list"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_at_once(generator: Generator, change: dict, sentence: str) -> None:
    with pytest.raises(GeneratorError, match=sentence):
        generator.generate(replace(ASK, **change))


def test_an_adapter_that_does_not_load_is_one_error_and_the_generator_stays_usable(
    generator: Generator, dog: str, tmp_path: Path
) -> None:
    broken = tmp_path / WEIGHT_NAME
    broken.write_bytes(Path(dog).read_bytes()[:-100])
    with pytest.raises(GeneratorError, match="is truncated"):
        list(generator.generate(replace(ASK, adapter=str(broken))))
    save_file(load_file(dog), broken, metadata={"format": "pt"})
    with pytest.raises(GeneratorError, match="is not a Lily adapter"):
        list(generator.generate(replace(ASK, adapter=str(broken))))
    assert len(list(generator.generate(replace(ASK, adapter=dog)))) == 1


def test_only_the_last_adapters_stay_loaded(tiny_sdxl_dir: Path, tmp_path: Path) -> None:
    generator = Generator(tiny_sdxl_dir, device="cpu")
    files = [str(write_adapter(tmp_path / str(i), seed=i)) for i in range(ADAPTERS_KEPT + 2)]
    pictures = []
    for file in [*files, files[0]]:
        request = Request("a toy", adapter=file, steps=1, width=64, height=64, seed=0)
        pictures += [pixels(picture.image) for picture in generator.generate(request)]
        assert len(get_lily_adapters(generator.pipe)) <= ADAPTERS_KEPT
    assert np.array_equal(pictures[0], pictures[-1])
    assert not np.array_equal(pictures[0], pictures[1])


def test_running_out_of_memory_while_decoding_leaves_the_generator_usable(
    tiny_sdxl_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(tiny_sdxl_dir, device="cpu", dtype="float16")
    request = Request("a toy", steps=1, width=64, height=64, seed=0)
    expected = [pixels(picture.image) for picture in generator.generate(request)]

    def full(*_args: object, **_options: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(generator.pipe.vae, "decode", full)
        with pytest.raises(GeneratorError, match="choose a smaller width and height"):
            list(generator.generate(request))
    assert np.array_equal(expected, [pixels(picture.image) for picture in generator.generate(request)])


@pytest.fixture
def foreign_base(tmp_path: Path) -> Path:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return tmp_path


def test_a_base_that_cannot_be_used_is_one_sentence(tmp_path: Path, foreign_base: Path) -> None:
    for base, sentence in (
        (tmp_path / "nowhere", "nowhere' is neither a folder that exists nor a hub id"),
        (foreign_base, "is a StableDiffusionPipeline; Lily's adapters are for SDXL"),
    ):
        with pytest.raises(GeneratorError, match=sentence):
            Generator(base, device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GeneratorError, match=r"has no model_index\.json; give a folder"):
        Generator(tmp_path / "empty", device="cpu")
    (foreign_base / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(GeneratorError, match="cannot be loaded"):
        Generator(foreign_base, device="cpu")


def test_a_device_that_is_not_there_is_one_sentence(tiny_sdxl_dir: Path) -> None:
    with pytest.raises(GeneratorError, match="device 'nonsense' cannot be used here; try 'cpu'"):
        Generator(tiny_sdxl_dir, device="nonsense")


def test_the_generator_does_not_need_gradio() -> None:
    code = "import app.generator, sys; sys.exit('gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
