"""hpcai launch: scripts as bash reads them, jobs in the background for real, a site's defaults, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcai_cli import jobs

HPCAI = str(Path(sys.executable).parent / "hpcai")


def script(hpcai, *words: object) -> str:
    done = hpcai("launch", *words)
    assert done.exit_code == 0, done.stderr
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, capture_output=True).stderr == ""
    return done.stdout


def until(holds, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def state(hpcai, job: str) -> str:
    return json.loads(hpcai("launch", "status", job, "--json").stdout)["jobs"][0]["state"]


# ---- Scripts -------------------------------------------------------------------------------------------------------

def test_what_is_asked_of_slurm_stands_in_the_script(hpcai):
    Path("m.h5").touch()
    written = script(hpcai, "slurm", "--dry-run", "--nodes", 2, "--tasks-per-node", 4, "--cpus-per-task", 8,
                     "--gpus-per-task", 1, "--time", "1-12:00:00", "--partition", "gpu", "--account", "p1",
                     "--signal-before", 300, "--module", "cuda/12.4", "--option=--qos=long", "--",
                     "train", "mnist", "--data", "m.h5")
    asked = [line[8:] for line in written.splitlines() if line.startswith("#SBATCH ")]
    assert {"--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=8", "--gpus-per-task=1", "--time=1-12:00:00",
            "--partition=gpu", "--account=p1", "--signal=B:USR1@300", "--requeue", "--qos=long"} <= set(asked)
    assert "module load cuda/12.4\n" in written and '--np "${SLURM_NTASKS:-8}"' in written
    assert not Path("jobs").exists()


def test_what_is_not_asked_is_slurms_to_decide(hpcai):
    written = script(hpcai, "slurm", "--dry-run", "--no-requeue", "--signal-before", 0, "--", "evaluate", "runs/a")
    for absent in ("--time", "--signal", "--partition", "--gpus-per-task", "--array", "--np", "scontrol", "--resume"):
        assert absent not in written
    assert "#SBATCH --no-requeue\n" in written


def test_words_reach_the_command_as_they_are(hpcai):
    words = ["predict", "a run's folder", "a b.png", "$(touch evil)", "`id`", '"', ";", "é"]
    written = script(hpcai, "slurm", "--dry-run", "--", *words)
    line = next(line for line in written.splitlines() if line.startswith("command=("))
    line += '; printf "%s\\n" "${command[@]:1}"'
    shown = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert shown.stdout.splitlines() == words and not Path("evil").exists()


def test_the_index_of_an_array_stands_in_the_words(hpcai):
    written = script(hpcai, "slurm", "--dry-run", "--array", "1-8%2", "--", "train", "mnist", "--set", "seed={task}")
    assert "#SBATCH --array=1-8%2\n" in written and "log-%a.txt" in written
    line = next(line for line in written.splitlines() if line.startswith("command=("))
    shown = subprocess.run(["bash", "-c", f'task=7; {line}; echo "${{command[@]}}"'], capture_output=True, text=True)
    assert shown.stdout.endswith("--set seed=7\n")


def test_ranks_in_a_container_are_started_by_srun(hpcai):
    written = script(hpcai, "slurm", "--dry-run", "--tasks-per-node", 2, "--gpus-per-task", 1, "--container",
                     "hpcai.sif", "--", "train", "mnist")
    assert "command=(srun --mpi=pmix" in written and "apptainer exec --nv hpcai.sif hpcai train mnist" in written
    assert "--np" not in written


# ---- A site's defaults ---------------------------------------------------------------------------------------------

def test_a_site_says_what_nobody_wants_to_type(hpcai, monkeypatch):
    Path("site.toml").write_text('[slurm]\npartition = "gpu"\nmodules = ["cuda/12"]\ncpus_per_task = 8\n'
                                 'requeue = false\nsetup = ["ulimit -l unlimited"]\n')
    monkeypatch.setenv("HPCAI_SITE", "site.toml")
    written = script(hpcai, "slurm", "--dry-run", "--cpus-per-task", 4, "--", "train", "mnist")
    for line in ("#SBATCH --partition=gpu", "module load cuda/12", "#SBATCH --cpus-per-task=4", "#SBATCH --no-requeue",
                 "ulimit -l unlimited"):
        assert f"{line}\n" in written


@pytest.mark.parametrize(("text", "message"), [
    ('[slurm]\npartitoin = "x"', "perhaps 'partition'"), ('[slurm]\nnodes = "2"', "expected a whole number"),
    ("[slurm]\nrequeue = 1", "expected true or false"), ("[slurm]\nmodules = [1]", "expected a list of strings"),
    ("slurm = 1", "expected [slurm]"), ("[slurm", "expected a TOML file"), ("", None), ("[kubernetes]", None)])
def test_what_a_site_cannot_say(hpcai, monkeypatch, text, message):
    Path("site.toml").write_text(text)
    monkeypatch.setenv("HPCAI_SITE", "site.toml")
    done = hpcai("launch", "slurm", "--dry-run", "--", "train", "mnist")
    assert done.exit_code == (3 if message else 0) and (message or "") in done.stderr


def test_a_sites_file_that_is_named_must_be_there(hpcai, monkeypatch):
    monkeypatch.setenv("HPCAI_SITE", "none.toml")
    assert hpcai("launch", "slurm", "--dry-run", "--", "train", "mnist").exit_code == 3


# ---- In the background ---------------------------------------------------------------------------------------------

def test_a_job_in_the_background_ends_and_says_how(hpcai):
    done = hpcai("launch", "local", "--json", "--", "recipes", "list")
    assert done.exit_code == 0, done.stderr
    job = json.loads(done.stdout)["job"]
    assert job == "recipes-list-1"
    until(lambda: state(hpcai, job) == "done")
    assert "mnist" in hpcai("launch", "logs", job).stdout
    failing = json.loads(hpcai("launch", "local", "--json", "--", "train", "mnost").stdout)["job"]
    until(lambda: state(hpcai, failing) == "failed with exit code 2")
    table = hpcai("launch", "status").stdout
    assert "recipes-list-1" in table and "train-mnost-1" in table


def test_a_job_that_is_cancelled_saves_itself_and_goes_on_when_it_is_started_again(tmp_path, tiny_recipe):
    (tmp_path / "tiny.py").write_text(tiny_recipe)

    def run(*words: object) -> subprocess.CompletedProcess:
        return subprocess.run([HPCAI, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=120)

    started = run("launch", "local", "--json", "--", "train", "./tiny.py", "--epochs", 100_000)
    assert started.returncode == 0, started.stderr
    job, events = json.loads(started.stdout)["job"], tmp_path / "runs" / "train-tiny-1" / "events.jsonl"
    try:
        until(lambda: events.exists() and events.read_text().count('"epoch"') > 2, 90)
        shown = json.loads(run("launch", "status", "--json").stdout)["jobs"][0]
        assert shown["state"] == "running" and shown["said"]
    finally:
        cancelled = run("launch", "cancel", job)
    assert cancelled.returncode == 0, cancelled.stderr
    followed = run("launch", "logs", job, "--follow")
    assert "hpcai train --resume" in followed.stdout
    assert json.loads(run("launch", "status", job, "--json").stdout)["jobs"][0]["state"] == "stopped, resumable"
    # The script once more, as a scheduler starts it: it goes on with the run that there is.
    process = subprocess.Popen(["bash", tmp_path / "jobs" / job / "script.sh"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        until(lambda: '"resumed"' in events.read_text())
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75


def test_another_process_that_got_the_number_is_not_the_job(hpcai, tmp_path):
    folder = jobs.new_folder("train-mnist")
    jobs.keep(folder, "local", str(os.getpid()), ["hpcai"], began="1")
    assert state(hpcai, "train-mnist-1") == "gone without an exit code"
    assert hpcai("launch", "cancel", "train-mnist-1").exit_code == 0, "and this process lives on"


# ---- What is refused -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "message"), [
    (["--", "--np", "2"], "needs a command of hpcai"),
    (["--", "train", "mnist", "--np", "2"], "--np behind --"),
    (["--", "train", "mnist", "--hosts=a"], "--hosts behind --"),
    (["--time", "1h", "--", "train", "x"], "no such time"),
    (["--array", "1;id", "--", "train", "x"], "no such array"),
    (["--partition", "a b", "--", "train", "x"], "no such partition"),
    (["--option", "id", "--", "train", "x"], "no option of sbatch"),
    (["--launcher", "ssh", "--", "train", "x"], "no such launcher"),
    (["--module", "a;b", "--", "train", "x"], "no name of a module"),
    (["--option=--x\n#SBATCH --y", "--", "train", "x"], "no option of sbatch"),
    (["--tasks-per-node", "2", "--", "predict", "run", "x.png"], "runs in one process"),
    (["--", "trian", "mnist"], "Did you mean 'train'"), (["--", "benchmark", "none"], "No such command 'none'"),
    (["--", "train", "mnist", "--epohcs", "3"], "--epochs"), (["--", "train", "mnist", "--epochs", "x"], "--epochs"),
    (["--array", "1-2", "--", "train", "mnist", "--seed", "{task}.5"], "--seed"),
    (["--", "train", "mnist", "--data", "none.h5"], "the job's data do not exist")])
def test_what_no_job_can_be(hpcai, words, message):
    done = hpcai("launch", "slurm", "--dry-run", *words)
    assert done.exit_code == 2 and message in done.stderr


def test_where_there_is_no_slurm_nothing_is_left(hpcai, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = hpcai("launch", "slurm", "--", "train", "mnist")
    assert done.exit_code == 4 and "sbatch is not on PATH" in done.stderr and not list(Path("jobs").iterdir())


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_a_job_that_there_is_not(hpcai, command):
    done = hpcai("launch", command, "none")
    assert done.exit_code == 2 and "there is no such job here" in done.stderr


def test_no_jobs_are_no_error(hpcai):
    assert json.loads(hpcai("launch", "status", "--json").stdout)["jobs"] == []
    Path("jobs/broken-1").mkdir(parents=True)
    Path("jobs/broken-1/job.json").write_text("{")
    assert json.loads(hpcai("launch", "status", "--json").stdout)["jobs"] == []
