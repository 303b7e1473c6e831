"""hpcai tune: trials that are real trainings, in a study that goes on after whatever ended it."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("optuna")
HPCAI = Path(sys.executable).parent / "hpcai"
SEARCH = ("--search", "learning_rate=log:1e-4:1e-1")
TUNE = ("tune", "./tiny.py", "--data", "tiny.h5", "--study", "s")


@pytest.fixture
def folder(hpcai, tiny_folder) -> Path:
    """Return a working folder with the tiny recipe and its data."""
    assert hpcai("preprocess", "./tiny.py", "--source", "sample", "--output", "tiny.h5").exit_code == 0
    return tiny_folder


def result(done) -> dict:
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def epochs_of(number: int) -> list[int]:
    lines = Path(f"s/trials/{number:04d}/events.jsonl").read_text().splitlines()
    return [event["epoch"] for event in map(json.loads, lines) if event["event"] == "epoch"]


# ---- What it finds -------------------------------------------------------------------------------------------------

def test_trials_side_by_side_and_the_best_goes_on_to_train(hpcai, folder):
    words = (*TUNE, *SEARCH, "--search", "batch_size=8,16", "--set", "momentum=0.5", "--method", "random", "--workers",
             2, "--json")
    found = result(hpcai(*words, "--trials", 3))
    assert found["trials"] == {"complete": 3} and found["objectives"] == ["loss"]
    figures = [json.loads(Path(f"s/trials/{number:04d}/result.json").read_text())["metrics"]["validation_loss"]
               for number in range(3)]
    assert found["metrics"] == {"loss": min(figures)}
    best = found["best"][0]
    assert best["number"] == figures.index(min(figures)) and best["run"] == f"s/trials/{best['number']:04d}"
    assert f"--set learning_rate={best['params']['learning_rate']!r}" in found["set"]
    assert found["next"][0] == f"hpcai train {found['recipe']} --data tiny.h5 --from s/best.json --output s/best"
    assert hpcai(*found["next"][0].split()[1:]).exit_code == 0
    trained = json.loads(Path("s/best/result.json").read_text())
    assert trained["metrics"]["validation_loss"] == pytest.approx(min(figures), rel=1e-5)
    assert json.loads(Path("s/best/recipe.json").read_text())["momentum"] == 0.5

    more = result(hpcai(*words, "--trials", 4))
    assert more["trials"] == {"complete": 4}
    rates = [json.loads(Path(f"s/trials/{number:04d}/recipe.json").read_text())["learning_rate"]
             for number in range(4)]
    assert len(set(rates)) == 4, "what was drawn before is not drawn again"

    shown = result(hpcai("tune", "show", "s", "--json"))
    assert set(shown["importance"]) == {"learning_rate", "batch_size"}
    assert sum(shown["importance"].values()) == pytest.approx(1)
    assert {path.name for path in Path("s").glob("*.png")} == {"contour.png", "history.png", "importance.png",
                                                               "intermediate.png", "slices.png"}
    page = Path("s/report.html").read_text()
    assert page.count("<img") == 5 and found["set"] in page
    text = hpcai("tune", "show", "s").stdout
    assert all(command in text for command in found["next"]) and len(found["next"]) == 4


@pytest.mark.long
def test_what_it_prints_leads_to_a_model_for_users(hpcai, folder):
    found = result(hpcai(*TUNE, *SEARCH, "--trials", 2, "--epochs", 3, "--json"))
    for command in found["next"]:
        done = hpcai(*command.split()[1:])
        assert done.exit_code == 0, done.stderr
    assert list(Path("s/best/exports").iterdir()) and list(Path("s/best/compressed").iterdir())


@pytest.mark.long
def test_a_grid_needs_no_budget_and_several_objectives_have_a_front(hpcai, folder):
    found = result(hpcai(*TUNE, "--search", "batch_size=8,100", "--method", "grid", "--objective", "accuracy",
                         "--objective", "seconds", "--epochs", 2, "--json"))
    assert found["trials"] == {"complete": 2} and found["objectives"] == ["accuracy", "seconds"]
    trials = [json.loads(Path(f"s/trials/000{number}/result.json").read_text())["metrics"] for number in range(2)]
    pairs = [(trial["validation_accuracy"], trial["seconds"]) for trial in trials]
    front = [pair for pair in pairs if not any(
        other != pair and other[0] >= pair[0] and other[1] <= pair[1] for other in pairs)]
    assert sorted(map(tuple, (each["values"] for each in found["best"]))) == sorted(front)
    again = hpcai(*TUNE, "--search", "batch_size=8,100", "--method", "grid", "--objective", "accuracy", "--objective",
                  "seconds", "--epochs", 2, "--json")
    assert result(again)["trials"] == {"complete": 2}


@pytest.mark.long
def test_what_was_trained_before_is_learned_from(hpcai, folder):
    for number, rate in enumerate((0.001, 0.01, 7.0)):
        done = hpcai("train", "./tiny.py", "--data", "tiny.h5", "--learning-rate", rate, "--output", f"run-{number}",
                     "--epochs", 1)
        assert done.exit_code == 0, done.stderr
    words = (*TUNE, *SEARCH, "--epochs", 1, "--trials", 1, "--json")
    given = [word for number in range(3) for word in ("--warm-start", f"run-{number}")]
    done = hpcai(*words, *given)
    assert result(done)["trials"] == {"complete": 3}, "two of before, one of its own; the third is out of range"
    assert "run-2: 0 of 1 runs to learn from" in done.stderr
    assert result(hpcai(*words, *given))["trials"] == {"complete": 3}
    loss = json.loads(Path("run-1/result.json").read_text())["metrics"]["validation_loss"]
    assert result(hpcai(*words))["metrics"]["loss"] <= loss


def test_it_begins_with_the_settings_of_the_recipe(hpcai, folder):
    own = json.loads(hpcai("recipes", "show", "./tiny.py", "--json").stdout)["recipe"]
    words = ("--search", f"batch_size=4,{own['batch_size']}", "--epochs", 1, "--trials", 1, "--json")
    found = result(hpcai(*TUNE, *SEARCH, *words))
    assert found["best"][0]["params"] == {"learning_rate": own["learning_rate"], "batch_size": str(own["batch_size"])}
    elsewhere = result(hpcai("tune", "./tiny.py", "--data", "tiny.h5", "--search", "learning_rate=1e-6:1e-5", *words))
    assert 1e-6 <= elsewhere["best"][0]["params"]["learning_rate"] <= 1e-5


LAGGING = ("--method", "grid", "--set", "schedule=constant", "--pruner", "asha", "--json")
LONG = 300
"""Epochs that take seconds, of which a search that looks ten times a second, on a busy machine, sees the first."""


def test_trials_that_lag_are_ended_early(hpcai, folder):
    found = result(hpcai(*TUNE, "--search", "learning_rate=0.05,1e-7", *LAGGING, "--epochs", LONG))
    assert found["trials"] == {"complete": 1, "pruned": 1}
    assert max(epochs_of(0)) == LONG > max(epochs_of(1))


def test_the_settings_of_the_recipe_are_never_ended_early(hpcai, folder):
    recipe = Path("tiny.py")
    recipe.write_text(recipe.read_text().replace("learning_rate=0.01", "learning_rate=1e-7"))
    found = result(hpcai(*TUNE, "--search", "learning_rate=0.05,1e-7,2e-7", *LAGGING, "--epochs", LONG))
    assert found["trials"] == {"complete": 2, "pruned": 1}
    assert max(epochs_of(1)) == LONG > max(epochs_of(2))


def test_a_trial_whose_last_epoch_lags_is_complete(hpcai, folder):
    found = result(hpcai(*TUNE, "--search", "learning_rate=0.05,1e-7", *LAGGING, "--epochs", 1))
    assert found["trials"] == {"complete": 2}, "there was nothing left to save"


# ---- What goes wrong -----------------------------------------------------------------------------------------------

def test_a_trial_that_fails_is_recorded_with_its_cause_and_stops_nothing(hpcai, folder):
    found = result(hpcai(*TUNE, "--search", "learning_rate=1e30,0.01", "--method", "grid", "--epochs", 1, "--json"))
    assert found["trials"] == {"complete": 1, "fail": 1}
    assert "expected a finite number" in found["failed"][0]["cause"]


@pytest.mark.long
def test_a_study_of_which_every_trial_fails_stops_early(hpcai, folder):
    done = hpcai(*TUNE, "--search", "learning_rate=log:1e30:1e35", "--trials", 50, "--epochs", 1)
    assert done.exit_code == 6, done.stderr
    assert "all of 3 trials have failed, the last of them so: the " in done.stderr
    assert len(list(Path("s/trials").glob("*.log"))) == 3


@pytest.mark.parametrize(("words", "code", "said"), [
    (SEARCH, 2, "a search needs a budget"), (("--trials", 1), 2, "names nothing to search"),
    ((*SEARCH, "--trials", 1, "--method", "guess"), 2, "one of tpe, random"),
    ((*SEARCH, "--trials", 1, "--pruner", "guess"), 2, "one of none, asha"),
    ((*SEARCH, "--trials", 1, "--objective", "accuracy:up"), 2, "NAME:min"),
    ((*SEARCH, "--trials", 1, "--objective", "loss", "--objective", "loss:max"), 2, "given twice"),
    ((*SEARCH, "--trials", 1, "--objective", "loss", "--objective", "accuracy", "--pruner", "asha"), 2, "pruner none"),
    ((*SEARCH, "--trials", 1, "--set", "learning-rate=1"), 2, "both set and searched"),
    ((*SEARCH, "--trials", 1, "--method", "cmaes"), 2, "at least two ranges"),
    ((*SEARCH, "--method", "grid"), 2, "can be counted"), (("--search", "batch_size"), 2, "cannot read --search"),
    ((*SEARCH, "--trials", 1, "--data", "none.h5"), 3, "none.h5"),
    ((*SEARCH, "--trials", 1, "--warm-start", "none"), 3, "not a run folder"),
    ((*SEARCH, "--trials", 1, "--storage", "nowhere"), 2, "cannot keep the record there"),
    ((*SEARCH, "--trials", 1, "--storage", "sqlite:////no/such/folder/db"), 2, "cannot keep the record there"),
    ((*SEARCH, "--method", "population", "--trials", 3), 2, "no --trials")],
    ids=lambda words: words if isinstance(words, str) else None)
def test_wrong_words(hpcai, folder, words, code, said):
    done = hpcai(*TUNE, *words)
    assert done.exit_code == code, done.stderr
    assert said in done.stderr


def test_an_objective_that_no_training_has(hpcai, folder):
    done = hpcai(*TUNE, *SEARCH, "--trials", 2, "--epochs", 1, "--objective", "beauty:max")
    assert done.exit_code == 2, done.stderr
    assert "a training has no beauty" in done.stderr and "validation_accuracy" in done.stderr


def test_a_study_is_one_and_no_other(hpcai, folder):
    assert hpcai(*TUNE, *SEARCH, "--trials", 1, "--epochs", 1).exit_code == 0
    done = hpcai(*TUNE, *SEARCH, "--trials", 1, "--epochs", 2)
    assert done.exit_code == 2 and "the study in s has another recipe, settings" in done.stderr
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("years of work")
    done = hpcai("tune", "./tiny.py", "--data", "tiny.h5", "--study", "full", *SEARCH, "--trials", 1)
    assert done.exit_code == 2 and "holds something that is no study" in done.stderr
    done = hpcai("tune", "show", "full")
    assert done.exit_code == 3 and "not a study's folder" in done.stderr
    Path("s/study.json").write_text("{}")
    done = hpcai("tune", "show", "s")
    assert done.exit_code == 3 and "holds no study" in done.stderr


# ---- What ends it, and how it goes on ------------------------------------------------------------------------------

SLOW = (*TUNE, *SEARCH, "--method", "random", "--trials", "2", "--epochs", "1000", "--workers", "2")
"""The one training is a second or two ahead of the other, on a busy machine more; both are to be under way at once."""
EVERY = list(range(1, 1001))


def started(*words: object) -> subprocess.Popen:
    return subprocess.Popen([str(HPCAI), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def wait_until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_under_way() -> bool:
    return all(Path(f"s/trials/000{number}/events.jsonl").is_file() and len(epochs_of(number)) > 2
               for number in range(2))


@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.long),
    pytest.param(signal.SIGINT, 75, marks=pytest.mark.long)])
def test_it_goes_on_after_whatever_ended_it(hpcai, folder, number, code):
    process = started(*SLOW)
    wait_until(is_under_way)
    os.kill(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    if code == 75:
        assert "the study goes on when the same command is given again" in said
    before = [epochs_of(each) for each in range(2)]
    found = result(hpcai(*SLOW, "--json"))
    assert found["trials"] == {"complete": 2}
    for each in range(2):
        lines = Path(f"s/trials/000{each}/events.jsonl").read_text().splitlines()
        events = [json.loads(line)["event"] for line in lines]
        assert events.count("started") == 1 and events.count("resumed") == 1
        assert epochs_of(each) == EVERY and before[each] == epochs_of(each)[:len(before[each])]
    assert len(list(Path("s/trials").glob("*.log"))) == 2


@pytest.mark.long
def test_trainings_that_a_killed_search_has_left_are_waited_for(hpcai, folder):
    """They save themselves first, and a search that found nothing else to do must not take its budget for spent."""
    process = started(*SLOW)
    wait_until(is_under_way)
    left = [json.loads(path.read_text())["process"] for path in Path("s/trials").glob("*/.lock")]
    assert len(left) == 2
    for each in left:
        os.kill(each, signal.SIGSTOP)
    process.kill()
    process.communicate(timeout=60)
    again = started(*SLOW, "--json")
    with pytest.raises(subprocess.TimeoutExpired):
        again.wait(timeout=6)
    for each in left:
        os.kill(each, signal.SIGCONT)
    output, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert json.loads(output)["trials"] == {"complete": 2}
    assert epochs_of(0) == epochs_of(1) == EVERY


@pytest.mark.long
@pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")
def test_trials_of_two_ranks(hpcai, folder):
    found = result(hpcai(*TUNE, *SEARCH, "--trials", 1, "--epochs", 2, "--np", 2, "--json"))
    assert found["trials"] == {"complete": 1}
    assert json.loads(Path("s/trials/0000/manifest.json").read_text())["world_size"] == 2
    assert found["next"][0].endswith("--output s/best --np 2"), "the best is of two ranks"


@pytest.mark.long
def test_two_processes_share_a_study(hpcai, folder):
    words = (*TUNE, *SEARCH, "--method", "random", "--trials", 4, "--epochs", 2, "--json")
    both = [started(*words) for _ in range(2)]
    outputs = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert result(hpcai(*words))["trials"] == {"complete": 4}
    trials = [{line.split(":")[0] for line in said.splitlines() if line.startswith("trial ")} for _, said in outputs]
    assert trials[0].isdisjoint(trials[1]) and len(trials[0] | trials[1]) == 4 and all(trials)


@pytest.mark.long
def test_a_database_keeps_the_record(hpcai, folder):
    words = (*TUNE, *SEARCH, "--epochs", 1, "--storage", "sqlite:///record.db", "--json")
    assert result(hpcai(*words, "--trials", 1))["trials"] == {"complete": 1}
    assert result(hpcai(*words, "--trials", 2))["trials"] == {"complete": 2}
    assert result(hpcai("tune", "show", "s", "--json"))["trials"] == {"complete": 2}
    assert not Path("s/journal.log").exists()
    other = hpcai(*words[:-3], "--storage", "sqlite:///other.db", "--trials", 2)
    assert other.exit_code == 2 and "recorded elsewhere" in other.stderr


@pytest.mark.long
def test_the_front_of_accuracy_and_latency(hpcai, folder):
    found = result(hpcai(*TUNE, "--search", "batch_size=8,16", "--method", "grid", "--objective", "accuracy",
                         "--objective", "latency_ms", "--epochs", 1, "--json"))
    assert found["trials"] == {"complete": 2}
    assert all(0 < each["values"][1] < 1000 for each in found["best"])
    shown = result(hpcai("tune", "show", "s", "--json"))
    assert Path("s/front.png").is_file() and shown["page"] == "s/report.html"


@pytest.mark.long
def test_a_time_limit_is_a_budget(hpcai, folder):
    done = hpcai(*TUNE, *SEARCH, "--max-time", "8s", "--epochs", 100_000, "--json")
    found = result(done)
    assert found["trials"] == {"running": 1} and found["best"] == []


def test_a_journal_that_a_kill_has_torn_is_read_on(hpcai, folder):
    words = (*TUNE, *SEARCH, "--epochs", 1, "--json")
    assert result(hpcai(*words, "--trials", 1))["trials"] == {"complete": 1}
    with open("s/journal.log", "a") as stream:
        stream.write('{"op_code":5,"wor')
    assert result(hpcai(*words, "--trials", 2))["trials"] == {"complete": 2}
    assert result(hpcai("tune", "show", "s", "--json"))["trials"] == {"complete": 2}


# ---- A population --------------------------------------------------------------------------------------------------

@pytest.mark.long
def test_a_population_goes_on_from_its_best_member_also_after_a_kill(hpcai, folder):
    words = (*TUNE, "--search", "learning_rate=1e-7,0.03", "--set", "schedule=constant", "--method", "population",
             "--population", 3, "--epochs", 3, "--workers", 2)
    process = started(*words)
    wait_until(lambda: any(path.is_file() for path in Path("s/population").glob("*-001/events.jsonl")))
    process.kill()
    process.communicate(timeout=60)
    found = result(hpcai(*words, "--json"))
    assert found["trials"] == {"complete": 9}
    events = {path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
              for path in Path("s/population").glob("*/events.jsonl")}
    assert sorted(events) == [f"{member:02d}-{generation:03d}" for member in range(3) for generation in range(3)]
    assert all(max(event["epoch"] for event in told if event["event"] == "epoch") == int(name[-3:]) + 1
               for name, told in events.items())
    assert found["best"][0]["run"].startswith("s/population/") and found["best"][0]["run"].endswith("-002")
    assert found["next"][0] == f"hpcai evaluate {found['best'][0]['run']}"
    evaluated = result(hpcai(*found["next"][0].split()[1:], "--split", "validation", "--json"))
    assert evaluated["metrics"]["loss"] == pytest.approx(found["metrics"]["loss"], rel=1e-4)
    other = hpcai(*words[:-1], 1, "--interval", 2)
    assert other.exit_code == 2 and "begun otherwise" in other.stderr


@pytest.mark.long
def test_the_benchmark_of_it(hpcai, folder, monkeypatch):
    from hpcai_cli.engine.benchmarks import tuning

    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "FEW", 2)
    found = result(hpcai("benchmark", "tune", "./tiny.py", "--data", "tiny.h5", "--seeds", 1, "--trials", 3, *SEARCH,
                         "--json"))
    figures = {row["name"]: row for row in found["figures"]}
    assert len(figures) == 8
    title = "./tiny.py, 3 trials"
    assert figures[f"{title}: seeds with which TPE is better than random trials"]["value"] in (0, 1)
    assert figures[f"{title}: seeds with which what TPE drew itself is better, without the recipe's own settings"
                   ]["value"] <= figures[f"{title}: seeds with which TPE is better than random trials"]["value"]
    assert figures[f"{title}: epochs with ASHA"]["value"] <= 1
    assert figures[f"{title}: time beside the trials"]["value"] > 0
    workers = figures["./tiny.py: trials per hour of two workers on two cores against one on one"]
    assert 0.5 < workers["value"] < 3 and workers["limit"] == 1.8
