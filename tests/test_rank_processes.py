"""What the ranks say under a launcher becomes what one program says; real processes print what launchers print."""

import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from hpcai_cli import launch, launchers, rank_processes
from hpcai_cli.rank_processes import Outcome

MPI_FAILURE = """\
--------------------------------------------------------------------------
Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
--------------------------------------------------------------------------
--------------------------------------------------------------------------
mpirun detected that one or more processes exited with non-zero status, thus causing
the job to be terminated. The first process to do so was:

  Process name: [[21953,1],{rank}]
  Exit code:    {code}
--------------------------------------------------------------------------
"""
MPI_SIGNAL = "mpirun noticed that process rank {rank} with PID 0 on node here exited on signal {number} (Killed).\n"


def read(stdout: str = "", stderr: str = "", code: int = 0, launcher: str = "mpirun", **how: bool) -> Outcome:
    """Let the reader read a process that writes these texts, byte for byte, and ends with the code."""
    Path("stdout").write_text(stdout)
    Path("stderr").write_text(stderr)
    with subprocess.Popen(["sh", "-c", f"cat stdout; cat stderr >&2; exit {code}"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, errors="replace") as process:
        return rank_processes._Reader(process, launcher, **how).outcome()


# ---- Lines ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tag", ["[{rank}]<{kind}>:", "[1,{rank}]<{kind}>:"], ids=["horovodrun", "mpirun"])
def test_rank_zero_is_heard_and_the_others_only_where_they_fail(capsys, tag):
    def line(rank, kind, text):
        return tag.format(rank=rank, kind=kind) + text + "\n"

    outcome = read(line(0, "stdout", '{"metrics": 1}') + line(1, "stdout", "no") + line(0, "stdout", ""),
                   line(0, "stderr", "epoch 1/3") + line(1, "stderr", "noise") + line(11, "stderr", "noise")
                   + line(1, "stderr", "[rank 1] error: it broke"))
    shown = capsys.readouterr()
    assert shown.out == '{"metrics": 1}\n\n'
    assert shown.err == "epoch 1/3\n[rank 1] error: it broke\n"
    assert outcome == Outcome(0, None, reported=True, launcher_words="", answered=True)


def test_a_line_that_comes_in_pieces_is_put_together(capsys):
    """Open MPI tags each piece that it reads, also within a line, and between two pieces comes whoever else speaks."""
    read("[1,0]<stdout>:{\"a\": [1, [1,1]<stdout>:ignored\n[1,0]<stdout>:2]}\n[1,0]<stdout>:last")
    assert capsys.readouterr().out == '{"a": [1, 2]}\nlast'


def test_two_pieces_in_a_row(capsys):
    read("[1,0]<stdout>:one [1,0]<stdout>:and two\n[1,0]<stdout>:three\n")
    assert capsys.readouterr().out == "one and two\nthree\n"


def test_a_long_document_arrives_whole(capsys):
    text = "x" * 300_000
    pieces = [text[start:start + 4096] for start in range(0, len(text), 4096)]
    read("".join(f"[1,0]<stdout>:{piece}" for piece in pieces) + "\n")
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("text", ["[1, 2, 3]", "[1] and <stdout>", '{"list": [0], "words": "<stderr>:"}', "ä 猫"])
def test_what_only_looks_like_a_tag_is_text(capsys, text):
    read(f"[1,0]<stdout>:{text}\n")
    assert capsys.readouterr().out == f"{text}\n"


def test_the_launcher_s_own_words_are_kept_and_not_shown(capsys):
    outcome = read("", "There are not enough slots available\n\nin the system\n", code=1)
    assert outcome == Outcome(1, None, reported=False, launcher_words="in the system")
    assert capsys.readouterr() == ("", "")


def test_with_verbose_all_is_shown(capsys, monkeypatch):
    monkeypatch.setenv(launch.VERBOSE_VARIABLE, "1")
    read("", "the launcher speaks\n[1]<stderr>:and rank 1\n")
    assert capsys.readouterr().err == "the launcher speaks\nand rank 1\n"


# ---- Ends ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("code", "told"), [(2, 2), (3, 3), (6, 6), (75, 75), (9, 1), (137, 1)])
def test_mpirun_tells_the_rank_that_failed_first(code, told):
    outcome = read("", MPI_FAILURE.format(rank=3, code=code), code=code)
    assert outcome == Outcome(told, 3, reported=False, launcher_words=f"status {code}",
                              signal="SIGKILL" if code == 137 else "")


def test_mpirun_tells_the_rank_that_was_killed():
    outcome = read("", MPI_SIGNAL.format(rank=1, number=9), code=137)
    assert outcome == Outcome(1, 1, launcher_words="status -9", signal="SIGKILL")
    assert outcome.happened == "rank 1 was ended by SIGKILL"


def test_horovodrun_tells_the_ranks_that_failed_and_the_first_counts(capsys):
    words = ("[0]<stderr>:error: the loss is nan\n"
             "Process 1 exit with status code 6.\nTerminating remaining workers after failure of Process 1.\n"
             "Process 0 exit with status code -15.\n")
    assert read("", words, code=1) == Outcome(6, 1, reported=True, launcher_words="status 6")
    assert capsys.readouterr().err == "error: the loss is nan\n"


def test_a_rank_that_says_what_the_launcher_would_is_not_believed():
    assert read("", "[1]<stderr>:Process 7 exit with status code 2\n") == Outcome(0)


# ---- srun ----------------------------------------------------------------------------------------------------------

def test_lines_of_srun_are_told_apart(capsys):
    outcome = read('0: {"metrics": 1}\n1: no\n', " 0: epoch 1/3\n 1: noise\n 1: [rank 1] error: it broke\n"
                   "srun: error: node1: task 1: Exited with exit code 3\n", code=3, launcher="srun")
    shown = capsys.readouterr()
    assert shown.out == '{"metrics": 1}\n' and shown.err == "epoch 1/3\n[rank 1] error: it broke\n"
    assert outcome == Outcome(3, 1, reported=True, launcher_words="status 3", answered=True)


@pytest.mark.parametrize(("words", "outcome"), [
    ("srun: error: node1: tasks 0-3: Exited with exit code 75\n", Outcome(75, 0, launcher_words="status 75")),
    ("srun: error: node1: task 2: Killed\n", Outcome(1, 2, launcher_words="status -9", signal="SIGKILL")),
    ("srun: error: node1: task 2: Segmentation fault (core dumped)\n",
     Outcome(1, 2, launcher_words="status -11", signal="SIGSEGV")),
    ("srun: error: Unable to create step for job 7: More processors requested than permitted\n", Outcome(
        9, None, launcher_words="srun: error: Unable to create step for job 7: More processors requested than "
                                "permitted"))])
def test_srun_tells_the_task_that_failed_first(words, outcome):
    assert read("", words, code=9, launcher="srun") == outcome


def test_a_rank_that_crashed_is_the_cause_also_where_another_was_seen_to_end_before():
    words = "Process 0 exit with status code 1.\nProcess 1 exit with status code 137.\n"
    assert read("", words, code=1) == Outcome(1, 1, launcher_words="status 137", signal="SIGKILL")


# ---- Elastic jobs --------------------------------------------------------------------------------------------------

def test_an_elastic_job_ends_as_horovodrun_does():
    outcome = read("", "Process 1 exit with status code 137.\n", code=0, is_elastic=True)
    assert (outcome.exit_code, outcome.rank, outcome.signal) == (0, None, "")


@pytest.mark.parametrize("words", [
    "Process 1 exit with status code 137.\nProcess 1 exit with status code 2.\nProcess 0 exit with status code 1.\n",
    "Process 1 exit with status code 2.\nProcess 0 exit with status code 1.\nProcess 0 exit with status code 137.\n"])
def test_a_rank_of_an_elastic_job_that_was_lost_is_no_cause_where_another_fails(words):
    assert read("", words, code=1, is_elastic=True) == Outcome(2, 1, launcher_words="status 2")


def test_an_elastic_job_that_lost_a_rank_over_ssh_and_was_stopped_later_is_stopped():
    words = "Process 1 exit with status code 255.\nProcess 0 exit with status code 75.\n"
    assert read("", words, code=1, is_elastic=True) == Outcome(75, 0, launcher_words="status 75")


def test_an_elastic_job_that_loses_all_ranks_was_ended_by_what_ended_the_first():
    words = "Process 1 exit with status code 137.\nProcess 0 exit with status code 139.\n"
    assert read("", words, code=1, is_elastic=True) == Outcome(1, 1, launcher_words="status 137", signal="SIGKILL")


def test_an_elastic_job_that_horovodrun_gives_up():
    words = ("Process 1 exit with status code 137.\n"
             "horovod.runner.common.util.timeout.TimeoutException: Timed out waiting for {activity}.\n"
             "Process 0 exit with status code 137.\n")
    outcome = read("", words, code=1, is_elastic=True)
    assert (outcome.exit_code, outcome.rank) == (1, None)
    assert outcome.happened == "fewer than --min-np processes could be had in time"


def test_a_rank_that_becomes_rank_zero_is_heard_from_then_on(capsys):
    """Its lines go on to be tagged by the number that it had when it was started."""
    one, zero = "[1]<stderr>:", "[0]<stderr>:"
    read("[0]<stdout>:first\n", f"{one}noise\n{zero}{launch.ANNOUNCEMENT} 0 4711 a 2\n"
         f"{one}{launch.ANNOUNCEMENT} 1 4712 a 2\n{one}noise\n{one}{launch.ANNOUNCEMENT} 0 4712 a 1\n{one}heard\n",
         is_elastic=True)
    assert capsys.readouterr() == ("first\n", "heard\n")


def test_a_rank_that_is_lost_is_forgotten():
    lines = [f"{tag}{launch.ANNOUNCEMENT} {words}\\n" for tag, words in (
        ("[0]<stderr>:", "0 4711 a 2"), ("[1]<stderr>:", "1 4712 a 2"), ("[1]<stderr>:", "0 4712 a 1"))]
    with subprocess.Popen(["printf", "".join(lines)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        reader = rank_processes._Reader(process, "horovodrun", is_elastic=True)
        reader._pump_tags(process.stdout, "stderr")
    assert reader.processes == {0: (4712, "a")}


# ---- Where the ranks are -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("tag", "launcher"), [("[1]<stderr>:", "horovodrun"), ("[1,1]<stderr>:", "mpirun"),
                                               ("1: ", "srun")])
def test_ranks_say_where_they_are_and_nobody_sees_it(capsys, tag, launcher):
    words = "".join(f"{tag}{launch.ANNOUNCEMENT} {said}\n" for said in ("1 4711 b 2", "0 4712 b 2", "x"))
    Path("words").write_text(words)
    with subprocess.Popen(["sh", "-c", "cat words >&2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        reader = rank_processes._Reader(process, launcher)
        reader.outcome()
    assert reader.processes == {1: (4711, "b")}, "a rank speaks for itself alone"
    assert capsys.readouterr() == ("", "")


# ---- Real ranks ----------------------------------------------------------------------------------------------------

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")


@needs_horovod
def test_the_real_launcher_is_read(capfd):
    """Two real ranks that fail in their own way: no data, exit code 3."""
    outcome = rank_processes.run_ranks(launchers.local(2), ["train", "mnist", "--data", "none.h5", "--output", "run"])
    assert outcome.exit_code == 3
    assert outcome.reported
    assert capfd.readouterr().err.count("error:") == 1


@needs_horovod
def test_the_handlers_of_signals_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert rank_processes.run_ranks(launchers.local(1), ["--version"]).exit_code == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
