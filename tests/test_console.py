"""Who speaks, and where: results on stdout, progress on stderr, rank 0 alone."""

import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcai_cli import console

RANK_1 = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}
RANK_0 = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}

SPEAK = """
from hpcai_cli import console
console.PLAIN_SECONDS = 0.0
console.note("a note")
with console.progress("reading", total=4, unit="images") as shown:
    for done in range(1, 5):
        shown.update(done, lambda: "loss 0.5")
        shown.line(f"line {done}")
console.table("Scores", ("metric", "value"), [("accuracy", 0.98765), ("examples", 10_000)])
console.result("a result")
console.result_json({"loss": float("nan")})
"""


def speak(environ: dict[str, str] | None = None, code: str = SPEAK, **streams) -> subprocess.CompletedProcess:
    streams = streams or {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **(environ or {})}, timeout=60, check=True,
                          text=True, **streams)


def on_terminal(environ: dict[str, str] | None = None, code: str = SPEAK) -> tuple[str, str]:
    """Return what a program prints on stdout, a pipe, and on stderr, a real terminal."""
    ours, theirs = pty.openpty()
    try:
        terminal = {"TERM": "xterm", "COLUMNS": "100"}
        done = speak({**terminal, **(environ or {})}, code, stdout=subprocess.PIPE, stderr=theirs)
        os.close(theirs)
        drawn = b""
        try:
            while chunk := os.read(ours, 65536):
                drawn += chunk
        except OSError:
            pass  # Linux says EIO where the other end is closed and all is read.
    finally:
        os.close(ours)
    return done.stdout, drawn.decode()


# ---- Where ---------------------------------------------------------------------------------------------------------

def test_stdout_carries_the_result_and_nothing_else():
    done = speak()
    assert done.stdout.startswith("Scores\n") and done.stdout.endswith('a result\n{"loss": null}\n')
    assert re.search(r"accuracy +0\.9877 *\n +examples +10,000", done.stdout)
    for words in ("note", "reading", "line"):
        assert words not in done.stdout


def test_without_a_terminal_progress_is_plain_lines():
    done = speak()
    lines = done.stderr.splitlines()
    assert lines[0] == "a note"
    assert re.fullmatch(r"reading 25 % loss 0\.5 [\d,]+ images/s", lines[1])
    assert lines[2] == "line 1" and lines[-1] == "line 4" and len(lines) == 9
    assert "\x1b" not in done.stderr and "\r" not in done.stderr


def test_plain_lines_are_seconds_apart():
    done = speak(code=SPEAK.replace("console.PLAIN_SECONDS = 0.0", ""))
    assert done.stderr.splitlines() == ["a note", "line 1", "line 2", "line 3", "line 4"]


def test_on_a_terminal_progress_is_a_bar():
    printed, drawn = on_terminal()
    assert printed.endswith('a result\n{"loss": null}\n') and "\x1b" not in printed
    assert "━" in drawn and "\x1b[" in drawn and "100%" in drawn and "loss 0.5" in drawn
    for number in range(1, 5):
        assert f"line {number}\r\n" in drawn


def test_a_bar_that_fails_leaves_the_terminal_as_it_was():
    code = ("from hpcai_cli import console\ntry:\n"
            "    with console.progress('reading', total=4, unit='images') as shown: shown.update(4); raise ValueError\n"
            "except ValueError: pass")
    drawn = on_terminal(code=code)[1]
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") == 1


def test_rank_0_draws_on_the_terminal_that_a_launcher_hides():
    ours, theirs = pty.openpty()
    try:
        done = speak({"HPCAI_TERMINAL": os.ttyname(theirs), "TERM": "xterm", **RANK_0})
        assert "━" in os.read(ours, 65536).decode()
        assert done.stderr == "a note\n"
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_reader_who_has_gone_changes_no_exit_code():
    code = ("from hpcai_cli import console\n"
            "console.table('Scores', ('metric',), [('accuracy',)])\n"
            "raise SystemExit(5 if console.result('more') else 6)")
    theirs, ours = os.pipe()
    os.close(theirs)
    with os.fdopen(ours, "w") as stdout:
        done = subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, timeout=60,
                              check=False)
    assert (done.returncode, done.stderr) == (5, b"")


# ---- Who -----------------------------------------------------------------------------------------------------------

def test_another_rank_than_0_is_silent():
    done = speak(RANK_1)
    assert (done.stdout, done.stderr) == ("", "")
    assert on_terminal(RANK_1) == ("", "")
    assert speak(RANK_0).stdout == speak().stdout


@pytest.mark.parametrize(("environ", "collective", "line"), [
    ({}, False, "error: it broke\n"), (RANK_0, False, "[rank 0] error: it broke\n"),
    (RANK_1, False, "[rank 1] error: it broke\n"), (RANK_0, True, "error: it broke\n"), (RANK_1, True, "")])
def test_a_failure_is_told_by_its_own_rank_and_one_of_all_by_rank_0(environ, collective, line, monkeypatch, capsys):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    console.fail("it broke", collective=collective)
    assert capsys.readouterr() == ("", line)


# ---- What ----------------------------------------------------------------------------------------------------------

def test_json_says_what_json_can(capsys):
    console.result_json({"nan": math.nan, "nested": [{"inf": math.inf}, (-math.inf, 1)], "numpy": np.float32(0.5),
                         "array": np.array([1.0, np.nan]), "count": np.int64(3), "path": Path("a/b"), 4: None,
                         "text": "line\nbreak"})
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert json.loads(printed) == {"nan": None, "nested": [{"inf": None}, [None, 1]], "numpy": 0.5,
                                   "array": [1.0, None], "count": 3, "path": "a/b", "4": None, "text": "line\nbreak"}


@pytest.mark.parametrize(("value", "text"), [
    (1234567, "1,234,567"), (0.98765, "0.9877"), (0.0, "0.0000"), (0.0000123, "1.23e-05"), (12345.678, "12,345.7"),
    (True, "true"), (None, ""), ("[bold]x[/]", "[bold]x[/]"), (math.nan, "nan")])
def test_cells_of_a_table(value, text):
    assert console.format_value(value) == text


def test_a_table_shows_words_in_brackets_as_they_are(capsys):
    console.table("[red]runs[/]", ("file", "value"), [("[x].png", 1)])
    printed = capsys.readouterr().out
    assert "[red]runs[/]" in printed and "[x].png" in printed


def test_native_noise_is_kept_away_unless_it_explains_a_failure(capfd, monkeypatch):
    with console.quiet():
        os.write(2, b"noise\n")
    assert capfd.readouterr().err == ""
    with pytest.raises(ImportError), console.quiet():
        os.write(2, b"libcudnn is missing\n")
        raise ImportError
    assert capfd.readouterr().err == "libcudnn is missing\n"
    monkeypatch.setenv("HPCAI_VERBOSE", "1")
    with console.quiet():
        os.write(2, b"noise\n")
    assert capfd.readouterr().err == "noise\n"


def test_a_rank_s_terminal_is_its_launcher_s_and_gets_no_signs():
    """Open MPI gives rank 0 a terminal as stdout, and passes on what it reads from it."""
    code = 'from hpcai_cli import console; console.table("Scores", ("metric",), [("accuracy",)])'
    printed = []
    for environ in ({}, {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}):
        ours, theirs = pty.openpty()
        try:
            speak({"TERM": "xterm", **environ}, code, stdout=theirs, stderr=subprocess.PIPE)
            printed.append(os.read(ours, 65_536).decode())
        finally:
            os.close(ours)
            os.close(theirs)
    assert "accuracy" in printed[0] and "\x1b[1m" in printed[0]
    assert "accuracy" in printed[1] and "\x1b" not in printed[1]
