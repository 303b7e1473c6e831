"""What the ranks say under a launcher becomes what one program says; real processes print what launchers print."""

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hpcai_cli import launch, rank_processes
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


def read(stdout: str = "", stderr: str = "", code: int = 0) -> Outcome:
    """Let the reader read a process that writes these texts, byte for byte, and ends with the code."""
    Path("stdout").write_text(stdout)
    Path("stderr").write_text(stderr)
    with subprocess.Popen(["sh", "-c", f"cat stdout; cat stderr >&2; exit {code}"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, errors="replace") as process:
        return rank_processes._Reader(process).outcome()


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
    assert outcome == Outcome(0, None, reported=True, launcher_words="")


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
    assert outcome == Outcome(told, 3, reported=False, launcher_words=f"status {code}")


def test_mpirun_tells_the_rank_that_was_killed():
    assert read("", MPI_SIGNAL.format(rank=1, number=9), code=137) == Outcome(1, 1, launcher_words="status -9")


def test_horovodrun_tells_the_ranks_that_failed_and_the_first_counts(capsys):
    words = ("[0]<stderr>:error: the loss is nan\n"
             "Process 1 exit with status code 6.\nTerminating remaining workers after failure of Process 1.\n"
             "Process 0 exit with status code -15.\n")
    assert read("", words, code=1) == Outcome(6, 1, reported=True, launcher_words="status 6")
    assert capsys.readouterr().err == "error: the loss is nan\n"


def test_a_rank_that_says_what_the_launcher_would_is_not_believed():
    assert read("", "[1]<stderr>:Process 7 exit with status code 2\n") == Outcome(0)


# ---- Launchers -----------------------------------------------------------------------------------------------------

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")


def test_without_mpirun_it_is_horovodrun(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = list(map(str, rank_processes.launcher_words(3)))
    assert words[0].endswith("/horovodrun")
    assert words[1:3] == ["-np", "3"]


@pytest.mark.parametrize(("library", "launcher"), [
    (b"\x7fELF libmpi.so.40\0", "mpirun"), (b"\x7fELF libmpi.so.12\0", "horovodrun"), (b"\x7fELF", "horovodrun"),
    (b"", "horovodrun")])
def test_mpirun_is_for_a_horovod_of_open_mpi(monkeypatch, tmp_path, library, launcher):
    folder = tmp_path / "horovod" / "tensorflow"
    folder.mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").touch()
    (folder / "mpi_lib.cpython-311-x86_64-linux-gnu.so").write_bytes(library)
    program = tmp_path / "mpirun"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    script = "from hpcai_cli.rank_processes import launcher_words; print(launcher_words(2)[0])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env={
        **os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)})
    assert done.stderr == ""
    assert done.stdout.strip().endswith(launcher)


@needs_horovod
def test_the_real_launcher_is_read(capfd):
    """Two real ranks that fail in their own way: no data, exit code 3."""
    outcome = rank_processes.run_ranks(2, ["train", "mnist", "--data", "none.h5", "--output", "run"])
    assert outcome.exit_code == 3
    assert outcome.reported
    assert capfd.readouterr().err.count("error:") == 1


@needs_horovod
def test_the_handlers_of_signals_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert rank_processes.run_ranks(1, ["--version"]).exit_code == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
