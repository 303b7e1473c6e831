"""Jobs of a real Slurm: by each launcher, saved before the limit and queued again, cancelled, as an array."""

import itertools
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

HPCAI = str(Path(sys.executable).parent / "hpcai")
pytestmark = pytest.mark.cluster
TRAIN = ("train", "./tiny.py", "--data", "tiny.h5")


def submitted(slurm, *words: object) -> tuple[str, Path]:
    """Hand a job in, and return its name and its run's folder."""
    done = slurm.hpcai("launch", "slurm", "--json", *words)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)["job"]
    return job, slurm.work / "runs" / job


def state(slurm, job: str) -> str:
    done = slurm.hpcai("launch", "status", job, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["jobs"][0]["state"]


def ended(slurm, job: str, seconds: float = 180) -> str:
    """Return what became of a job."""
    slurm.wait_for(lambda: not state(slurm, job).startswith(("pending", "running", "completing", "requeue")), job,
                   seconds)
    return state(slurm, job)


def log(slurm, job: str) -> str:
    return slurm.hpcai("launch", "logs", job).stdout


def epochs_that_last(seconds: float, run: Path) -> int:
    """Return how many epochs take so long on this machine, by those of a run."""
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    ends = [event["time"] for event in events if event["event"] == "epoch"]
    return round(seconds / statistics.median(after - before for before, after in itertools.pairwise(ends)))


def epochs_over_the_limit(slurm, tasks: int, launcher: str = "auto") -> int:
    """Return epochs with batches of one that Slurm stops at least once where the limit is 2 minutes.

    Its signal 50 seconds before comes up to a minute too early: 10 to 70 seconds after the start of a job. So many
    epochs take longer than the first hundred, since each checkpoint has the history.
    """
    outside = "horovodrun" if launcher == "horovodrun" else "auto"
    run = slurm.work / f"paced-{tasks}-{outside}"
    if not run.exists():
        done = slurm.hpcai(*TRAIN, "--batch-size", 1, "--epochs", 100, "--np", tasks, "--launcher", outside, "--output",
                           run)
        assert done.returncode == 0, done.stderr
    return epochs_that_last(65, run)


def arrays(run: Path) -> dict[str, np.ndarray]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    with np.load(newest / "arrays.npz") as found:
        return {name: found[name] for name in found.files}


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = arrays(one), arrays(other)
    assert first.keys() == second.keys()
    assert all(np.array_equal(value, second[name]) for name, value in first.items())


# ---- It runs -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("launcher", ["auto", "srun", "mpirun", "horovodrun"])
def test_two_tasks_train_one_model(slurm, launcher):
    job, run = submitted(slurm, "--tasks-per-node", 2, "--launcher", launcher, "--", *TRAIN)
    assert ended(slurm, job) == "done", log(slurm, job)
    assert json.loads((run / "manifest.json").read_text())["world_size"] == 2
    alone = slurm.hpcai(*TRAIN, "--np", 2, "--output", f"here-{launcher}")
    assert alone.returncode == 0, alone.stderr
    assert_same_bits(run, slurm.work / f"here-{launcher}")


def test_srun_itself_starts_ranks_that_find_each_other(slurm):
    """What somebody types who has read Slurm's manual and not ours."""
    done = slurm.run("srun", "--mpi=pmix", "--ntasks", 2, HPCAI, *TRAIN, "--output", "by-srun", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == 2


def test_mnist_by_srun_to_the_accuracy_outside_of_slurm(slurm, train_mnist):
    words, accuracy = train_mnist()
    done = slurm.run("srun", "--mpi=pmix", "--ntasks", 2, HPCAI, *words, "--output", "mnist-by-srun", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["accuracy"] == accuracy


def test_ranks_that_srun_has_started_are_tried_by_the_doctor(slurm):
    done = slurm.run("srun", "--mpi=pmix", "--ntasks", 2, HPCAI, "doctor", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [(finding["name"], finding["status"]) for finding in document["findings"]] == [
        ("allreduce", "ok"), ("training step", "ok")]
    assert "2 ranks over MPI" in document["findings"][0]["value"]
    said = slurm.run(sys.executable, "-c", "from hpcai_cli.engine.environment import software; "
                     "print(software._slurm().value)")
    assert said.stdout.startswith("slurm") and said.stdout.endswith("with PMIx\n"), said


def test_srun_without_pmix_is_refused(slurm):
    done = slurm.run("srun", "--mpi=none", "--ntasks", 2, HPCAI, *TRAIN, "--output", "apart")
    assert done.returncode == 4, done.stderr
    assert "srun started 2 processes without a means to find each other" in done.stderr
    assert "start them by `srun --mpi=pmix`" in done.stderr
    assert not list((slurm.work / "apart").glob("checkpoints/*"))


def test_the_data_are_staged_and_the_run_names_the_original(slurm):
    stage = slurm.folder / "disk"
    job, run = submitted(slurm, "--stage", stage, "--", *TRAIN)
    assert ended(slurm, job) == "done", log(slurm, job)
    assert str(stage) in log(slurm, job), "it trained on the copy"
    assert json.loads((run / "manifest.json").read_text())["data"] == str(slurm.work / "tiny.h5")
    assert not list(stage.iterdir()), "and the copy is gone"


def test_an_array_has_a_run_for_each_task(slurm):
    job, run = submitted(slurm, "--array", "1-2", "--", *TRAIN, "--seed", "{task}")
    assert ended(slurm, job) == "done", log(slurm, job)
    seeds = [json.loads((run.with_name(f"{job}-{task}") / "recipe.json").read_text())["seed"] for task in (1, 2)]
    assert seeds == [1, 2]


def test_the_tasks_of_an_array_work_on_one_study(slurm):
    words = ("tune", "./tiny.py", "--data", "tiny.h5", "--search", "learning_rate=log:1e-4:1e-1", "--trials", 4,
             "--epochs", 2, "--study", "searched")
    job, _ = submitted(slurm, "--array", "1-2", "--", *words)
    assert ended(slurm, job) == "done", log(slurm, job)
    found = json.loads(slurm.hpcai("tune", "show", "searched", "--json").stdout)
    assert found["trials"] == {"complete": 4}
    logs = log(slurm, job)
    assert all(logs.count(f"trial {number}: ") == 1 for number in range(4)), logs


@pytest.mark.timeout(900)
def test_a_search_is_queued_again_at_its_limit_and_goes_on(slurm):
    epochs = epochs_over_the_limit(slurm, 1)
    words = ("tune", "./tiny.py", "--data", "tiny.h5", "--search", "learning_rate=log:1e-4:1e-1", "--trials", 1,
             "--set", "batch_size=1", "--epochs", epochs, "--study", "limited")
    job, _ = submitted(slurm, "--time", 2, "--signal-before", 50, "--", *words)
    assert ended(slurm, job, 600) == "done", log(slurm, job)
    assert "stopped before the limit; queued again to go on" in log(slurm, job)
    events = (slurm.work / "limited" / "trials" / "0000" / "events.jsonl").read_text().splitlines()
    told = [json.loads(line)["event"] for line in events]
    assert told.count("started") == 1 and told.count("resumed") >= 1 and told.count("epoch") == epochs


# ---- It ends -------------------------------------------------------------------------------------------------------

@pytest.mark.timeout(900)
@pytest.mark.parametrize(("tasks", "launcher"), [(1, "auto"), (2, "srun"), (2, "horovodrun")])
def test_a_job_saves_itself_before_its_limit_is_queued_again_and_goes_on(slurm, tasks, launcher):
    words = ("--tasks-per-node", tasks, "--launcher", launcher)
    training = (*TRAIN, "--batch-size", 1, "--epochs", epochs_over_the_limit(slurm, tasks, launcher))
    job, run = submitted(slurm, *words, "--time", 2, "--signal-before", 50, "--", *training)
    slurm.wait_for(lambda: run.joinpath("events.jsonl").exists()
                   and '"stopped"' in run.joinpath("events.jsonl").read_text(), "the signal", 240)
    assert ended(slurm, job, 600) == "done", log(slurm, job)
    assert "stopped before the limit; queued again to go on" in log(slurm, job)
    done = slurm.hpcai(*training, "--np", tasks, "--output", f"whole-{tasks}-{launcher}")
    assert done.returncode == 0, done.stderr
    assert_same_bits(run, slurm.work / f"whole-{tasks}-{launcher}")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("tasks", "launcher"), [(1, "auto"), (2, "srun")])
def test_without_a_signal_the_limit_is_read_from_slurm(slurm, tasks, launcher):
    words = ("--tasks-per-node", tasks, "--launcher", launcher)
    job, run = submitted(slurm, *words, "--time", 2, "--signal-before", 0, "--", *TRAIN, "--epochs", 1_000_000)
    events = run / "events.jsonl"
    slurm.wait_for(lambda: events.exists() and '"stopped"' in events.read_text(), "the limit", 240)
    stopped = json.loads(events.read_text().splitlines()[-1])
    assert stopped["signal"] == "the time limit (Slurm's)"
    slurm.wait_for(lambda: "queued again to go on" in log(slurm, job), "the queue")
    assert slurm.hpcai("launch", "cancel", job).returncode == 0
    slurm.wait_for(lambda: not state(slurm, job).startswith(("running", "completing")), job)
    assert f'"event": "stopped", "step": {stopped["step"]}' in events.read_text()


@pytest.mark.timeout(1200)
def test_mnist_to_the_same_accuracy_with_a_limit_on_the_way(slurm, train_mnist):
    words, _ = train_mnist(5)
    words, accuracy = train_mnist(epochs_that_last(75, Path(words[words.index("--data") + 1]).with_name("run-5")))
    job, run = submitted(slurm, "--tasks-per-node", 2, "--time", 2, "--signal-before", 50, "--", *words)
    assert ended(slurm, job, 900) == "done", log(slurm, job)
    assert "queued again to go on" in log(slurm, job)
    assert json.loads((run / "result.json").read_text())["metrics"]["accuracy"] == accuracy


@pytest.mark.parametrize(("tasks", "launcher"), [(1, "auto"), (2, "srun"), (2, "mpirun"), (2, "horovodrun")])
def test_a_job_that_is_cancelled_saves_itself(slurm, tasks, launcher):
    job, run = submitted(slurm, "--tasks-per-node", tasks, "--launcher", launcher, "--", *TRAIN, "--epochs", 100_000)
    events = run / "events.jsonl"
    slurm.wait_for(lambda: events.exists() and events.read_text().count('"epoch"') > 2, "an epoch", 90)
    assert state(slurm, job) == "running"
    done = slurm.hpcai("launch", "cancel", job)
    assert done.returncode == 0, done.stderr
    assert ended(slurm, job) == "stopped, resumable", log(slurm, job)
    assert json.loads(events.read_text().splitlines()[-1])["event"] == "stopped"


def test_a_job_that_waits_is_cancelled(slurm):
    job, run = submitted(slurm, "--option=--begin=now+1hour", "--", *TRAIN)
    assert state(slurm, job).startswith("pending")
    assert slurm.hpcai("launch", "cancel", job).returncode == 0
    assert ended(slurm, job) == "cancelled" and not run.exists()


def test_a_job_that_can_never_start_says_why(slurm):
    job, _ = submitted(slurm, "--nodes", 99, "--", *TRAIN)
    slurm.wait_for(lambda: state(slurm, job).startswith("pending ("), "the reason")
    assert slurm.hpcai("launch", "cancel", job).returncode == 0


def test_a_failing_job_tells_its_exit_code(slurm):
    job, run = submitted(slurm, "--tasks-per-node", 2, "--", *TRAIN, "--set", "break_rank=1")
    assert ended(slurm, job) == "failed with exit code 2", log(slurm, job)
    assert "[rank 1] error: " in log(slurm, job) and json.loads((run / "failure.json").read_text())["rank"] == 1


@pytest.mark.parametrize(("words", "message"), [
    (["--partition", "none"], "nvalid partition"), (["--option=--no-such"], "unrecognized option")])
def test_what_slurm_refuses_leaves_nothing(slurm, words, message):
    before = sorted(slurm.work.glob("jobs/*"))
    done = slurm.hpcai("launch", "slurm", *words, "--", *TRAIN)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: Slurm does not take the job") and message in done.stderr
    assert sorted(slurm.work.glob("jobs/*")) == before
