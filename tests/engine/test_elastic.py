"""Elastic training within a rank: what depends on the number of ranks follows it, and which errors are a loss."""

import numpy as np
import pytest
import tensorflow as tf

from hpcai_cli.engine import elastic
from hpcai_cli.engine.learning_rates import ChangingRates, learning_rates
from hpcai_cli.engine.pipeline import ELASTIC_STEPS, Pipeline
from hpcai_cli.engine.store import Split
from hpcai_cli.errors import HpcaiError, UsageError
from hpcai_cli.recipe import Recipe

RECIPE = Recipe(name="tiny", summary="", input_shape=(6,), num_classes=3, epochs=4, learning_rate=0.04,
                learning_rate_scaling="linear")


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup_epochs", [0.0, 0.1, 1.5])
def test_learning_rates_follow_the_number_of_ranks_within_a_compiled_step(schedule, warmup_epochs):
    recipe = RECIPE.override({"schedule": schedule, "warmup_epochs": str(warmup_epochs)})
    rates = ChangingRates(recipe, steps_per_epoch=20, size=1)
    compiled = tf.function(lambda step: rates(step))
    for counts in ({"steps_per_epoch": 20, "size": 1}, {"steps_per_epoch": 5, "size": 4}, {"steps_per_epoch": 10,
                                                                                          "size": 2}):
        rates.follow(**counts)
        expected = learning_rates(recipe, **counts)
        for step in (0, 1, 7, 19, 20, 41, 79, 100):
            assert float(compiled(tf.constant(step))) == pytest.approx(float(expected(step)), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 3, 2), (4, 1, 4)])
def test_each_example_of_an_epoch_is_seen_once_whatever_becomes_of_the_ranks(sizes):
    """Each number of ranks takes some steps; the cursor alone goes from one to the next."""
    split, seen, cursor = Split(np.arange(101, dtype=np.float32)[:, None], np.arange(101), None, 0), [], 0
    for place, size in enumerate(sizes):
        steps = 3 if place < len(sizes) - 1 else 1_000
        shares = [Pipeline(split, batch_size=4, seed=5, rank=rank, size=size, is_elastic=True) for rank in range(size)]
        for blocks in zip(*(share.blocks(0, cursor) for share in shares), strict=True):
            assert len({block.labels.shape for block in blocks}) == 1
            counts = blocks[0].examples[:steps]
            assert all(block.examples[:steps] == counts for block in blocks)
            for step in range(len(counts)):
                seen += [label for block in blocks
                         for label, weight in zip(block.labels[step], block.weights[step], strict=True) if weight]
            cursor, steps = cursor + sum(counts), steps - len(counts)
            if steps == 0:
                break
    assert sorted(seen) == list(range(101))


def test_blocks_keep_their_shape():
    split = Split(np.zeros((10, 1), np.float32), np.zeros(10, np.int64), None, 0)
    sizes = {Pipeline(split, batch_size=2, seed=0, size=size, is_elastic=True).steps_per_block for size in (1, 2, 5)}
    assert sizes == {ELASTIC_STEPS}


@pytest.mark.parametrize("message", [
    "Horovod has been shut down. This was caused by an exception on one of the ranks",
    "[/b/third_party/gloo/gloo/transport/tcp/pair.cc:589] Read error [127.0.0.1]:5000: Connection reset by peer",
    "[/b/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 60000ms for recv"])
def test_what_says_that_another_rank_is_gone(message):
    assert elastic.is_loss(tf.errors.UnknownError(None, None, f"Graph execution error:\n\n{message}\n\t [[node]]"))


@pytest.mark.parametrize("error", [
    tf.errors.UnknownError(None, None, "RuntimeError: the recipe's own function failed"),
    tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"),
    ValueError("shapes differ"), UsageError("Horovod has been shut down"), HpcaiError("the disk is full")])
def test_what_is_a_rank_s_own_failure(error):
    """Upstream's wrapper takes an UnknownError of another operation for the end of the training."""
    assert not elastic.is_loss(error)
