"""Checkpoints: what was saved comes back bit for bit, and what does not verify is passed over and named."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest

from hpcai_cli.engine import checkpoint
from hpcai_cli.engine.checkpoint import State
from hpcai_cli.errors import DataError


def state(step: int, *, best: int | None = None) -> State:
    source = np.random.default_rng(step)
    arrays = {"model-0": source.normal(size=(5, 3)).astype(np.float32), "model-1": np.float32(np.nan),
              "model-2": source.integers(0, 2**32, 2, dtype=np.uint32), "optimizer-0": np.int64(step),
              "optimizer-1": np.array([-0.0, np.inf, 1e-45], np.float32), "model-3": np.zeros((0, 4), np.float16)}
    return State(step=step, epoch=2, cursor=17, sums=[0.1 + 0.2, 1e300], history=[{"epoch": 1, "loss": 1 / 3}],
                 best={"epoch": 1, "step": best, "validation_loss": 0.25} if best else {}, fingerprint="abc",
                 arrays={name: np.asarray(array) for name, array in arrays.items()})


def save(folder, *steps: int, best: int | None = None) -> None:
    for step in steps:
        checkpoint.save(folder, state(step, best=best))


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def same(one: State, other: State) -> bool:
    plain = [{key: value for key, value in vars(item).items() if key != "arrays"} for item in (one, other)]
    return plain[0] == plain[1] and list(one.arrays) == list(other.arrays) and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in zip(one.arrays.values(), other.arrays.values(), strict=True))


def test_everything_comes_back_bit_for_bit(tmp_path):
    save(tmp_path / "checkpoints", 12)
    found, passed = checkpoint.newest(tmp_path / "checkpoints")
    assert same(found, state(12))
    assert passed == []
    assert same(checkpoint.at_step(tmp_path / "checkpoints", 12), state(12))


def test_the_newest_is_the_one_with_the_most_steps(tmp_path):
    save(tmp_path, 99_999_999, 100_000_000)
    assert checkpoint.newest(tmp_path)[0].step == 100_000_000


def test_two_newest_and_the_best_are_kept(tmp_path):
    save(tmp_path, 10, 20)
    save(tmp_path, 30, 40, 50, best=20)
    assert names(tmp_path) == ["step-00000020", "step-00000040", "step-00000050"]
    save(tmp_path, 60, best=60)
    assert names(tmp_path) == ["step-00000050", "step-00000060"]


def test_a_kill_while_an_old_one_goes_leaves_nothing_that_looks_like_one(tmp_path, monkeypatch):
    save(tmp_path, 10, 20)

    def killed(path, ignore_errors):
        if path.is_dir():
            next(path.glob("manifest.json")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        save(tmp_path, 30)
    assert [path.name for path in tmp_path.glob("step-*")] and not list(tmp_path.glob("step-00000010"))
    found, passed = checkpoint.newest(tmp_path)
    assert (found.step, passed) == (30, [])
    save(tmp_path, 40)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]


def test_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "step-00000010" / "state.json").write_text("damaged")
    save(tmp_path, 10)
    assert same(checkpoint.newest(tmp_path)[0], state(10))


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit of the weights": lambda folder: flip(folder / "arrays.npz"),
    "a bit of the state": lambda folder: flip(folder / "state.json"),
    "weights cut": lambda folder: os.truncate(folder / "arrays.npz", 700),
    "weights empty": lambda folder: os.truncate(folder / "arrays.npz", 0),
    "no weights": lambda folder: (folder / "arrays.npz").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "manifest cut": lambda folder: os.truncate(folder / "manifest.json", 20),
    "manifest of another form": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "manifest of bytes": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a file of that name": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_the_newest_that_verifies_is_taken_and_the_others_are_named(tmp_path, damage):
    save(tmp_path, 10, 20)
    damage(tmp_path / "step-00000020")
    found, passed = checkpoint.newest(tmp_path)
    assert same(found, state(10))
    assert len(passed) == 1
    assert passed[0].startswith("checkpoint step-00000020 does not verify: ")
    with pytest.raises(DataError, match="step-00000020 does not verify"):
        checkpoint.at_step(tmp_path, 20)


def test_none_that_verifies_is_an_error_that_names_them_all(tmp_path):
    save(tmp_path, 10, 20)
    for path in tmp_path.iterdir():
        flip(path / "arrays.npz")
    with pytest.raises(DataError, match="step-00000020 does not verify.*step-00000010 does not verify") as caught:
        checkpoint.newest(tmp_path)
    assert "train anew without --resume" in str(caught.value)
    with pytest.raises(DataError, match="no checkpoint in"):
        checkpoint.newest(tmp_path / "missing")


class Trap:
    """Pickled, it would make a file when it is read."""

    def __reduce__(self):
        return os.mkdir, ("trap",)


@pytest.mark.parametrize("form", ["an array of objects", "a bare pickle"])
def test_a_pickle_is_refused_and_does_not_run(tmp_path, monkeypatch, form):
    """With hashes that match, as somebody would make them who wants it to be read."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 10, 20)
    folder = tmp_path / "step-00000020"
    if form == "a bare pickle":
        (folder / "arrays.npz").write_bytes(pickle.dumps(Trap()))
    else:
        array = io.BytesIO()
        np.save(array, np.array([Trap()], object), allow_pickle=True)
        with zipfile.ZipFile(folder / "arrays.npz", "w") as archive:
            archive.writestr("model-0.npy", array.getvalue())
    hashes = {part: checkpoint._hash(folder / part) for part in ("arrays.npz", "state.json")}
    (folder / "manifest.json").write_text(json.dumps({"format": "hpcai.checkpoint/1", "sha256": hashes}))
    found, passed = checkpoint.newest(tmp_path)
    assert found.step == 10
    assert "pickle" in passed[0]
    assert not (tmp_path / "trap").exists()


def test_leftovers_of_a_killed_write_are_ignored(tmp_path):
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".step-00000020.4711.part")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-1").mkdir()
    found, passed = checkpoint.newest(tmp_path)
    assert (found.step, passed) == (10, [])
    save(tmp_path, 20, 30, 40)
    assert {"notes.txt", "step-1"} < set(names(tmp_path))


@pytest.mark.parametrize("limit", [0, 3_000, 100_000, 1_000_000])
def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, limit):
    save(tmp_path, 10, 20)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        import numpy as np
        from hpcai_cli.engine import checkpoint
        from hpcai_cli.errors import HpcaiError
        arrays = {f"model-{number}": np.zeros(300_000, np.float32) for number in range(3)}
        state = checkpoint.State(30, 1, fingerprint="abc", arrays=arrays)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
        try:
            checkpoint.save(Path(sys.argv[1]), state)
        except HpcaiError as error:
            print(type(error).__name__, error.exit_code, error)
        """), str(tmp_path), str(limit)], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("HpcaiError 1 cannot write the checkpoint of step 30: File too large"), done
    assert "the ones before it are unchanged; free some space" in done.stdout
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    assert same(checkpoint.newest(tmp_path)[0], state(20))
