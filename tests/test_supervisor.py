"""Ranks that die or hang, for real: found, their stacks kept, and the training goes on to the very same weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from hpcai_cli import supervisor
from hpcai_cli.rank_processes import Outcome
from hpcai_cli.run import Run
from hpcai_cli.watch import Watch

HPCAI = str(Path(sys.executable).parent / "hpcai")
BLOCKING = '''

def augment(inputs, seed, recipe):
    """Block for ever at a step of rank 1."""
    import time

    import tensorflow as tf

    from hpcai_cli import launch

    def the_place_where_it_hangs(values, place):
        while int(place) == recipe.options["block_step"] * launch.place().size + 1:
            time.sleep(1)
        return values

    place = inputs.shape
    inputs = tf.py_function(the_place_where_it_hangs, [inputs, seed[1]], inputs.dtype)
    return tf.ensure_shape(inputs, place)
'''

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")


class Job:
    """A training that runs, in the folder `run`."""

    def __init__(self, folder: Path, process: subprocess.Popen, ranks: Callable[[], dict[int, int]]):
        self.folder, self.process, self.ranks = folder, process, ranks

    def wait_for(self, checkpoints: int) -> None:
        events = self.folder / "run" / "events.jsonl"
        end = time.monotonic() + 150
        while not events.exists() or events.read_text().count('"event": "checkpoint"') < checkpoints:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, "the training does not come that far"
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Wait for the end, and return exit code and stderr."""
        _, errors = self.process.communicate(timeout=200)
        return self.process.returncode, errors


@pytest.fixture
def train(tiny_folder, ranks_in):
    """Return a context in which a training of the tiny recipe runs, with these words."""
    @contextmanager
    def started(*words: str):
        with subprocess.Popen([HPCAI, "train", "./tiny.py", "--epochs", "40", "--output", "run", *words],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            job = Job(tiny_folder, process, lambda: ranks_in(tiny_folder))
            try:
                yield job
            finally:
                if process.poll() is None:
                    for rank in job.ranks().values():
                        os.kill(rank, signal.SIGKILL)
                    process.kill()
    return started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_recipe):
    """Return a function np -> the last arrays of a training that nothing happened to."""
    found = {}

    def of(np: int) -> dict:
        if np not in found:
            folder = tmp_path_factory.mktemp("undisturbed")
            (folder / "tiny.py").write_text(tiny_recipe)
            done = subprocess.run([HPCAI, "train", "./tiny.py", "--epochs", "40", "--output", "run", "--np", str(np)],
                                  capture_output=True, text=True, cwd=folder, timeout=200)
            assert done.returncode == 0, done.stderr
            found[np] = arrays(folder / "run")
        return found[np]
    return of


def arrays(run: Path) -> dict:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    with np.load(newest / "arrays.npz") as found:
        return {name: found[name] for name in found.files}


def assert_as_undisturbed(run: Path, expected: dict) -> None:
    found = arrays(run)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    assert not (run / "failure.json").exists()


def events(run: Path, kind: str) -> list[dict]:
    return [event for line in (run / "events.jsonl").read_text().splitlines()
            if (event := json.loads(line))["event"] == kind]


# ---- Ranks that die ------------------------------------------------------------------------------------------------

@needs_horovod
@pytest.mark.parametrize("launcher", [pytest.param("horovodrun", marks=pytest.mark.long),
                                      pytest.param("mpirun", marks=needs_mpirun)])
def test_a_killed_rank_costs_nothing_but_time(train, undisturbed, launcher):
    with train("--np", "2", "--launcher", launcher) as job:
        job.wait_for(3)
        os.kill(job.ranks()[1], signal.SIGKILL)
        code, said = job.end()
    assert code == 0, said
    assert "rank 1 was ended by SIGKILL at step " in said
    assert "; restarting from the newest checkpoint in 1 s (1 of 3)\n" in said
    assert "error:" not in said and "\x1d" not in said
    run = job.folder / "run"
    assert_as_undisturbed(run, undisturbed(2))
    assert events(run, "restart")[0]["number"] == "1 of 3"
    assert not (run / "stacks").exists(), "nobody has written any"


@pytest.mark.long
def test_a_single_process_is_restarted_where_that_is_asked_for(train, undisturbed):
    with train("--max-restarts", "1") as job:
        job.wait_for(3)
        os.kill(job.ranks()[0], signal.SIGKILL)
        code, said = job.end()
    assert code == 0, said
    assert "rank 0 was ended by SIGKILL" in said and "(1 of 1)" in said
    assert_as_undisturbed(job.folder / "run", undisturbed(1))


@pytest.mark.long
def test_a_signal_in_a_pause_ends_it_and_the_run_can_be_resumed(train):
    with train("--max-restarts", "3") as job:
        job.wait_for(3)
        os.kill(job.ranks()[0], signal.SIGKILL)
        for line in job.process.stderr:
            if "restarting" in line:
                job.process.terminate()
                break
        code, said = job.end()
    assert code == 75, said
    assert "hpcai train --resume run" in said
    assert events(job.folder / "run", "stopped")


# ---- Ranks that hang -----------------------------------------------------------------------------------------------

@pytest.mark.long
@needs_horovod
def test_a_stopped_rank_is_found_and_the_training_goes_on(train, undisturbed):
    with train("--np", "2", "--heartbeat", "5") as job:
        job.wait_for(3)
        stopped = time.monotonic()
        os.kill(job.ranks()[1], signal.SIGSTOP)
        said = ""
        while "restarting" not in said:
            said = job.process.stderr.readline()
            assert said, job.end()
        assert time.monotonic() - stopped < 15
        code, rest = job.end()
    assert code == 0, rest
    assert "gives no sign of life for 5 s" in said and "rank 1 on " in said
    run = job.folder / "run"
    assert_as_undisturbed(run, undisturbed(2))
    for rank in (0, 1):
        assert "in train\n" in (run / "stacks" / f"rank-{rank}.txt").read_text(), rank


@pytest.mark.long
@needs_horovod
def test_ranks_that_are_all_stopped_are_found(train):
    with train("--np", "2", "--heartbeat", "5", "--max-restarts", "0") as job:
        job.wait_for(3)
        for process in job.ranks().values():
            os.kill(process, signal.SIGSTOP)
        code, said = job.end()
    assert code == 1
    assert said.count("error:") == 1 and "rank 0 on " in said and "give no sign of life for 5 s" in said, said
    assert not job.ranks()
    failure = json.loads((job.folder / "run" / "failure.json").read_text())
    assert (failure["exit_code"], failure["rank"]) == (1, 0)


@pytest.mark.long
@needs_horovod
def test_a_deadlock_at_the_same_step_is_named_and_given_up(train):
    recipe = Path("tiny.py")
    recipe.write_text(recipe.read_text().replace('"break_rank": -1', '"break_rank": -1, "block_step": 12') + BLOCKING)
    with train("--np", "2", "--heartbeat", "4") as job:
        code, said = job.end()
    assert code == 1
    where = "no rank makes progress (rank 1 is in the_place_where_it_hangs) at step 1"
    assert said.count(where) == 2 and said.count("restarting from the newest checkpoint") == 1, said
    error = said[said.index("error: "):]
    assert error.startswith("error: " + where) and "where it had failed before" in error
    stacks = (job.folder / "run" / "stacks" / "rank-1.txt").read_text()
    assert stacks.count("in the_place_where_it_hangs") == 2
    assert json.loads((job.folder / "run" / "failure.json").read_text())["rank"] == 1


@pytest.mark.long
@needs_horovod
@needs_mpirun
def test_ranks_that_somebody_else_has_started_end_where_they_hang(tiny_folder):
    recipe = tiny_folder / "tiny.py"
    recipe.write_text(recipe.read_text().replace('"break_rank": -1', '"break_rank": -1, "block_step": 12') + BLOCKING)
    done = subprocess.run(["mpirun", "-np", "2", "--oversubscribe", HPCAI, "train", "./tiny.py", "--output", "run",
                           "--heartbeat", "4"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert "error: no progress for " in done.stderr and "\x1d" not in done.stderr
    assert "in the_place_where_it_hangs" in (tiny_folder / "run" / "stacks" / "rank-1.txt").read_text()


# ---- What is tried again -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("outcome", "step", "recorded", "expected"), [
    (Outcome(1, 1, signal="SIGKILL"), -1, None, True), (Outcome(1, 1, hang="rank 1 hangs"), -1, None, True),
    (Outcome(1, 1, reported=True), 7, 1, True), (Outcome(1, 1, reported=True), -1, 1, False),
    (Outcome(9, None, launcher_words="lost connection to host b"), -1, None, True),
    (Outcome(1, 1, reported=True), 7, 6, False), (Outcome(1, 1, signal="SIGKILL"), 7, 3, False),
    (Outcome(130, 1), 7, None, False), (Outcome(1, 0, signal="SIGSEGV", answered=True), 7, None, False),
    *((Outcome(code, 1, reported=True), 7, code, False) for code in (2, 3, 4, 5, 6))])
def test_what_may_go_well_the_next_time_is_tried_again(outcome, step, recorded, expected):
    run, watch = Run(Path("run")), Watch(2, 30, Path("run/stacks"))
    run.folder.mkdir()
    if recorded:
        run.record_failure(rank=1, error=RuntimeError("it broke"), exit_code=recorded)
    for rank in ("0", "1"):
        watch.heard(int(rank), [rank, str(step), "1", "working", "7"])
    assert supervisor._failure(outcome, watch, run).is_transient is expected


def test_a_launcher_that_never_came_to_start_ranks_is_not_tried_again():
    outcome = Outcome(1, None, launcher_words="There are not enough slots available")
    assert not supervisor._failure(outcome, Watch(2, 30, Path("stacks")), Run(Path("run"))).is_transient


@pytest.mark.parametrize(("words", "said"), [
    (["--heartbeat", "0.5"], "at least 1 second"), (["--prove", "--max-restarts", "2"], "--prove")])
def test_what_cannot_be_had_is_refused(hpcai, words, said):
    done = hpcai("train", "mnist-mlp", *words)
    assert done.exit_code == 2 and said in done.stderr


def test_ranks_that_somebody_else_has_started_are_not_ours_to_restart(hpcai, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    done = hpcai("train", "mnist-mlp", "--max-restarts", "2")
    assert done.exit_code == 2 and "mpiexec has started these" in done.stderr
