"""What all tests share: a folder and an environment of their own, the command line, the real data."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpcai_cli import launch
from hpcai_cli.main import app

TINY = '''"""A small dense network on made-up images, without dropout or batch normalization."""

from hpcai_cli.recipe import Recipe

recipe = Recipe(name="tiny", summary="for tests", input_shape=(4, 4, 1), num_classes=3, epochs=4, batch_size=8,
                learning_rate=0.01, learning_rate_scaling="none", validation_fraction=0.2,
                options={"break_rank": -1, "dropout": 0.0})


def sample():
    import numpy as np

    generator = np.random.default_rng(0)
    labels = np.arange(123) % 3
    images = (generator.random((123, 4, 4, 1)) * 60 + labels[:, None, None, None] * 60).astype(np.uint8)
    return {"train": (images[:100], labels[:100]), "test": (images[100:], labels[100:])}


def load(source, recipe):
    return sample()


def build_model(recipe):
    import keras

    from hpcai_cli import launch

    if launch.place().size > 1 and launch.place().rank == recipe.options["break_rank"]:
        raise RuntimeError("this rank was told to break")
    return keras.Sequential([
        keras.Input(recipe.input_shape), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(),
        keras.layers.Dense(16, activation="relu"), keras.layers.Dropout(recipe.options["dropout"]),
        keras.layers.Dense(3)])
'''
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name long contents by their size: the processes of a parallel run must call the same test by the same name."""
    return f"{len(val)}bytes" if isinstance(val, bytes) and len(val) > 40 else None


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path_factory, monkeypatch):
    """Give each test an empty working folder and cache, and no launcher's or user's variables; put back what it set."""
    before = dict(os.environ)
    for name in (*launch.VARIABLES, launch.VERBOSE_VARIABLE, launch.TERMINAL_VARIABLE, "HPCAI_DEBUG", "COLUMNS"):
        os.environ.pop(name, None)
    os.environ["HPCAI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def hpcai():
    """Return a function that runs a command line in this process: .exit_code, .stdout, .stderr."""
    def run(*arguments: object, stdin: str | None = None):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of the real data, or skip the test where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_recipe() -> str:
    """Return the text of a recipe with a sample of its own, whose training takes a second."""
    return TINY


@pytest.fixture
def tiny_folder(tmp_path, monkeypatch, tiny_recipe) -> Path:
    """Return a working folder with that recipe in it, and an environment in which Open MPI runs as root."""
    (tmp_path / "tiny.py").write_text(tiny_recipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPCAI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    return tmp_path


@pytest.fixture
def ranks_in() -> Callable[[Path], dict[int, int]]:
    """Return a function folder -> process id of each rank that works there, by the environment of its process."""
    program = os.fsencode(Path(sys.executable).parent / "hpcai")

    def found(folder: Path) -> dict[int, int]:
        ranks = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                words, here = (entry / "cmdline").read_bytes().split(b"\0"), (entry / "cwd").readlink()
            except OSError:
                continue
            # Not the program that starts them, nor a shell with the same variables.
            names = [each.partition(b"=")[2] for each in environment
                     if each.startswith((b"HOROVOD_RANK=", b"OMPI_COMM_WORLD_RANK="))]
            if here == folder and program in words[:2] and (names or b"HPCAI_RANKS=1" in environment):
                ranks[int(names[0]) if names else 0] = int(entry.name)
        return ranks

    return found


@pytest.fixture(scope="session")
def train_mnist(shared_data, tmp_path_factory) -> Callable[..., tuple[list[str], float]]:
    """Return a function epochs -> (words of a training on all of MNIST, the accuracy that two ranks reach by --np)."""
    folder, found = tmp_path_factory.mktemp("mnist"), {}

    def hpcai(*words: object) -> dict:
        done = subprocess.run([Path(sys.executable).parent / "hpcai", *map(str, words), "--json"], capture_output=True,
                              text=True, timeout=600, cwd=folder, env={**os.environ, "HPCAI_CACHE": str(folder)})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def of(epochs: int = 2) -> tuple[list[str], float]:
        if not found:
            hpcai("preprocess", "mnist", "--source", shared_data / "mnist", "--output", "mnist.h5")
        words = ["train", "mnist-mlp", "--data", str(folder / "mnist.h5"), "--epochs", str(epochs)]
        if epochs not in found:
            found[epochs] = hpcai(*words, "--np", 2, "--output", f"run-{epochs}")["metrics"]["accuracy"]
            assert found[epochs] > 0.96
        return words, found[epochs]

    return of
