"""A study draws settings: what TPE finds in few trials, without any training."""

import math
import random

import pytest

from hpcai_cli import catalog
from hpcai_cli.search_space import parse

pytest.importorskip("optuna")
TRIALS = 20


def best_of(folder, method: str, seed: int) -> float:
    """Search a hill over learning rate, dropout and batch size, with some noise."""
    from hpcai_cli.engine.tuning.study import Objective, Plan, Study

    recipe = catalog.find("mnist-mlp").recipe
    space = parse({"learning_rate": "log:1e-5:1e-1", "dropout": "0:0.6", "batch_size": "log:32:512"}, recipe)
    plan = Plan("mnist-mlp", recipe, {}, "mnist.h5", "0", space, (Objective("accuracy", True),), method, "none", seed)
    study, noise = Study.begin(folder / f"{method}-{seed}", plan, None), random.Random(seed)
    for _ in range(TRIALS):
        trial = study.record.ask()
        found = {name: float(text) for name, text in study.suggest(trial).items()}
        far = (math.log10(found["learning_rate"]) + 2) ** 2 / 2 + 4 * (found["dropout"] - 0.1) ** 2 + math.log(
            found["batch_size"] / 128) ** 2 / 4
        study.record.tell(trial, -far + noise.gauss(0, 0.01))
    return study.best()[0].value


def test_twenty_trials_by_tpe_find_more_than_at_random(tmp_path):
    better = sum(best_of(tmp_path, "tpe", seed) > best_of(tmp_path, "random", seed) for seed in range(10))
    assert better >= 7
