"""The distributed matrix product: how it is cut, the check that finds wrong ones, and real ranks against numpy."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hpcai_cli import launchers
from hpcai_cli.engine import distributed
from hpcai_cli.engine.benchmarks.matrix import matmul, matrix_operands, matrix_split
from hpcai_cli.engine.benchmarks.matrix.matmul_request import Request, check_memory
from hpcai_cli.engine.benchmarks.matrix.matrix_products import RowBlocks, Summa
from hpcai_cli.errors import DivergedError, MissingError

DTYPES = ("float32", "float64", "bfloat16")


# ---- How it is cut -------------------------------------------------------------------------------------------------

def test_the_grid_is_the_one_nearest_to_a_square():
    found = {ranks: matrix_split.grid_of(ranks) for ranks in (1, 2, 4, 6, 7, 12, 16)}
    assert found == {1: (1, 1), 2: (1, 2), 4: (2, 2), 6: (2, 3), 7: (1, 7), 12: (3, 4), 16: (4, 4)}


def test_only_lines_of_several_ranks_that_are_not_all_need_a_group():
    assert matrix_split.process_groups(1) == matrix_split.process_groups(2) == matrix_split.process_groups(7) == []
    assert matrix_split.process_groups(6) == [[0, 1, 2], [3, 4, 5], [0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(("length", "weights", "bounds"), [
    (10, [1, 1], (0, 5, 10)), (7, [1, 1, 1], (0, 2, 5, 7)), (8, [1, 3], (0, 2, 8)), (3, [100, 1, 1], (0, 1, 2, 3)),
    (5, [1, 1000], (0, 1, 5)), (5, [1000, 1], (0, 4, 5)), (1, [0.3], (0, 1))])
def test_parts_are_as_their_weights_and_none_is_empty(length, weights, bounds):
    assert matrix_split.cut(length, weights) == bounds


def test_parts_are_never_more_than_a_row_from_their_share():
    source = np.random.default_rng(0)
    for _ in range(200):
        weights = source.uniform(0.2, 5, source.integers(1, 9)).tolist()
        lengths = np.diff(matrix_split.cut(1000, weights))
        assert lengths.sum() == 1000 and np.abs(lengths - 1000 * np.array(weights) / sum(weights)).max() <= 1


def test_a_faster_rank_gets_more_and_like_ranks_get_the_same():
    assert matrix_split.speeds_for_split([100.0, 104.0]) == [1, 1]
    assert matrix_split.speeds_for_split([100.0, 50.0]) == [100, 50]
    heights, widths = matrix_split.grid_weights([1, 3], (1, 2))
    assert (heights, widths) == ([1], [pytest.approx(0.25), pytest.approx(0.75)])


def test_ranks_of_a_grid_take_the_same_time_where_that_can_be():
    heights, widths = matrix_split.grid_weights(np.outer([1, 2], [1, 2, 5]).ravel().tolist(), (2, 3))
    assert heights == pytest.approx([1 / 3, 2 / 3]) and widths == pytest.approx([1 / 8, 2 / 8, 5 / 8])


def test_no_rank_of_a_grid_takes_longer_than_with_even_parts():
    source = np.random.default_rng(1)
    for _ in range(50):
        grid = tuple(source.integers(1, 4, 2).tolist())
        speeds = source.uniform(0.1, 1, grid)
        heights, widths = matrix_split.grid_weights(speeds.ravel().tolist(), grid)
        assert sum(heights) == pytest.approx(1) and sum(widths) == pytest.approx(1)
        assert (np.outer(heights, widths) / speeds).max() <= (1 / speeds).max() / speeds.size * (1 + 1e-9)


@pytest.mark.parametrize("width", [1, 7, 64, 1000])
def test_panels_cover_everything_once_and_belong_to_one_line_each(width):
    rows, columns = (0, 33, 90, 128), (0, 64, 128)
    found = matrix_split.panels(rows, columns, width)
    assert found[0].first == 0 and found[-1].last == 128
    assert all(before.last == after.first for before, after in pairwise(found))
    for panel in found:
        assert 1 <= panel.width <= width
        assert rows[panel.grid_row] <= panel.first and panel.last <= rows[panel.grid_row + 1]
        assert columns[panel.grid_column] <= panel.first and panel.last <= columns[panel.grid_column + 1]


def test_what_is_too_large_is_refused_with_a_size_that_fits():
    request = Request(100_000, "float64", ("summa",))
    with pytest.raises(MissingError, match=r"100,000 x 100,000 in float64 takes .* GB .* 2 of 4 ranks") as refused:
        check_memory(request, ranks=4, local_ranks=2, available=10**10)
    smaller = int(str(refused.value).split("--size ")[1].split(";")[0])
    assert smaller > 10_000
    check_memory(Request(smaller, "float64", ("summa",)), ranks=4, local_ranks=2, available=10**10)
    check_memory(request, ranks=4, local_ranks=2, available=0)


# ---- The matrices and the check ------------------------------------------------------------------------------------

def whole(name: str, size: int, dtype: str) -> np.ndarray:
    return matrix_operands.make(name, range(size), range(size), size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_part_of_a_matrix_can_be_made_by_itself(dtype):
    all_of_it = whole("A", 40, dtype).astype(np.float64)
    part = matrix_operands.make("A", range(7, 30), range(11, 12), 40, dtype).astype(np.float64)
    assert np.array_equal(part, all_of_it[7:30, 11:12])
    assert np.abs(all_of_it).max() <= 1 and abs(all_of_it.mean()) < 0.05
    assert not np.array_equal(all_of_it, whole("B", 40, dtype).astype(np.float64))


def test_the_check_passes_numpys_own_product_and_finds_any_wrong_number():
    size, rows, columns = 300, range(10, 290), range(150, 300)
    right = whole("A", size, "float32")[10:290] @ whole("B", size, "float32")[:, 150:]
    limit = matrix_operands.tolerance(size, "float32")
    residual, error = matrix_operands.errors(right, rows, columns, size, "float32")
    assert 0 < residual < 0.01 and 0 < error < limit / 10
    source = np.random.default_rng(2)
    for _ in range(10):
        wrong = right.copy()
        wrong[source.integers(280), source.integers(150)] += 0.1
        assert matrix_operands.errors(wrong, rows, columns, size, "float32")[1] > limit


def test_a_product_without_one_panel_is_found_in_bfloat16_too():
    a, b = (whole(name, 512, "bfloat16").astype(np.float64) for name in "AB")
    everything = range(512)
    assert matrix_operands.errors(a @ b, everything, everything, 512, "bfloat16")[1] < 1e-12
    error = matrix_operands.errors(a[:, 64:] @ b[64:], everything, everything, 512, "bfloat16")[1]
    assert error > matrix_operands.tolerance(512, "bfloat16")


@pytest.mark.parametrize(("size", "ranks", "limits"), [(4096, 2, [0.85, 1.2]), (2048, 2, []), (4096, 4, [])])
def test_two_ranks_have_limits_from_the_promised_size_on(size, ranks, limits):
    names = ("alone", "at once", "rows", "rows communication", "summa", "summa communication")
    figures = list(matmul._figures(Request(size), ranks, {name: [2.0, 2.0] for name in names}, ["rows", "summa"]))
    assert [figure.limit for figure in figures if figure.limit] == limits
    found = {figure.name.split(": ")[1]: figure.value for figure in figures}
    assert found["SUMMA"] == found["the library on one core"] == pytest.approx(size**3 / 1e9)
    assert found["SUMMA, efficiency"] == pytest.approx(1 / ranks)
    assert found["the cores at once over row blocks"] == pytest.approx(ranks)


@pytest.mark.parametrize("broken", [0.5, np.nan])
def test_a_wrong_product_ends_the_benchmark(broken):
    ranks, request = distributed.Serial(), Request(64)
    product = Summa(ranks, 64, "float32", [1.0], 16)
    product.multiply()
    assert 0 < matmul._checked(ranks, request, "summa", product).value < 0.01
    product.block[20, 30] += broken
    with pytest.raises(DivergedError, match=r"product by SUMMA is wrong on ranks \[0\]"):
        matmul._checked(ranks, request, "summa", product)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rank_alone_multiplies_as_numpy_does(dtype):
    right = whole("A", 90, dtype).astype(np.float64) @ whole("B", 90, dtype).astype(np.float64)
    for product in (RowBlocks(distributed.Serial(), 90, dtype, [1.0]),
                    Summa(distributed.Serial(), 90, dtype, [1.0], 16)):
        for _ in range(2):  # the second time into what is there
            product.multiply()
            found = np.asarray(product.block).astype(np.float64)
            assert np.abs(found - right).max() < matrix_operands.tolerance(90, dtype) * right.std()


# ---- Real ranks ----------------------------------------------------------------------------------------------------

RANKS = '''
import sys
import numpy as np
from hpcai_cli import launch
from hpcai_cli.engine import distributed
from hpcai_cli.engine.benchmarks.matrix import matrix_split
from hpcai_cli.engine.benchmarks.matrix.matrix_products import RowBlocks, Summa

size, width, speeds = 101, 13, [float(word) for word in sys.argv[1:]]
ranks = distributed.start(matrix_split.process_groups(launch.place().size))
for dtype in ("float32", "float64", "bfloat16"):
    for product in (RowBlocks(ranks, size, dtype, speeds), Summa(ranks, size, dtype, speeds, width)):
        product.communicate()
        for _ in range(2):
            product.multiply()
        name = f"{dtype}-{type(product).__name__}-{ranks.rank}"
        np.savez(name, block=np.asarray(product.block).astype(np.float64),
                 place=[product.rows.start, product.rows.stop, product.columns.start, product.columns.stop])
ranks.stop()
'''


@pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")
@pytest.mark.parametrize(("launcher", "speeds"), [
    ("mpirun", ["1", "3"]), pytest.param("horovodrun", ["1", "2", "2", "3"], marks=pytest.mark.long)])
def test_uneven_ranks_multiply_as_numpy_does(launcher, speeds):
    if launcher == "mpirun" and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed")
    words = launchers.local(len(speeds), "horovodrun").words() if launcher == "horovodrun" else [
        "mpirun", "-np", str(len(speeds)), "--bind-to", "none", "--oversubscribe"]
    Path("ranks.py").write_text(RANKS)
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run([*words, sys.executable, "ranks.py", *speeds], env=environment, capture_output=True,
                          text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for dtype in DTYPES:
        right = whole("A", 101, dtype).astype(np.float64) @ whole("B", 101, dtype).astype(np.float64)
        for name in ("RowBlocks", "Summa"):
            found, areas = np.full((101, 101), np.nan), []
            for rank in range(len(speeds)):
                with np.load(f"{dtype}-{name}-{rank}.npz") as part:
                    top, bottom, left, end = part["place"]
                    assert np.isnan(found[top:bottom, left:end]).all(), "two ranks have the same part"
                    found[top:bottom, left:end] = part["block"]
                    areas.append(part["block"].size)
            assert np.abs(found - right).max() < matrix_operands.tolerance(101, dtype) * right.std()
            assert areas[-1] == max(areas) > 2 * areas[0]
