"""What `hpcai benchmark scaling` makes of measured steps, on made-up ones whose answer is known."""

import json
import os
from pathlib import Path

import pytest

from hpcai_cli import launchers
from hpcai_cli.engine.benchmarks.measure import Curves, Figure, Table
from hpcai_cli.engine.benchmarks.scaling import scaling, scaling_jobs, scaling_projection, scaling_results
from hpcai_cli.engine.benchmarks.scaling.projection import Costs
from hpcai_cli.engine.benchmarks.scaling.scaling_results import JobSteps, Kind, Measured
from hpcai_cli.errors import HpcaiError
from hpcai_cli.recipe import Recipe

RECIPE = Costs(step=2e-3, unit=3e-4, byte=0, crowding=2e-5, latency=8e-4, transfer=6e-10)
MADE_UP = Costs(step=1e-4, unit=4e-4, byte=1e-10, crowding=0, latency=8e-4, transfer=6e-10)
BYTES = 142_196
FITTED = {4, 64, 1024}


def job(ranks: int, images: set[int], *, own_cores: bool = True, slower: float = 0.0) -> JobSteps:
    """A job whose steps take exactly what the costs say, in three rounds; the last rank computes longer."""
    steps = []
    for kind in scaling_projection.kinds(images):
        size, costs = (BYTES, RECIPE) if kind.of == "recipe" else (kind.bytes, MADE_UP)
        for averaged in (True, False) if ranks > 1 else (False,):
            seconds = costs.seconds(ranks, kind.units, size, averaged=averaged)
            row = [seconds] * (ranks - 1) + [seconds * (1 if averaged else 1 + slower)]
            steps.append(Measured(Kind(kind.of, kind.units, size), averaged, [row] * 3))
    return JobSteps([f"rank {rank} (here, core {rank})" for rank in range(ranks)], own_cores, steps)


def told(jobs: dict[int, JobSteps], **wanted) -> tuple[dict, dict, dict]:
    """Figures by name, tables and curves by title."""
    mode, most = wanted.get("mode", "both"), wanted.get("most", 1024)
    many = scaling_results.series(mode, tuple(jobs), (64, 1024), 1024)
    found = [*scaling_results.found(jobs, many), *scaling_projection.found(jobs, many, FITTED, most)]
    return tuple({getattr(each, "name", None) or each.title: each for each in found if isinstance(each, kind)}
                 for kind in (Figure, Table, Curves))


def test_rates_and_efficiency_are_those_of_the_steps():
    figures, tables, curves = told({1: job(1, {4, 64, 1024}), 2: job(2, {4, 64, 512, 1024})})
    alone, both = RECIPE.seconds(1, 64, BYTES), RECIPE.seconds(2, 64, BYTES)
    name = "weak, 64 images a step and rank"
    assert figures[f"{name}: 1 rank"].value == pytest.approx(64 / alone)
    assert figures[f"{name}: 2 ranks"].value == pytest.approx(2 * 64 / both)
    assert figures[f"{name}: 2 ranks, efficiency"].value == pytest.approx(alone / both)
    unconnected = RECIPE.seconds(2, 64, BYTES, averaged=False)
    assert figures[f"{name}: 2 ranks, unconnected"].value == pytest.approx(alone / unconnected)
    assert figures[f"{name}: 2 ranks, communication"].value == pytest.approx(1 - unconnected / both)
    assert len(figures[f"{name}: 2 ranks"].rounds) == 3
    rate = 1024 / RECIPE.seconds(2, 512, BYTES)
    assert figures["strong, 1,024 images a step: 2 ranks"].value == pytest.approx(rate)
    assert dict(curves[f"Scaling, {name}"].lines["ideal"]) == pytest.approx({1: 64 / alone, 2: 128 / alone})
    assert [row[0] for row in tables["Scaling, strong, 1,024 images a step"].rows] == [1, 2]


def test_the_slowest_rank_is_named_and_waiting_for_it_is_no_communication():
    figures, tables, _ = told({1: job(1, FITTED), 2: job(2, FITTED, slower=0.2)}, mode="weak")
    row = tables["Scaling, weak, 1,024 images a step and rank"].rows[1]
    assert row[5] == "rank 1 (here, core 1)" and row[6] == pytest.approx(1.2 / 1.1 - 1)
    share = 1 - 1.2 * RECIPE.seconds(2, 64, BYTES, averaged=False) / RECIPE.seconds(2, 64, BYTES)
    assert figures["weak, 64 images a step and rank: 2 ranks, communication"].value == pytest.approx(share)


def test_ranks_that_share_cores_are_shown_and_judge_nothing():
    jobs = {1: job(1, FITTED), 2: job(2, FITTED), 4: job(4, FITTED, own_cores=False)}
    figures, tables, curves = told(jobs, mode="weak")
    assert not [name for name in figures if "4 ranks" in name]
    row = tables["Scaling, weak, 64 images a step and rank"].rows[2]
    assert row[0] == 4 and row[-1] == "shared"
    assert all(row[1] == 2 for row in tables["The model on sizes that were left out of its fit"].rows if row[4])
    title = "Projection, not measured: weak, 64 images a step and rank"
    assert [size for size, _ in curves[title].lines["measured"]] == [1, 2]


def test_the_model_is_right_where_it_was_not_fitted_and_is_drawn_on_to_1024_ranks():
    figures, tables, curves = told({1: job(1, {4, 64, 1024}), 2: job(2, {4, 64, 512, 1024})})
    for kind in ("recipe", "made-up"):
        error = figures[f"model: largest error on {kind} steps left out"]
        assert error.value == pytest.approx(0, abs=1e-6) and (error.limit, error.at_most) == (0.1, True)
    assert figures["model: latency of averaging between two ranks"].value == pytest.approx(0.8)
    assert figures["model: bytes that a rank sends"].value == pytest.approx(1e-9 / 6e-10)
    checked = tables["The model on sizes that were left out of its fit"].rows
    assert {(row[0], row[2]) for row in checked if not row[4]} >= {("recipe", 512), ("made-up", 32)}
    assert {row[2:5] for row in checked if row[0] == "recipe"} == {
        (64, BYTES, True), (512, BYTES, True), (512, BYTES, False), (1024, BYTES, True)}
    title = "Projection, not measured: weak, 64 images a step and rank"
    rows = {row[0]: row for row in tables[title].rows}
    assert list(rows) == [2**power for power in range(11)]
    assert rows[1][1] == rows[2][1] == "measured too" and {rows[size][1] for size in rows if size > 2} == {"projected"}
    seconds = RECIPE.seconds(1024, 64, BYTES)
    assert rows[1024][2] == pytest.approx(1024 * 64 / seconds, rel=1e-4)
    assert rows[1024][3] == pytest.approx(RECIPE.seconds(1, 64, BYTES) / seconds, rel=1e-4)
    assert set(curves[title].lines) == {"measured", "projected, recursive doubling", "projected, ring", "ideal"}


def test_of_several_sizes_the_largest_is_left_out_of_the_fit_and_finds_the_algorithm():
    _, tables, _ = told({size: job(size, FITTED) for size in (1, 2, 4)}, mode="weak")
    rows = tables["The model on sizes that were left out of its fit"].rows
    assert {row[2] for row in rows if row[0] == "recipe" and row[1] == 4} == FITTED
    assert max(abs(row[-1]) for row in rows) < 1e-6


def test_strong_scaling_ends_with_one_image_a_rank():
    _, tables, _ = told({1: job(1, {4, 64, 1024}), 2: job(2, {4, 64, 512, 1024})}, mode="strong", most=1 << 20)
    assert tables["Projection, not measured: strong, 1,024 images a step"].rows[-1][0] == 1024


def test_one_rank_alone_is_not_projected():
    assert list(scaling_projection.found({1: job(1, FITTED)}, [], FITTED, 1024)) == []


def test_a_job_of_its_own_is_measured_against_its_ranks_without_averaging():
    figures, _, _ = told({4: job(4, FITTED)}, mode="weak")
    share = RECIPE.seconds(4, 64, BYTES, averaged=False) / RECIPE.seconds(4, 64, BYTES)
    assert figures["weak, 64 images a step and rank: 4 ranks, efficiency"].value == pytest.approx(share)
    assert "weak, 64 images a step and rank: 4 ranks, unconnected" not in figures


def test_jobs_travel_as_json_and_their_rounds_add_up():
    one = job(2, {4})
    assert JobSteps.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert [len(step.seconds) for step in one.joined(one).steps] == [6] * len(one.steps)


def test_each_rank_gets_as_many_cores_in_every_job():
    cores = sorted(os.sched_getaffinity(0))
    for sizes, share in (((1,), len(cores)), ((1, len(cores)), 1), ((1, len(cores), 4 * len(cores)), 1)):
        assert scaling_jobs.cores_of_a_rank(sizes) == (share, cores[:len(cores)])


def test_a_job_that_fails_says_what_its_rank_said():
    with pytest.raises(HpcaiError, match=r"job of 1 rank failed with exit code 2; .*received: .*no such recipe"):
        scaling_jobs.run(launchers.local(1), sorted(os.sched_getaffinity(0)), ["--recipe", "mnost"])


def test_what_was_measured_before_an_interruption_is_told(monkeypatch):
    """Of the second round's first job: the first round has all sizes."""
    given = [job(1, FITTED), job(2, FITTED)]

    def run(ranks, cores, words):
        if not given:
            raise KeyboardInterrupt
        return given.pop(0)

    monkeypatch.setattr(scaling_jobs, "run", run)
    subject = scaling.Subject(Recipe(name="tiny", summary="", batch_size=64), "tiny", None, None, Path("none.h5"))
    plan = scaling._Plan((1, 2), "weak", 64, 1024, (64, 1024), 4, 0.1)
    found = []
    with pytest.raises(KeyboardInterrupt):
        found.extend(scaling._in_jobs(subject, plan, launchers.local(2)))
    names = [each.name for each in found if isinstance(each, Figure)]
    assert "weak, 64 images a step and rank: 2 ranks, efficiency" in names
