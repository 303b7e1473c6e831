"""A model that hangs, eats memory, crashes or spoils what it says does so in a process of its own."""

import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from hpcai_cli.engine.serving import runners, sandbox
from hpcai_cli.errors import DataError, MissingError

SHAPE = (4,)


def fine(model):
    return lambda inputs: inputs.sum(axis=1, keepdims=True) + len(model)


def hangs(model):
    time.sleep(600)


def crashes(model):
    os.kill(os.getpid(), signal.SIGSEGV)


def eats(model):
    return lambda inputs: np.ones(1 << 40, np.uint8)


def lacks(model):
    raise MissingError("no such library; run `pip install it`")


def fails(model):
    raise ValueError("one\ntwo")


def tried(open_model) -> None:
    sandbox.try_out(open_model, b"content", SHAPE, (1, 8), "made-up")


def test_what_answers_passes():
    tried(fine)


@pytest.mark.parametrize(("open_model", "said"), [
    (crashes, "this made-up model cannot be run: it crashes$"), (fails, "cannot be run: one$"),
    (eats, "cannot be run: Unable to allocate")])
def test_what_does_not_answer_is_told(open_model, said):
    with pytest.raises(DataError, match=said):
        tried(open_model)


def test_what_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 3)
    with pytest.raises(DataError, match="cannot be run: it takes too long"):
        tried(hangs)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert all("spawn_main" not in Path(f"/proc/{child}/cmdline").read_text() for child in children)


def test_a_missing_library_is_told_as_such():
    with pytest.raises(MissingError, match="^no such library; run `pip install it`$"):
        tried(lacks)


def test_this_process_keeps_its_own_bounds():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    tried(fine)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize(("kind", "name"), [
    pytest.param("saved_model", "SavedModel", marks=pytest.mark.long),
    pytest.param("onnx", "ONNX", marks=pytest.mark.long), ("keras", "Keras")])
def test_every_kind_of_file_is_tried_before_it_is_opened_here(kind, name, tmp_path, monkeypatch):
    import keras

    from hpcai_cli.engine.deployment import formats

    # A tensor that is larger than any memory, made of a size that is known only when the model runs.
    inputs = keras.Input(SHAPE)
    repeated = keras.layers.UpSampling1D(1 << 20)(keras.layers.Reshape((4, 1))(inputs))
    squared = keras.layers.Dot(axes=2)([repeated, repeated])
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling1D()(squared)))
    file = formats.write(model, kind, tmp_path, input_shape=SHAPE, dtype=np.float32)
    monkeypatch.setattr(runners, "_opened", _not_here(runners._opened, os.getpid()))
    with pytest.raises(DataError, match=f"this {name} model cannot be run: "):
        runners.scores_of(kind, file, input_shape=SHAPE, columns=3, owner="made", threads=1)


def _not_here(opened, process):
    """Return the function as it is; what it is replaced by in this process must not be called."""
    def refuse(*given):
        raise AssertionError("the model was opened in this process")

    refuse.__module__, refuse.__qualname__ = opened.__module__, opened.__qualname__
    return refuse
