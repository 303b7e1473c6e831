"""Magnitude pruning: what goes, when, and that it stays away."""

import keras
import numpy as np
import pytest
from keras import layers

from hpcai_cli.engine.compression.pruning import END, MagnitudePruning, prunable
from hpcai_cli.errors import UsageError


def network(units: int = 16) -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([
        keras.Input((8, 8, 4)), layers.Conv2D(8, 3, name="conv"), layers.BatchNormalization(), layers.Flatten(),
        layers.Dense(units, name="dense"), layers.Dense(3, name="answer")])


def zeros(variable) -> float:
    return float((variable.numpy() == 0).mean())


def run(pruning: MagnitudePruning, model: keras.Model, steps: int, noise: float = 0.01) -> None:
    """Do what training steps do: change all weights a little, then prune."""
    source = np.random.default_rng(0)
    for step in range(1, steps + 1):
        kept = pruning.kept()
        for variable in model.trainable_variables:
            variable.assign_add(noise * source.normal(size=variable.shape).astype(np.float32))
        pruning.apply(kept, np.int64(step))


def test_the_asked_share_is_zero_at_the_end_and_stays_zero():
    model = network()
    pruning = MagnitudePruning(model, sparsity=0.8, steps=200)
    kernels, left = prunable(model, "unstructured")
    assert set(kernels) == {"conv", "dense"} and left == ["answer"]
    run(pruning, model, int(END * 200))
    gone = {name: kernel.numpy() == 0 for name, kernel in kernels.items()}
    total = sum(np.prod(model.get_layer(name).kernel.shape) for name in ("conv", "dense", "answer"))
    assert sum(mask.sum() for mask in gone.values()) / total == pytest.approx(0.8, abs=2 / total)
    run(pruning, model, 40, noise=0.1)
    for name, kernel in kernels.items():
        np.testing.assert_array_equal(kernel.numpy() == 0, gone[name])


def test_the_smallest_weights_go():
    model = network()
    before = model.get_layer("dense").kernel.numpy()
    pruning = MagnitudePruning(model, sparsity=0.5, steps=1)
    run(pruning, model, 1, noise=0.0)
    after = model.get_layer("dense").kernel.numpy()
    assert np.abs(before[after == 0]).max() < np.abs(before[after != 0]).min()
    np.testing.assert_array_equal(before[after != 0], after[after != 0])


def test_the_sparsity_follows_the_cubic_schedule():
    """Zhu and Gupta, arXiv 1710.01878, equation 1, from 0 at the start."""
    model = network()
    steps, found = 1000, []
    pruning = MagnitudePruning(model, sparsity=0.7, steps=steps)
    kernel = model.get_layer("dense").kernel
    last = int(END * steps)
    for step in range(1, steps + 1):
        pruning.apply(pruning.kept(), np.int64(step))
        found.append(zeros(kernel))
    assert all(after >= before for before, after in zip(found, found[1:], strict=False))
    for step in (101, 301, 501):
        assert found[step - 1] == pytest.approx(pruning.sparsity * (1 - (1 - step / last) ** 3), abs=0.01)
    assert found[last - 1] == found[-1] == pytest.approx(pruning.sparsity, abs=1e-3)


def test_two_of_four_along_the_inputs_and_the_larger_ones():
    model = network()
    before = model.get_layer("conv").kernel.numpy()
    run(MagnitudePruning(model, sparsity=0.5, pattern="2:4", steps=1), model, 1, noise=0.0)
    after = model.get_layer("conv").kernel.numpy()
    assert after.shape == (3, 3, 4, 8)
    assert ((after != 0).sum(axis=2) == 2).all()
    kept = np.where(after != 0, np.abs(before), np.inf).min(axis=2)
    gone = np.where(after == 0, np.abs(before), 0).max(axis=2)
    assert (gone <= kept).all()
    # The same in a dense layer, whose inputs are its first axis.
    dense = model.get_layer("dense").kernel.numpy()
    assert ((dense.reshape(-1, 4, 16) != 0).sum(axis=1) == 2).all()


def test_equal_weights_leave_two_of_four():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4, kernel_initializer="ones")])
    run(MagnitudePruning(model, sparsity=0.5, pattern="2:4", steps=1), model, 1, noise=0.0)
    assert ((model.layers[0].kernel.numpy().reshape(2, 4, 4) != 0).sum(axis=1) == 2).all()


def test_a_model_without_anything_to_prune_is_refused():
    model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization()])
    with pytest.raises(UsageError, match="no layers that can be pruned"):
        MagnitudePruning(model, sparsity=0.5, steps=10)
    odd = keras.Sequential([keras.Input((6,)), layers.Dense(3, name="odd")])
    with pytest.raises(UsageError, match="received: 'odd'"):
        MagnitudePruning(odd, sparsity=0.5, pattern="2:4", steps=10)


def test_a_sparsity_that_what_can_be_pruned_does_not_allow_is_refused():
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.DepthwiseConv2D(3, depth_multiplier=8),
                              layers.Flatten(), layers.Dense(1, name="answer")])
    share = 288 / (288 + 72)
    with pytest.raises(UsageError, match=f"less than {share:.3f}"):
        MagnitudePruning(model, sparsity=0.95, steps=10)
