"""hpcai benchmark as a user meets it: names, data and photographs, and the benchmarks themselves on very little."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcai_cli import catalog
from hpcai_cli.commands.benchmark import NAMES
from hpcai_cli.engine.benchmarks import measure, sample_photographs, tutorial
from hpcai_cli.recipe import Recipe

RECIPE = Recipe(name="pets", summary="", input_shape=(32, 32, 3), num_classes=2, class_names=("cat", "dog"),
                test_fraction=0.25, validation_fraction=0.1)


@pytest.fixture
def pets() -> Path:
    """A folder of 40 photographs and, as real ones have them, a broken file, a copy, and one under both labels."""
    folder = Path("pets")
    sample_photographs.make_photographs(folder, 40, ("cat", "dog"))
    (folder / "cat/broken.jpg").write_bytes(b"not an image")
    (folder / "cat/copy.jpg").write_bytes((folder / "cat/00000.jpg").read_bytes())
    (folder / "dog/other.jpg").write_bytes((folder / "cat/00002.jpg").read_bytes())
    return folder


def figures_of(done) -> dict[str, dict]:
    assert done.exit_code == 0, done.stderr
    return {figure["name"]: figure for figure in json.loads(done.stdout)["figures"]}


# ---- What is asked for is checked before anything starts -----------------------------------------------------------

def test_names_and_data_are_checked(hpcai):
    assert hpcai("benchmark", "speed").exit_code == 2
    missing = hpcai("benchmark", "input")
    assert missing.exit_code == 3
    assert "hpcai preprocess" in missing.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_is_there(name):
    assert callable(import_module(f"hpcai_cli.engine.benchmarks.{name}").measure)


def test_photographs_that_are_not_there_are_said_before_the_start(hpcai):
    done = hpcai("benchmark", "start", "preprocess", "--photographs", "none.zip")
    assert done.exit_code == 3
    assert "none.zip" in done.stderr
    assert "benchmark start" not in done.stderr


def test_the_tutorial_by_name_needs_real_photographs(hpcai):
    done = hpcai("benchmark", "tutorial")
    assert done.exit_code == 3
    assert "--photographs" in done.stderr


def test_among_all_the_tutorial_is_left_out_with_a_note(hpcai):
    done = hpcai("benchmark")  # ends at MNIST's file, which is missing too
    assert done.exit_code == 3
    assert "tutorial is left out" in done.stderr and "--photographs" in done.stderr


# ---- What they measure ---------------------------------------------------------------------------------------------

def test_start_measures_without_any_data(hpcai):
    figures = figures_of(hpcai("benchmark", "start", "--json"))
    assert figures["frameworks loaded by train --help"]["holds"] is True
    assert figures["hpcai --help"]["value"] > 0 and figures["python -c pass"]["value"] > 0


def test_input_measures_on_the_given_file(hpcai):
    assert hpcai("preprocess", "mnist", "--source", "sample", "--output", "digits.h5").exit_code == 0
    figures = figures_of(hpcai("benchmark", "input", "--data", "digits.h5", "--json"))
    assert figures["MNIST: shuffled batches of 64"]["value"] > 0


def test_preprocess_measures_the_photographs_that_can_be_used(hpcai, pets):
    figures = figures_of(hpcai("benchmark", "preprocess", "--photographs", pets, "--json"))
    assert "39 photographs to 150x150x3, 2 processes" in figures, list(figures)
    against = figures["against the Pillow loop"]
    assert (against["limit"], against["at_most"]) == (3, False) and against["value"] > 0
    assert figures["against decoding and resizing alone, 2 processes"]["limit"] == 0.9
    memory = figures["peak memory of all processes, 39 photographs"]
    # Three processes with numpy and Pillow each take more than one, and less than any with TensorFlow.
    assert 60 < memory["value"] < 600 and memory["holds"] is True


def test_photographs_measures_input_and_augmentation_and_leaves_the_precision_as_it_was(hpcai, monkeypatch):
    import keras

    from hpcai_cli.engine.benchmarks import photographs

    for name, value in {"COUNT": 66, "ROUNDS": 1, "EPOCHS": 1, "STEPS": 1}.items():
        monkeypatch.setattr(photographs, name, value)
    policy, crop = keras.config.dtype_policy().name, catalog.find("dogs-vs-cats").recipe.options["crop"]
    figures = figures_of(hpcai("benchmark", "photographs", "--json"))
    assert keras.config.dtype_policy().name == policy
    limits = {name: figure["limit"] for name, figure in figures.items() if figure["limit"]}
    assert limits == {"against ImageDataGenerator.flow_from_directory": 20, "against image_dataset_from_directory": 10,
                      "preprocessing, in epochs of ImageDataGenerator's input": 2,
                      f"against one constant batch of {crop}x{crop}": 0.95}
    assert all(figure["value"] > 0 for figure in figures.values())


def test_serve_measures_our_server_and_leaves_others_out_with_a_note(hpcai, monkeypatch):
    from hpcai_cli.engine.benchmarks import serve

    for name, value in {"ROUNDS": 1, "SECONDS": 0.2, "STEP": 4.0}.items():
        monkeypatch.setattr(serve, name, value)
    done = hpcai("benchmark", "serve", "--json")
    assert "--peer litserve=" in done.stderr
    figures = figures_of(done)
    for name in ("mnist", "dogs-vs-cats"):
        answers, calls = (next(figure["value"] for said, figure in figures.items() if said.startswith(name)
                               and said.endswith(end)) for end in (": answers", "model alone at batch 1"))
        assert answers > 0 and calls > 0
    assert 0 < figures["start of a server to its first answer, TFLite"]["value"] < 30


@pytest.mark.parametrize("given", ["nginx=/bin/sh", "litserve", "litserve=missing"])
def test_a_peer_is_one_that_is_known_and_there(hpcai, given):
    done = hpcai("benchmark", "serve", "--peer", given)
    assert done.exit_code == 2 and "there is no such peer" in done.stderr


def test_the_tutorial_runs_both_sides_on_the_same_split(hpcai, pets, monkeypatch):
    monkeypatch.setattr(tutorial, "ROUNDS", 1)
    figures = figures_of(hpcai("benchmark", "tutorial", "--photographs", pets, "--epochs", "1", "--json"))
    ours, script = (figures[f"{name}, 1 epochs of 31 photographs"]["value"]
                    for name in ("hpcai preprocess and train", "the tutorials' script"))
    over = figures["the script's time over ours"]
    assert over["value"] == pytest.approx(script / ours) and over["limit"] == 2
    accuracy = figures["our accuracy on 8 test photographs"]["value"]
    difference = figures["our accuracy minus the script's, mean"]
    assert difference["value"] == pytest.approx(accuracy - figures["the script's accuracy on them"]["value"])
    assert difference["limit"] == 0


# ---- What they measure with ----------------------------------------------------------------------------------------

def test_made_photographs_differ_and_are_the_same_each_time():
    for folder in (Path("one"), Path("two")):
        sample_photographs.make_photographs(folder, 12, ("cat", "dog"))
    contents = [[path.read_bytes() for path in sorted(folder.glob("*/*.jpg"))] for folder in (Path("one"), Path("two"))]
    assert contents[0] == contents[1] and len(set(contents[0])) == 12
    with Image.open("one/cat/00000.jpg") as image:
        assert image.size == pytest.approx((500, 375), rel=0.11)


def test_of_many_photographs_an_even_choice_is_measured(pets):
    setting = measure.Setting(Path("none.h5"), {}, None, pets)
    with sample_photographs.photograph_folder(setting, RECIPE, 30) as folder:
        counts = {name: len(list((folder / name).iterdir())) for name in ("cat", "dog")}
    assert sum(counts.values()) == 30 and min(counts.values()) >= 14


@pytest.mark.parametrize("brought", [False, True])
def test_the_split_is_the_sources_own_or_the_recipes(pets, brought):
    source = Path("brought") if brought else pets
    if brought:
        for name, count in (("train", 20), ("test", 6)):
            make_noise(source / name, count)
    counts = tutorial.split_photographs(source, RECIPE, Path("split"))
    assert counts == ({"train": 20, "test": 6} if brought else {"train": 29, "test": 10})
    contents = {name: {path.read_bytes() for path in Path("split", name).glob("*/*")} for name in counts}
    assert {name: len(found) for name, found in contents.items()} == counts
    assert not contents["train"] & contents["test"]
    if brought:
        assert contents["test"] == {path.read_bytes() for path in (source / "test").glob("*/*")}


def make_noise(folder: Path, count: int) -> None:
    """Photographs that are unlike those of any other folder."""
    source = np.random.default_rng(count)
    for number in range(count):
        path = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)


def test_a_program_that_fails_is_named_with_what_it_said():
    with pytest.raises(measure.HpcaiError, match=r"exit code 2.*no such recipe"):
        measure.run_json([measure.PROGRAM, "train", "nothing", "--json"])
