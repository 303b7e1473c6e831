"""How a command line ends: exit codes, one sentence on stderr, no traceback unasked."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import hpcai_cli
from hpcai_cli.errors import HpcaiError

HPCAI = str(Path(sys.executable).parent / "hpcai")
FAILING = '''"""A recipe whose reading fails."""

from hpcai_cli import errors
from hpcai_cli.recipe import Recipe

recipe = Recipe(name="failing", summary="fails", input_shape=(4,), num_classes=2)


def load(source, recipe):
    raise {error}


def build_model(recipe):
    return None
'''
CODES = {"HpcaiError": 1, "UsageError": 2, "DataError": 3, "MissingError": 4, "GateError": 5, "DivergedError": 6,
         "StoppedEarly": 75}


@pytest.fixture
def failing(hpcai):
    """Return a function that runs a command which fails with the given error from within the work."""
    def run(error: str):
        Path("source").mkdir()
        Path("failing.py").write_text(FAILING.format(error=error))
        return hpcai("preprocess", "./failing.py", "--source", "source", "--output", "out.h5")
    return run


# ---- Wrong usage ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("line", "words"), [
    ("frobnicate", "No such command 'frobnicate'"), ("trian mnist", "Did you mean 'train'?"),
    ("train --bogus", "No such option: --bogus"), ("train mnist --epochs", "requires an argument"),
    ("train mnist --epochs many", "Invalid value for '--epochs'"), ("train mnist mnist", "unexpected extra argument"),
    ("recipes frobnicate", "No such command"), ("evaluate", "Missing argument"), ("--bogus", "No such option"),
    ("train", "train needs a recipe"), ("train mnits", "did you mean `mnist`"),
    ("train mnist --set epochs", "expected key=value"), ("train mnist --set epoch=3", "perhaps 'epochs'"),
    ("train mnist --epochs 0", "epochs is out of range"), ("train mnist --precision half", "precision is unknown"),
    ("evaluate runs --require accuracy", "cannot read --require"), ("predict runs", "predict needs files"),
    ("preprocess", "preprocess needs a recipe"),
    ("train mnist --checkpoint-every often", "takes steps, seconds or epochs")])
def test_wrong_usage_ends_with_2(hpcai, line, words):
    done = hpcai(*line.split())
    assert done.exit_code == 2
    assert done.stdout == ""
    assert words in " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split())
    assert not list(Path(".").iterdir())


@pytest.mark.parametrize(("line", "code"), [
    ("evaluate nowhere", 3), ("predict nowhere a.png", 3), ("train --resume nowhere", 3),
    ("train mnist --from nowhere.json", 3), ("preprocess --verify nowhere.h5", 3)])
def test_a_file_that_is_not_there_ends_with_3_in_one_line(hpcai, line, code):
    done = hpcai(*line.split())
    assert done.exit_code == code
    assert done.stdout == ""
    assert re.fullmatch(r"error: .*; received: 'nowhere.*'\n", done.stderr)


def test_nothing_at_all_shows_the_help(hpcai):
    done = hpcai()
    assert done.exit_code == 2
    assert "preprocess" in done.output and "Usage" in done.output


def test_the_version(hpcai):
    done = hpcai("--version")
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"hpcai {hpcai_cli.__version__}\n", "")


# ---- Failures from within ------------------------------------------------------------------------------------------

def test_every_kind_of_error_has_a_code_here():
    assert {kind.__name__ for kind in (HpcaiError, *HpcaiError.__subclasses__())} == set(CODES)


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_every_kind_of_error_ends_with_its_code(failing, kind, code):
    done = failing(f"errors.{kind}('the wool is wet', expected='dry wool', mend='hang it up', received='wet')")
    assert done.exit_code == code
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.endswith("the wool is wet; expected dry wool; hang it up; received: 'wet'")
    assert last.startswith("error: ") == (kind != "StoppedEarly")
    assert "Traceback" not in done.stderr
    assert not Path("out.h5").exists()


def test_an_unexpected_failure_is_one_sentence(failing):
    done = failing("ValueError('the first line\\nthe second line')")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == ("error: unexpected failure: ValueError: the first line; set HPCAI_DEBUG=1 "
                                            "and run it again for the details")
    assert "Traceback" not in done.stderr


def test_an_unexpected_failure_without_words(failing):
    assert "unexpected failure: KeyError: no message; set" in failing("KeyError").stderr


@pytest.mark.parametrize("error", ["ValueError('wet')", "errors.DataError('wet')"])
def test_a_traceback_is_shown_when_asked_for(failing, monkeypatch, error):
    monkeypatch.setenv("HPCAI_DEBUG", "1")
    done = failing(error)
    assert "Traceback (most recent call last)" in done.stderr
    assert f"raise {error}" in done.stderr
    assert done.exit_code == (1 if error.startswith("Value") else 3)


# ---- Signals and pipes ---------------------------------------------------------------------------------------------

def test_ctrl_c_ends_with_130():
    with socket.create_server(("127.0.0.1", 0)) as server:
        # A server that never answers keeps the command at work until it is interrupted.
        server.settimeout(60)
        source = f"http://127.0.0.1:{server.getsockname()[1]}/wool.zip"
        job = subprocess.Popen([HPCAI, "preprocess", "mnist", "--source", source, "--output", "out.h5"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        connection, _ = server.accept()
        with connection:
            job.send_signal(signal.SIGINT)
            printed, told = job.communicate(timeout=60)
    assert job.returncode == 130
    assert printed == ""
    assert told.splitlines()[-1] == "interrupted"
    assert "Traceback" not in told
    assert not Path("out.h5").exists()


@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_a_closed_pipe_is_no_failure(reader):
    done = subprocess.run(["bash", "-c", f"set -o pipefail; '{HPCAI}' recipes show mnist | {reader}"],
                          capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("Handwritten digits with a convolutional network.\n" if reader == "head -1" else "")


def test_stdout_on_a_full_disk_is_a_failure():
    with open("/dev/full", "w") as full:
        done = subprocess.run([HPCAI, "recipes", "list"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
                              check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_user_decides_what_tensorflow_logs(hpcai):
    hpcai("--version")
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"
    hpcai("--version")
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "1"
