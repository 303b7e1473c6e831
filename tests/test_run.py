"""The run folder: who gets which number, what is refused, and files that are whole or not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcai_cli.errors import DataError, HpcaiError, UsageError
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run, read_json, write_bytes, write_json

RECIPE = Recipe(name="wool", summary="sheep and goats", input_shape=(4,), num_classes=2)


# ---- Numbers -------------------------------------------------------------------------------------------------------

def test_runs_number_themselves():
    assert [str(Run.create("mnist", None).folder) for _ in range(3)] == ["runs/mnist-1", "runs/mnist-2", "runs/mnist-3"]
    assert str(Run.create("mnist-mlp", None).folder) == "runs/mnist-mlp-1"


def test_a_number_is_never_used_again():
    for name in ("mnist-2", "mnist-10", "mnist-x", "mnist-mlp-99", "mnist-3.old"):
        Path("runs", name).mkdir(parents=True)
    assert Run.create("mnist", None).folder.name == "mnist-11"


def test_trainings_that_start_together_get_numbers_of_their_own():
    code = ("from hpcai_cli.run import Run; print('ready', flush=True); input();"
            "print(*(Run.create('mnist', None).folder for _ in range(20)))")
    jobs = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(4)]
    assert [job.stdout.readline() for job in jobs] == ["ready\n"] * 4
    for job in jobs:
        job.stdin.write("\n")
        job.stdin.flush()
    answers = [job.communicate(timeout=60)[0].split() for job in jobs]
    assert [len(names) for names in answers] == [20] * 4
    assert len({name for names in answers for name in names}) == 80 == len(list(Path("runs").iterdir()))


# ---- Refused -------------------------------------------------------------------------------------------------------

def test_an_output_that_holds_something_is_refused_and_left_alone():
    folder = Path("mine")
    folder.mkdir()
    (folder / "notes.txt").write_text("keep")
    with pytest.raises(UsageError) as caught:
        Run.create("mnist", folder)
    assert str(caught.value) == ("the output folder is not empty; expected a new or empty folder; give another "
                                 "--output, or continue it with `--resume mine`; received: 'mine'")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("left", [[".lock"], [".lock", "manifest.json", ".recipe.json.a1b2"], [".writable"]])
def test_what_a_kill_left_before_there_was_a_run_hinders_nobody(left):
    folder = Path("begun")
    folder.mkdir()
    for name in left:
        (folder / name).touch()
    assert Run.create("mnist", folder).folder == folder
    (folder / "recipe.json").touch()
    with pytest.raises(UsageError, match="not empty"):
        Run.create("mnist", folder)


def test_an_output_that_is_new_or_empty_is_taken():
    Path("empty").mkdir()
    assert Run.create("mnist", Path("empty")).folder == Path("empty")
    assert Run.create("mnist", Path("a/b/c")).folder.is_dir()
    assert not list(Path("empty").iterdir())
    assert not Path("runs").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
def test_an_output_that_cannot_be_written(place):
    Path("file").write_text("")
    with pytest.raises(UsageError, match="cannot write the output folder: .*give one with --output"):
        Run.create("mnist", Path(place))


def test_a_file_in_the_place_of_runs():
    Path("runs").write_text("")
    with pytest.raises(UsageError, match="cannot write the output folder: File exists"):
        Run.create("mnist", None)


# ---- Opened --------------------------------------------------------------------------------------------------------

def test_a_run_is_opened_with_its_recipe():
    run = Run.create("wool", None)
    write_json(run.recipe_file, RECIPE.to_json())
    write_json(run.manifest_file, {"seed": 3})
    again = Run.open(Path("runs/wool-1"))
    assert again.recipe() == RECIPE
    assert again.manifest() == {"seed": 3}


def test_a_compressed_run_is_opened_like_any(tmp_path):
    folder = tmp_path / "run" / "compressed" / "int8"
    write_json(folder / "recipe.json", RECIPE.to_json())
    write_json(folder / "manifest.json", {"recipe_reference": "wool", "data": "wool.h5"})
    run = Run.open(folder)
    assert run.recipe() == RECIPE
    assert (run.recipe_reference(), run.manifest()["data"]) == ("wool", "wool.h5")
    assert Run(tmp_path / "run").compressed == folder.parent


@pytest.mark.parametrize("manifest", [{}, {"recipe_reference": None}, {"recipe_reference": ["wool"]}])
def test_a_manifest_that_names_no_recipe(manifest):
    write_json(Path("manifest.json"), manifest)
    with pytest.raises(DataError, match="manifest.json names no recipe"):
        Run(Path(".")).recipe_reference()


def test_what_is_no_run_names_those_that_are():
    with pytest.raises(DataError, match="not a run folder; .*run `hpcai train RECIPE` first; received: 'none'"):
        Run.open(Path("none"))
    write_json(Run.create("wool", None).recipe_file, RECIPE.to_json())
    with pytest.raises(DataError, match="the newest here are runs/wool-1; received: 'runs'"):
        Run.open(Path("runs"))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 20])
def test_a_broken_json_file_is_bad_data(content):
    Path("recipe.json").write_bytes(content)
    with pytest.raises(DataError, match="cannot read recipe.json: .*expected a JSON object"):
        Run(Path(".")).recipe()


# ---- Written -------------------------------------------------------------------------------------------------------

def test_a_file_is_made_with_its_folders_and_the_usual_permissions():
    before = os.umask(0o027)
    try:
        write_json(Path("a/b/result.json"), {"accuracy": 0.5, "path": Path("x")})
    finally:
        os.umask(before)
    assert read_json(Path("a/b/result.json")) == {"accuracy": 0.5, "path": "x"}
    assert Path("a/b/result.json").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in Path("a/b").iterdir()] == ["result.json"]


def test_on_a_full_disk_what_was_there_is_still_there():
    write_json(Path("result.json"), {"accuracy": 0.5})
    # The limit on a file's size fails a write in its middle, as a full disk does.
    code = ("import resource; from pathlib import Path; from hpcai_cli.run import write_bytes;"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
            "write_bytes(Path('result.json'), bytes(10_000))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "cannot write result.json: File too large; what was there is unchanged" in done.stderr
    assert read_json(Path("result.json")) == {"accuracy": 0.5}
    assert [path.name for path in Path(".").iterdir()] == ["result.json"]


@pytest.mark.parametrize("place", ["file/below.json", "/proc/none.json", "folder"])
def test_a_place_that_cannot_be_written(place):
    Path("file").write_text("")
    Path("folder/full").mkdir(parents=True)
    with pytest.raises(HpcaiError, match=f"cannot write {place}: .*; what was there is unchanged") as caught:
        write_bytes(Path(place), b"x")
    assert caught.value.exit_code == 1
    assert sorted(path.name for path in Path(".").iterdir()) == ["file", "folder"]


def test_a_reader_never_sees_half_a_file():
    write_json(Path("state.json"), {"step": 0, "filler": "x" * 100_000})
    code = ("from pathlib import Path; from hpcai_cli.run import write_json\n"
            "for step in range(200): write_json(Path('state.json'), {'step': step, 'filler': 'x' * 100_000})")
    with subprocess.Popen([sys.executable, "-c", code]) as writer:
        seen = set()
        while writer.poll() is None:
            seen.add(read_json(Path("state.json"))["step"])
    assert writer.returncode == 0
    assert len(seen) > 1


def test_events_are_one_line_each():
    run = Run.create("wool", None)
    run.event("epoch", number=1, loss=0.5)
    run.event("checkpoint", path=Path("x"))
    lines = [json.loads(line) for line in run.events_file.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["epoch", "checkpoint"]
    assert lines[0]["loss"] == 0.5 and lines[1]["path"] == "x"
    assert lines[0]["time"] <= lines[1]["time"]


def test_the_first_failure_wins():
    run = Run.create("wool", None)
    run.record_failure(rank=3, error=DataError("the file is broken", received="a.h5"), exit_code=3)
    run.record_failure(rank=0, error=RuntimeError("the others have gone"), exit_code=1)
    failure = read_json(run.failure_file)
    assert failure.pop("time") > 1.6e9
    assert failure == {"rank": 3, "exit_code": 3, "kind": "DataError",
                       "message": "the file is broken; received: 'a.h5'"}


def test_a_failure_that_cannot_be_recorded_hides_no_other():
    Run(Path("none")).record_failure(rank=0, error=ValueError("x"), exit_code=1)
    assert not Path("none").exists()
