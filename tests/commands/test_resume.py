"""A run that goes on in a folder of its own, or with something else than it began with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hpcai_cli.engine import checkpoint


@pytest.fixture
def begun(hpcai, tiny_folder) -> dict[str, bytes]:
    """Return what is in `run`, a training of two epochs."""
    assert hpcai("preprocess", "./tiny.py", "--source", "sample", "--output", "tiny.h5").exit_code == 0
    done = hpcai("train", "./tiny.py", "--data", "tiny.h5", "--epochs", 2, "--output", "run")
    assert done.exit_code == 0, done.stderr
    return contents("run")


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def weights(folder: str) -> dict[str, np.ndarray]:
    state, passed = checkpoint.newest(Path(folder) / "checkpoints")
    assert not passed
    return state.arrays


def assert_same_weights(one: str, other: str) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_elsewhere_it_goes_on_alike_and_the_old_run_stays_as_it_is(hpcai, begun):
    shutil.copytree("run", "in-place")
    assert hpcai("train", "--resume", "in-place", "--epochs", 4).exit_code == 0
    done = hpcai("train", "--resume", "run", "--output", "new", "--epochs", 4, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "new" and json.loads(done.stdout)["epochs"] == 4
    assert contents("run") == begun
    assert_same_weights("new", "in-place")
    assert json.loads(Path("new/manifest.json").read_text())["resumed_from"] == str(Path("run").absolute())
    assert not list(Path("new").glob(".*"))


@pytest.mark.parametrize("words", [("--resume", "run"), ("./tiny.py", "--data", "tiny.h5")],
                         ids=["the same again", "another training"])
@pytest.mark.parametrize("is_copied", [False, True])
def test_what_a_kill_left_of_a_copy_hinders_nobody_and_is_no_run(hpcai, begun, monkeypatch, is_copied, words):
    save = checkpoint.save

    def killed(*arguments, **named):
        if is_copied:
            save(*arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", killed)
        assert hpcai("train", "--resume", "run", "--output", "new").exit_code == 130
    assert not Path("new/recipe.json").exists()
    done = hpcai("train", *words, "--output", "new", "--epochs", 3)
    assert done.exit_code == 0, done.stderr
    reference = ("--resume", "run") if words[0] == "--resume" else words
    assert hpcai("train", *reference, "--output", "reference", "--epochs", 3).exit_code == 0
    assert_same_weights("new", "reference")
    assert not list(Path("new").glob(".*")) and contents("run") == begun


def test_a_copy_of_nothing_that_verifies_is_refused(hpcai, begun):
    for file in Path("run/checkpoints").glob("*/arrays.npz"):
        file.write_bytes(b"torn")
    done = hpcai("train", "--resume", "run", "--output", "new")
    assert done.exit_code == 3, done.stderr
    assert hpcai("train", "./tiny.py", "--data", "tiny.h5", "--output", "new", "--epochs", 1).exit_code == 0


@pytest.mark.parametrize(("words", "said"), [
    (("--epochs", 4), ["the cosine schedule ends after 4 epochs in place of 2, and the learning rate jumps",
                       "not be bit for bit those of a run that was never stopped: another number of epochs"]),
    (("--batch-size", 16), ["a step takes 16 examples in place of 8, from here on; each of an epoch's is still seen",
                            "the learning rate's peak stays 0.01", "another batch_size"]),
    (("--set", "learning_rate=0.02"), ["the learning rate's peak is 0.02 in place of 0.01", "another learning_rate"]),
    ((), [])], ids=["epochs", "batch size", "learning rate", "nothing"])
def test_what_follows_is_said(hpcai, begun, words, said):
    done = hpcai("train", "--resume", "run", "--output", "new", *words)
    assert done.exit_code == 0, done.stderr
    assert all(sentence in done.stderr.replace("\n", " ") for sentence in said), done.stderr
    assert ("never stopped" in done.stderr) == bool(said)


def test_paused_after_an_epoch_and_resumed_it_is_as_if_it_had_not_been(hpcai, begun):
    words = ("train", "./tiny.py", "--data", "tiny.h5", "--epochs", 5)
    assert hpcai(*words, "--output", "whole").exit_code == 0
    paused = hpcai(*words, "--output", "paused", "--until-epoch", 2)
    assert paused.exit_code == 75 and "stopped by --until-epoch 2" in paused.stderr, paused.stderr
    assert hpcai("train", "--resume", "paused", "--until-epoch", 2).exit_code == 75, "it has come so far"
    assert hpcai("train", "--resume", "paused", "--until-epoch", 4).exit_code == 75
    events = [json.loads(line) for line in Path("paused/events.jsonl").read_text().splitlines()]
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == [1, 2, 3, 4]
    assert hpcai("train", "--resume", "paused", "--until-epoch", 5).exit_code == 0
    assert_same_weights("paused", "whole")
