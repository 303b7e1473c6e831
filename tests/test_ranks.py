"""Real processes: two ranks under horovodrun and mpirun, signals, exact resume, failures of a rank."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from hpcai_cli import run_lock

HPCAI = str(Path(sys.executable).parent / "hpcai")
HOROVODRUN = str(Path(sys.executable).parent / "horovodrun")

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")


@pytest.fixture
def folder(tiny_folder):
    """A working folder with the tiny recipe in it."""
    return tiny_folder


def run(*command, timeout=120):
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@contextmanager
def started(*command):
    """A process that is told to end when the test ends before it does."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def last_arrays(run_folder):
    newest = sorted((Path(run_folder) / "checkpoints").glob("step-*"))[-1]
    with np.load(newest / "arrays.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def assert_same_bits(one, other):
    first, second = last_arrays(one), last_arrays(other)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@needs_horovod
def test_two_processes_equal_one_at_twice_the_batch(folder):
    alone = run(HPCAI, "train", "./tiny.py", "--output", "alone", "--batch-size", "16", "--json")
    both = run(HPCAI, "train", "./tiny.py", "--output", "both", "--np", "2", "--json")
    assert (alone.returncode, both.returncode) == (0, 0), alone.stderr + both.stderr
    one, two = json.loads(alone.stdout), json.loads(both.stdout)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["steps"] == two["steps"]
    # 80 training examples are no multiple of 16 x 2 x anything here: the last step is padded, its mean still exact.
    weights = [name for name in last_arrays("alone") if name.startswith("model")]
    for name in weights:
        np.testing.assert_allclose(last_arrays("both")[name], last_arrays("alone")[name], rtol=1e-4, atol=1e-5)
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-4)


@needs_horovod
def test_evaluate_gives_the_same_numbers_for_one_and_two_processes(folder):
    assert run(HPCAI, "train", "./tiny.py", "--output", "done").returncode == 0
    one = run(HPCAI, "evaluate", "done", "--json")
    two = run(HPCAI, "evaluate", "done", "--json", "--np", "2", "--require", "accuracy>=0")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    first, second = json.loads(one.stdout), json.loads(two.stdout)
    assert first["examples"] == second["examples"] == 23
    assert first["confusion"] == second["confusion"]
    for name, value in first["metrics"].items():
        assert second["metrics"][name] == pytest.approx(value, rel=1e-6), name
    failed = run(HPCAI, "evaluate", "done", "--np", "2", "--require", "accuracy>=1.5")
    assert failed.returncode == 5
    assert failed.stderr.count("error:") == 1


@needs_horovod
@pytest.mark.long
def test_a_chain_of_compressions_in_two_processes(folder):
    trained = run(HPCAI, "train", "./tiny.py", "--output", "run", "--epochs", "2")
    assert trained.returncode == 0, trained.stderr
    # Without --trust-model: the model has no classes of its own; the student is another form of the same recipe.
    both = run(HPCAI, "compress", "run", "--distill", "dropout=0.1", "--prune", "0.5", "--quantize", "int8", "--aware",
               "--epochs", "3", "--np", "2", "--json", timeout=280)
    assert both.returncode == 0, both.stderr
    report = json.loads(both.stdout)
    assert Path(report["chosen"]).name == "distil_dropout=0.1-prune_0.5-aware-int8"
    pruned = next(row for row in report["forms"] if row["name"].endswith("aware-float32"))
    # Half of the weights, of those that can go, went on both ranks alike, and stayed away under quantization.
    assert pruned["sparsity"] == pytest.approx(0.5, abs=0.02)
    manifest = json.loads(Path("run/compressed/distil_dropout=0.1/result.json").read_text())
    assert manifest["world_size"] == 2


@needs_horovod
@needs_mpirun
def test_horovodrun_and_mpirun_from_outside_give_the_same_weights(folder):
    outside = run(HOROVODRUN, "-np", "2", "--gloo", "--disable-cache", HPCAI, "train", "./tiny.py", "--output", "h")
    mpi = run("mpirun", "-np", "2", "--oversubscribe", HPCAI, "train", "./tiny.py", "--output", "m", "--json")
    assert (outside.returncode, mpi.returncode) == (0, 0), outside.stderr + mpi.stderr
    # Rank 0 alone writes stdout, so that under mpirun too it is one JSON document.
    assert json.loads(mpi.stdout)["world_size"] == 2
    assert_same_bits("h", "m")


@pytest.mark.long
@needs_horovod
@needs_mpirun
@pytest.mark.parametrize("launcher", [[HOROVODRUN, "-np", "2", "--gloo", "--disable-cache"],
                                      ["mpirun", "-np", "2", "--oversubscribe"]], ids=["horovodrun", "mpirun"])
def test_mnist_to_the_same_accuracy(folder, train_mnist, launcher):
    words, accuracy = train_mnist()
    done = run(*launcher, HPCAI, *words, "--output", "run", timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "run" / "result.json").read_text())["metrics"]["accuracy"] == accuracy


@needs_horovod
@pytest.mark.parametrize(("processes", "number"), [
    pytest.param(1, signal.SIGINT, marks=pytest.mark.long), pytest.param(1, signal.SIGTERM, marks=pytest.mark.long),
    pytest.param(1, signal.SIGUSR1, marks=pytest.mark.long), (2, signal.SIGINT)])
def test_a_signal_ends_in_a_checkpoint_and_resuming_gives_the_undisturbed_weights(folder, processes, number):
    common = ["./tiny.py", "--np", str(processes), "--epochs", "100", "--set", "dropout=0.3"]
    events = folder / "stopped" / "events.jsonl"
    with started(HPCAI, "train", *common, "--output", "stopped") as stopped:
        wait_until(lambda: events.exists() and events.read_text().count('"epoch"') > 4, stopped)
        stopped.send_signal(number)
        output, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, errors
    assert output == ""
    assert "hpcai train --resume stopped" in errors
    assert not (folder / "stopped" / "failure.json").exists()
    assert json.loads(events.read_text().splitlines()[-1])["event"] == "stopped"

    resumed = run(HPCAI, "train", "--resume", "stopped", "--np", str(processes))
    whole = run(HPCAI, "train", *common, "--output", "whole")
    assert (resumed.returncode, whole.returncode) == (0, 0), resumed.stderr + whole.stderr
    assert_same_bits("stopped", "whole")


@pytest.mark.long
@needs_horovod
def test_stopped_as_two_processes_and_resumed_as_one_keeps_the_schedule(folder):
    """The schedule is of epochs: at their ends the learning rates are those of a training that never stopped."""
    common = ["./tiny.py", "--epochs", "60", "--set", "warmup_epochs=1"]
    events = folder / "stopped" / "events.jsonl"
    with started(HPCAI, "train", *common, "--np", "2", "--batch-size", "5", "--output", "stopped") as stopped:
        wait_until(lambda: events.exists() and events.read_text().count('"epoch"') > 4, stopped)
        stopped.send_signal(signal.SIGTERM)
        _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, errors
    resumed = run(HPCAI, "train", "--resume", "stopped", "--batch-size", "8", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert run(HPCAI, "train", *common, "--batch-size", "8", "--output", "whole").returncode == 0
    found, expected = (np.genfromtxt(folder / name / "history.csv", delimiter=",", names=True)
                       for name in ("stopped", "whole"))
    assert json.loads(resumed.stdout)["world_size"] == 1
    assert found["epoch"].tolist() == list(range(1, 61))
    # 80 examples are 8 steps of 2 x 5 and 10 of 8.
    np.testing.assert_allclose(found["learning_rate"], expected["learning_rate"], rtol=1e-5, atol=1e-9)


@needs_horovod
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_loss_that_is_no_number_ends_the_job_once_with_exit_code_6(folder, processes):
    done = run(HPCAI, "train", "./tiny.py", "--np", processes, "--set", "optimizer=sgd", "--learning-rate", "1e38",
               "--output", "nan")
    assert done.returncode == 6
    assert done.stderr.count("error:") == 1
    assert "at step" in done.stderr
    failure = json.loads((folder / "nan" / "failure.json").read_text())
    assert (failure["exit_code"], failure["kind"]) == (6, "DivergedError")


@needs_horovod
def test_the_first_failing_rank_is_named(folder):
    done = run(HPCAI, "train", "./tiny.py", "--np", "2", "--set", "break_rank=1", "--output", "broken")
    assert done.returncode == 2
    assert "[rank 1] error: recipe tiny: build_model fails" in done.stderr
    failure = json.loads((folder / "broken" / "failure.json").read_text())
    assert failure["rank"] == 1
    assert "told to break" in failure["message"]


@needs_horovod
@pytest.mark.parametrize("launcher", ["horovodrun", pytest.param("mpirun", marks=[needs_mpirun, pytest.mark.long])])
def test_a_rank_that_is_killed_fails_a_job_without_restarts(folder, ranks_in, launcher):
    events = folder / "killed" / "events.jsonl"
    with started(HPCAI, "train", "./tiny.py", "--np", "2", "--launcher", launcher, "--epochs", "100000", "--output",
                 "killed", "--max-restarts", "0") as job:
        wait_until(lambda: events.exists() and events.read_text().count('"epoch"') > 2, job)
        os.kill(ranks_in(folder)[1], signal.SIGKILL)
        _, errors = job.communicate(timeout=90)
    assert job.returncode == 1, errors
    assert "error: rank 1 was ended by SIGKILL" in errors and errors.count("error:") == 1, errors
    failure = json.loads((folder / "killed" / "failure.json").read_text())
    assert (failure["exit_code"], failure["rank"]) == (1, 1) and "SIGKILL" in failure["message"]


@needs_horovod
@pytest.mark.parametrize("launcher", [pytest.param("horovodrun", marks=pytest.mark.long),
                                      pytest.param("mpirun", marks=needs_mpirun)])
def test_ranks_end_when_the_process_that_started_them_is_killed(folder, launcher):
    events, words = folder / "orphaned" / "events.jsonl", ("train", "./tiny.py", "--np", "2", "--launcher", launcher)
    with started(HPCAI, *words, "--epochs", "100000", "--output", "orphaned") as job:
        wait_until(lambda: events.exists() and events.read_text().count('"epoch"') > 2, job, 120)
        job.kill()
        job.communicate(timeout=60)
    # They would hold it as long as they train.
    with run_lock.held(folder / "orphaned", patience=20):
        pass


@needs_horovod
def test_ranks_with_different_weights_are_found(folder):
    (folder / "apart.py").write_text("""
import sys
import keras
from hpcai_cli.engine.distributed import prove_in_step, start
from hpcai_cli.errors import DivergedError
ranks = start()
same, apart = keras.Variable([1.0, 2.0]), keras.Variable([1.0, 2.0 + 1e-7 * ranks.rank * 4])
prove_in_step(ranks, [same], when="before")
try:
    prove_in_step(ranks, [same, apart], when="now")
except DivergedError as error:
    assert "[1]" in str(error) and "now" in str(error), error
    ranks.broadcast([apart])
    prove_in_step(ranks, [same, apart], when="after the broadcast")
    ranks.stop()
    sys.exit(0)
sys.exit("nothing was found")
""")
    done = run(HOROVODRUN, "-np", "2", "--gloo", "--disable-cache", sys.executable, "apart.py")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("launcher", "mend"), [
    ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "--build-horovod"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "--build-horovod"), ({"PMIX_RANK": "0"}, "--build-horovod"),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}, "srun --mpi=pmix")])
def test_one_of_two_that_finds_itself_alone_refuses_to_train(folder, monkeypatch, launcher, mend):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    done = run(HPCAI, "train", "./tiny.py", "--output", "alone")
    assert done.returncode == 4, done.stderr
    assert mend in done.stderr
    assert not (folder / "alone").exists()


def test_np_without_horovod_is_an_error(folder, tmp_path):
    # A Python that cannot see Horovod: the real check, in a real process, with the package hidden from the import.
    hidden = ("import sys; sys.modules['horovod'] = None; sys.argv = ['hpcai', 'train', './tiny.py', '--np', '4'];"
              "from hpcai_cli.main import main; main()")
    done = run(sys.executable, "-c", hidden)
    assert done.returncode == 4
    assert "hpcai doctor --build-horovod" in done.stderr
    assert not (folder / "runs").exists()


def wait_until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)
