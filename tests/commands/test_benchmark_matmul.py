"""hpcai benchmark matmul as a user meets it: alone, with --np, under horovodrun, and on bad input."""

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from hpcai_cli import launchers
from hpcai_cli.engine import machine
from hpcai_cli.engine.benchmarks.measure import PROGRAM

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_alone_it_measures_both_ways_and_checks_them(hpcai, dtype):
    done = hpcai("benchmark", "matmul", "--np", "1", "--size", "96", "--dtype", dtype, "--block", "40", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    figures = {figure["name"].removeprefix(f"{dtype} 96, np 1: "): figure for figure in document["figures"]}
    for name in ("row blocks", "SUMMA"):
        assert figures[name]["unit"] == "GFLOP/s" and figures[name]["value"] > 0
        assert 0 < figures[f"{name}, scaled residual"]["value"] < 0.05
        assert len(figures[f"{name}, efficiency"]["rounds"]) >= 5
    assert all(figure["limit"] is None for figure in figures.values())
    table, = document["tables"]
    assert table["columns"] == ["rank", "GFLOP/s of its core", "rows of C", "block of C on 1 x 1 ranks"]
    assert [row[2:] for row in table["rows"]] == [[96, "96 x 96"]]


def test_one_way_alone_can_be_asked_for(hpcai):
    done = hpcai("benchmark", "matmul", "--np", "1", "--size", "64", "--algorithm", "rows", "--json")
    assert done.exit_code == 0, done.stderr
    assert not [row for row in json.loads(done.stdout)["figures"] if "SUMMA" in row["name"]]


@pytest.mark.parametrize(("words", "code", "said"), [
    (["--dtype", "int8"], 2, "float32, float64, bfloat16; received: 'int8'"),
    (["--algorithm", "strassen"], 2, "rows, summa or both"),
    (["--algorithm", "rows", "--block", "8"], 2, "row blocks have no panels"),
    (["--np", "1", "--size", "4000000"], 4, "GB that are free; give --size"),
    (["--np", "1", "--size", "0"], 2, "size")])
def test_what_cannot_be_is_said_before_anything_is_measured(hpcai, words, code, said):
    done = hpcai("benchmark", "matmul", *words)
    assert (done.exit_code, done.stdout) == (code, "") and said in done.stderr
    assert not list(Path().iterdir())


@needs_horovod
def test_more_ranks_than_rows_or_than_the_host_bears_are_refused(hpcai):
    done = hpcai("benchmark", "matmul", "--np", "2", "--size", "1")
    assert done.exit_code == 2 and "2 ranks cannot share 1 rows" in done.stderr
    done = hpcai("benchmark", "matmul", "--np", str(4 * machine.cores() + 1))
    assert done.exit_code == 2 and "more than this host can bear" in done.stderr


@needs_horovod
@pytest.mark.parametrize("launcher", ["--np", "horovodrun"])
@pytest.mark.long
def test_two_ranks_keep_one_result(launcher):
    command = [PROGRAM, "benchmark", "matmul", "--size", "128", "--output", "kept"]
    command = [*command, "--np", "2"] if launcher == "--np" else [*launchers.local(2, "horovodrun").words(), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(Path("kept/result.json").read_text())
    assert document["complete"] and [row[0] for row in document["tables"][0]["rows"]] == [0, 1]
    figures = {row["name"].removeprefix("float32 128, np 2: "): row for row in document["figures"]}
    # Promised are larger sizes.
    assert figures["SUMMA, efficiency"]["limit"] is figures["SUMMA over row blocks"]["limit"] is None
    assert all(0 < figures[f"{name}, scaled residual"]["value"] < 0.01 for name in ("row blocks", "SUMMA"))
    assert all(figures[f"{name}, communication alone"]["value"] > 0 for name in ("row blocks", "SUMMA"))
