"""What all tests share: a folder and an environment of their own, the command line, the real data."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpcai_cli import launch
from hpcai_cli.main import app

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name long contents by their size: the processes of a parallel run must call the same test by the same name."""
    return f"{len(val)}bytes" if isinstance(val, bytes) and len(val) > 40 else None


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path_factory, monkeypatch):
    """Give each test an empty working folder and cache, and no launcher's or user's variables; put back what it set."""
    before = dict(os.environ)
    launchers = [name for _, *names in launch._VARIABLES for name in names]
    for name in (*launchers, launch.VERBOSE_VARIABLE, launch.TERMINAL_VARIABLE, "HPCAI_DEBUG", "COLUMNS"):
        os.environ.pop(name, None)
    os.environ["HPCAI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def hpcai():
    """Return a function that runs a command line in this process: .exit_code, .stdout, .stderr."""
    def run(*arguments: object, stdin: str | None = None):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    return run


@pytest.fixture
def shared_data() -> Path:
    """Return the folder of the real data, or skip the test where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data in {SHARED_DATA}")
    return SHARED_DATA
