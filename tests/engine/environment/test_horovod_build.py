"""Building Horovod: what is said before, what a cached wheel saves, what a failure and Ctrl-C leave behind.

The real build is `make horovod`, which runs before the suite; the tests of its wheel are skipped where it did not.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

import hpcai_cli
from hpcai_cli.cache import cache_folder
from hpcai_cli.engine.environment import horovod_build, horovod_wheel
from hpcai_cli.engine.environment.long_process import first_error
from hpcai_cli.engine.environment.toolchain import toolchain
from hpcai_cli.errors import MissingError

BUILD = ("from hpcai_cli.engine.environment.horovod_build import build; "
         "print(build(with_mpi=None, with_nccl=False).action)")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("HPCAI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache/horovod").mkdir(parents=True)
    return tmp_path / "cache"


def kind_folder() -> Path:
    """The cache's folder for what would be built here."""
    tools = toolchain(with_mpi=None, with_nccl=False)
    return cache_folder() / "horovod" / horovod_build._key(tools)


def built_folder() -> Path:
    """The folder of the wheel that `make horovod` built, before a test chooses another cache."""
    try:
        folder = kind_folder()
    except MissingError as error:
        pytest.skip(str(error))
    if not (folder / "wheel.json").exists():
        pytest.skip("no Horovod was built for this TensorFlow: hpcai doctor --build-horovod")
    return folder


def python(*, environ: dict[str, str], interpreter: str = sys.executable) -> subprocess.Popen:
    # The program's own folder, so that an interpreter without it (another environment's) finds it too.
    modules = os.pathsep.join([environ.get("PYTHONPATH", ""), str(Path(hpcai_cli.__file__).parents[1])])
    return subprocess.Popen([interpreter, "-c", BUILD], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, **environ, "PYTHONPATH": modules.strip(os.pathsep)})


def fake_pip(folder: Path, code: str) -> dict[str, str]:
    (folder / "fake/pip").mkdir(parents=True)
    (folder / "fake/pip/__init__.py").write_text("")
    (folder / "fake/pip/__main__.py").write_text(code)
    return {"PYTHONPATH": str(folder / "fake")}


def test_all_that_is_missing_is_named_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingError) as raised:
        toolchain(with_mpi=True, with_nccl=False)
    assert raised.value.exit_code == 4
    for line in ("apt-get install g++", "apt-get install make", "apt-get install openmpi-bin libopenmpi-dev"):
        assert line in str(raised.value)


def test_mpi_is_built_in_where_it_is_found_and_left_out_on_demand(monkeypatch, tmp_path):
    for name in ("c++", "make", "mpicxx", "mpirun"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'mpirun (Open MPI) 9.8.7'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert toolchain(with_mpi=None, with_nccl=False).mpi == "openmpi9.8.7"
    assert toolchain(with_mpi=False, with_nccl=False).mpi == ""
    (tmp_path / "mpicxx").unlink()
    without = toolchain(with_mpi=None, with_nccl=False)
    assert without.mpi == ""
    assert "openmpi-bin" in without.why_mpi


def test_nccl_is_found_under_the_name_that_pip_gives_its_library(monkeypatch, tmp_path):
    for path, text in (("cuda/bin/nvcc", ""), ("nccl/lib/libnccl.so.2", ""), ("nccl/include/nccl.h",
                       "#define NCCL_MAJOR 2\n#define NCCL_MINOR 29\n#define NCCL_PATCH 3\n")):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setenv("HOROVOD_CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("HOROVOD_NCCL_HOME", str(tmp_path / "nccl"))
    monkeypatch.setenv("HOROVOD_GPU_ALLREDUCE", "MPI")
    tools = toolchain(with_mpi=None, with_nccl=True)
    assert tools.nccl.version == "2.29.3"
    environ = horovod_wheel.build_environment(tools, tmp_path / "workshop")
    assert environ["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert environ["HOROVOD_CUDA_HOME"] == str(tmp_path / "cuda")
    assert Path(environ["HOROVOD_NCCL_HOME"], "lib/libnccl.so").resolve() == tmp_path / "nccl/lib/libnccl.so.2"
    # What the user's shell asks for must not end up in a wheel that is named otherwise.
    assert "HOROVOD_GPU_ALLREDUCE" not in environ


def test_a_foreign_source_archive_is_refused(cache):
    (cache / "horovod" / horovod_wheel.SDIST).write_text("not Horovod")
    with pytest.raises(MissingError) as raised:
        horovod_build.build(with_mpi=None, with_nccl=False)
    text = str(raised.value)
    assert horovod_wheel.SDIST_SHA256 in text
    assert "rm " in text
    assert text.endswith(f"received: {hashlib.sha256(b'not Horovod').hexdigest()!r}")


def test_a_folder_name_that_the_build_takes_for_a_pattern_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HPCAI_CACHE", str(tmp_path / "c++"))
    with pytest.raises(MissingError, match="set HPCAI_CACHE to another folder; received: .*c[+][+]"):
        horovod_build.build(with_mpi=None, with_nccl=False)


@pytest.mark.parametrize("lines", ["set(A 1)\n", "a/xla_mpi_ops.cc\nb/xla_mpi_ops.cc\n"])
def test_a_source_that_is_not_as_expected_is_not_patched(tmp_path, lines):
    build_file = tmp_path / "horovod/tensorflow/CMakeLists.txt"
    build_file.parent.mkdir(parents=True)
    build_file.write_text(lines)
    with pytest.raises(MissingError, match=r"cannot be patched; expected one line with `xla_mpi_ops\.cc`"):
        horovod_wheel.patch(tmp_path, horovod_wheel._PATCHES)
    assert build_file.read_text() == lines


def test_without_a_network_the_sentence_says_what_to_do(cache, tmp_path):
    environ = fake_pip(tmp_path, "import sys; sys.exit('ERROR: Could not find a version that satisfies cmake')")
    process = python(environ=environ)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    sentence = errors.strip().splitlines()[-1]
    assert "where there is no network" in sentence
    assert "ERROR: Could not find a version that satisfies cmake" in sentence
    assert Path(sentence.rsplit("; ", 1)[1]).name == "build.log"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_no_process_and_no_half_wheel(cache, tmp_path, number):
    environ = fake_pip(tmp_path, "import os, subprocess, time; child = subprocess.Popen(['sleep', '300']); "
                                 f"open({str(tmp_path / 'started')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); "
                                 "time.sleep(300)")
    process = python(environ=environ)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started = [int(text) for text in (tmp_path / "started").read_text().split()]
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    for pid in started:
        assert not _is_running(pid)
    (folder,) = [path for path in (cache / "horovod").iterdir() if path.is_dir()]
    assert sorted(path.name for path in folder.iterdir()) == ["build.log", "lock"]


@pytest.mark.long
def test_a_compiler_that_fails_is_quoted_and_a_damaged_wheel_not_trusted(monkeypatch, tmp_path):
    source = cache_folder() / "horovod" / horovod_wheel.SDIST
    monkeypatch.setenv("HPCAI_CACHE", str(tmp_path / "cache"))
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'main.cc:1:1: error: nothing compiles here'\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    folder = kind_folder()
    folder.mkdir(parents=True)
    if source.exists():
        shutil.copy(source, folder.parent)
    (folder / "horovod.whl").write_text("damaged")
    (folder / "wheel.json").write_text(json.dumps({"wheel": "horovod.whl", "sha256": "0" * 64}))
    with pytest.raises(MissingError) as raised:
        horovod_build.build(with_mpi=None, with_nccl=False)
    if "could not be fetched" in str(raised.value):
        pytest.skip("no package index is reached from here")
    assert "Horovod did not compile" in str(raised.value)
    assert "the log says: CMake Error" in str(raised.value)
    assert str(raised.value).endswith(f"; {folder / 'build.log'}")
    assert "main.cc:1:1: error: nothing compiles here" in (folder / "build.log").read_text()
    assert not list(folder.glob("building-*"))


def test_the_second_build_says_that_it_is_installed(capfd):
    folder = built_folder()
    if horovod_build._installed_checksum() != json.loads((folder / "wheel.json").read_text())["sha256"]:
        pytest.skip("another Horovod is installed here")
    result = horovod_build.build(with_mpi=None, with_nccl=False)
    assert result.action == "installed already"
    assert result.seconds < 60
    assert "installed already" in capfd.readouterr().err


def test_another_environment_gets_the_wheel_from_the_cache(monkeypatch, tmp_path):
    """A copy of this environment without Horovod, so that this one stays as it is."""
    folder = built_folder()
    monkeypatch.setenv("HPCAI_CACHE", str(tmp_path / "cache"))
    shutil.copytree(folder, kind_folder())
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith("horovod"):
            (packages / path.name).symlink_to(path)
    for action in ("installed from the cache", "installed already"):
        process = python(environ={}, interpreter=str(tmp_path / "venv/bin/python"))
        output, errors = process.communicate(timeout=120)
        assert output.strip() == action, errors
        assert (packages / "horovod/tensorflow").is_dir()


@pytest.mark.parametrize(("log", "line"), [
    ("g++ -Werror errors.cc\nops.cc:3:1: error: no member\nmake: *** [all] Error 2\n", "ops.cc:3:1: error: no member"),
    ("CMake Error at CMakeLists.txt:5 (message):\n\n  NCCL was not found\n",
     "CMake Error at CMakeLists.txt:5 (message): NCCL was not found"),
    ("all went well\nuntil here\n", "until here"),
    ("", "(the log is empty)")])
def test_the_log_line_that_tells_what_failed(tmp_path, log, line):
    (tmp_path / "build.log").write_text(log)
    assert first_error(tmp_path / "build.log") == line


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
