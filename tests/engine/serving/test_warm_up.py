"""Tests of what a model's warm-up finds out."""

from types import SimpleNamespace

import numpy as np
import pytest

from hpcai_cli.engine.serving import artefact as artefacts
from hpcai_cli.engine.serving import warm_up


@pytest.mark.parametrize(("seconds", "batch"), [
    (lambda count: 0.01 * count, 1), (lambda count: 0.002 * count**1.2, 1), (lambda count: 0.01, 32),
    (lambda count: 0.02 * -(-count // 4), 4)], ids=["no gain", "a loss", "all gain", "up to four"])
def test_batches_are_as_large_as_they_pay(exports, tmp_path, monkeypatch, seconds, batch):
    artefact = artefacts.Artefact.open(exports.write(tmp_path / "tiny"))
    asked, clock = [], SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def scores(inputs):
        asked.append(len(inputs))
        clock.now += seconds(len(inputs))
        return np.zeros((len(inputs), artefact.columns), np.float32)

    monkeypatch.setattr(warm_up, "open_scores", lambda *_, **__: scores)
    # Of a busy machine's own clock a gain of a few per cent would be read where there is none.
    monkeypatch.setattr(warm_up, "time", clock)
    warm = warm_up.opened(artefact, threads=1, trust=True, tried=True, max_batch=32)
    assert warm.batch == batch
    assert warm.cost.each == pytest.approx(seconds(batch) / batch)
    asked.clear()
    assert warm.scores(np.zeros((7, *artefact.input_shape), np.uint8)).shape == (7, artefact.columns)
    # One call for each size that pays, none of a size that does not.
    assert sum(asked) == 7 and max(asked) <= batch and len(asked) == {1: 7, 4: 3, 32: 3}[batch]


@pytest.mark.parametrize("most", [1, 2, 12, 32])
def test_the_bound_on_a_batch_is_kept(exports, tmp_path, most):
    artefact = artefacts.Artefact.open(exports.write(tmp_path / "tiny"))
    warm = warm_up.opened(artefact, threads=1, trust=True, tried=True, max_batch=most)
    assert 1 <= warm.batch <= most
    rows = np.random.default_rng(0).integers(0, 256, (most, *artefact.input_shape), np.uint8)
    whole, single = warm.scores(rows), np.concatenate([warm.scores(rows[number:number + 1]) for number in range(most)])
    np.testing.assert_allclose(whole, single, rtol=1e-5, atol=1e-6)
