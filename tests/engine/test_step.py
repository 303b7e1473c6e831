"""One step: what the optimizer gets is the formula's gradient, for any padding, accumulation and precision."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from hpcai_cli.engine.distributed import Serial
from hpcai_cli.engine.model import build
from hpcai_cli.engine.pipeline import Block
from hpcai_cli.engine.step import build_optimizer, compile_steps
from hpcai_cli.recipe import Recipe

RECIPE = Recipe(name="tiny", summary="", input_shape=(6,), num_classes=3, inputs="features", batch_size=4,
                optimizer="sgd", learning_rate=0.5, momentum=0.0, schedule="constant", epochs=2)


@pytest.fixture
def precision():
    """Return the function that sets the dtype policy; the one from before comes back afterwards."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


def linear(recipe: Recipe) -> keras.Model:
    return keras.Sequential([keras.Input(recipe.input_shape),
                             layers.Dense(recipe.num_classes, dtype="float32", bias_initializer="ones")])


def two_layers(recipe: Recipe) -> keras.Model:
    return keras.Sequential([keras.Input(recipe.input_shape), layers.Dense(8, activation="tanh"),
                             layers.Dense(recipe.num_classes, dtype="float32", kernel_regularizer="l2")])


def examples(count: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(seed)
    return source.normal(size=(count, 6)).astype(np.float32), source.integers(0, 3, count)


def run(recipe: Recipe, batches: list, *, build_model=linear, optimizer=None, augment=None, together: int = 1,
        stop: float = 0.0):
    """Train on the batches (inputs, labels, weights), some per call; return model, optimizer and each step's sums."""
    model = build(recipe, build_model)
    optimizer = optimizer or build_optimizer(recipe, steps_per_epoch=10, size=1)
    optimizer.build(model.trainable_variables)
    buffers = [np.stack([array] * together) for array in batches[0]]
    steps = compile_steps(model, optimizer, recipe, Serial(), block=Block(*buffers, [4]), augment=augment)
    sums = []
    for first in range(0, len(batches), together):
        some = batches[first:first + together]
        for buffer, arrays in zip(buffers, zip(*some, strict=True), strict=True):
            buffer[:len(some)] = arrays
        found = steps(*map(tf.constant, buffers), tf.constant([7, first]), tf.constant(stop), tf.constant(len(some)))
        sums += list(found.numpy()[:len(some)])
    return model, optimizer, sums


def even(inputs, labels) -> tuple:
    return inputs, labels, np.full(len(labels), 1 / len(labels), np.float32)


def by_hand(weights: list, inputs, labels, *, smoothing: float = 0.0) -> tuple[float, np.ndarray, np.ndarray]:
    """Return loss and gradients of softmax regression, in float64."""
    kernel, bias = (weight.astype(np.float64) for weight in weights)
    scores = inputs @ kernel + bias
    probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    target = np.eye(3)[labels] * (1 - smoothing) + smoothing / 3
    loss = -(target * np.log(probabilities)).sum(axis=1).mean()
    error = (probabilities - target) / len(labels)
    return loss, inputs.T @ error, error.sum(axis=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_update_are_the_formula_s(smoothing):
    recipe = RECIPE.override({"label_smoothing": str(smoothing)})
    before = build(recipe, linear).get_weights()
    inputs, labels = examples(4)
    loss, *gradients = by_hand(before, inputs, labels, smoothing=smoothing)
    model, _, sums = run(recipe, [even(inputs, labels)])
    assert sums[0][0] == pytest.approx(loss, rel=1e-5)
    right = (inputs @ before[0] + before[1]).argmax(axis=1) == labels
    assert sums[0][1:].tolist() == [right.sum(), 0]
    for old, new, gradient in zip(before, model.get_weights(), gradients, strict=True):
        np.testing.assert_allclose(new, old - 0.5 * gradient, atol=1e-6)


@pytest.mark.parametrize("limit", [0.01, 1000.0])
def test_clipping_shortens_the_whole_gradient_and_keeps_its_direction(limit):
    recipe = RECIPE.override({"clip_norm": str(limit)})
    before = build(recipe, linear).get_weights()
    inputs, labels = examples(4)
    _, *gradients = by_hand(before, inputs, labels)
    factor = min(1, limit / math.sqrt(sum(np.square(gradient).sum() for gradient in gradients)))
    model, _, _ = run(recipe, [even(inputs, labels)])
    for old, new, gradient in zip(before, model.get_weights(), gradients, strict=True):
        np.testing.assert_allclose(new, old - 0.5 * factor * gradient, atol=1e-6)


def test_padding_has_no_influence():
    inputs, labels = examples(4)
    weights = np.array([1 / 3, 1 / 3, 1 / 3, 0], np.float32)
    found = []
    for filler in (0.0, 1e6):
        inputs[3], labels[3] = filler, int(filler) % 3
        model, _, sums = run(RECIPE, [(inputs, labels, weights)], build_model=two_layers)
        found.append((sums[0].tobytes(), [weight.tobytes() for weight in model.get_weights()]))
    assert found[0] == found[1]
    loss, *_ = by_hand(build(RECIPE, linear).get_weights(), inputs[:3], labels[:3])
    assert run(RECIPE, [(inputs, labels, weights)])[2][0][0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_parts_equal_one_batch(parts):
    batches = [even(*examples(4 * parts, seed)) for seed in range(3)]
    # The last step is padded, as an epoch's last one is.
    batches[2][2][:] = [1 / 5] * 5 + [0] * (4 * parts - 5)
    changes = {"optimizer": "adam", "learning_rate": "0.01", "label_smoothing": "0.1", "clip_norm": "0.1"}
    whole = run(RECIPE.override(changes | {"batch_size": str(4 * parts)}), batches, build_model=two_layers)
    split = run(RECIPE.override(changes | {"accumulation_steps": str(parts)}), batches, build_model=two_layers)
    np.testing.assert_allclose(split[2], whole[2], rtol=1e-5)
    for one, other in zip(split[0].get_weights(), whole[0].get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_augmentation_sees_the_step_s_seed():
    seen = []

    def augment(inputs, seed):
        tf.py_function(lambda value: seen.append(value.numpy().tolist()), [seed], [])
        return inputs * 0.0

    inputs, labels = examples(4)
    _, _, sums = run(RECIPE, [even(inputs, labels)] * 2, augment=augment)
    assert seen == [[7, 0], [7, 1]]
    assert sums[0][0] == pytest.approx(math.log(3), rel=1e-5)


@pytest.mark.parametrize("stop", [0.0, 1.0])
def test_the_wish_to_stop_comes_back_with_the_sums(stop):
    _, _, sums = run(RECIPE, [even(*examples(4))] * 3, stop=stop, together=3)
    assert [row[2] for row in sums] == [stop] * 3


@pytest.mark.parametrize("together", [2, 3, 7])
def test_steps_in_a_row_change_no_bit(together):
    """With everything that is random or has a state: dropout, augmentation, momenta, a schedule."""
    def augment(inputs, seed):
        return inputs + tf.random.stateless_normal(tf.shape(inputs), seed, stddev=0.1)

    def build_model(recipe):
        return keras.Sequential([keras.Input(recipe.input_shape), layers.Dense(8), layers.BatchNormalization(),
                                 layers.Dropout(0.5), layers.Dense(recipe.num_classes)])

    recipe = RECIPE.override({"optimizer": "adam", "schedule": "cosine", "warmup_epochs": "0.5", "clip_norm": "1"})
    batches = [even(*examples(4, seed)) for seed in range(7)]
    alone, _, sums = run(recipe, batches, build_model=build_model, augment=augment)
    model, _, others = run(recipe, batches, build_model=build_model, augment=augment, together=together)
    np.testing.assert_array_equal(others, sums)
    for one, other in zip(alone.variables, model.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=one.path)


def test_bfloat16_trains_float32_variables(precision):
    precision("mixed_bfloat16")
    inputs, labels = examples(64)
    recipe = RECIPE.override({"batch_size": "64"})
    model, optimizer, sums = run(recipe, [even(inputs, labels)] * 20, build_model=two_layers)
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    assert model.layers[0].compute_dtype == "bfloat16"
    assert not isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    assert sums[-1][0] < 0.9 * sums[0][0]


def test_float16_scales_the_loss_and_skips_a_step_that_overflows(precision):
    precision("mixed_float16")
    recipe = RECIPE.override({"learning_rate": "0.1"})
    inputs, labels = examples(4)
    before = build(recipe, two_layers).get_weights()
    plain = build_optimizer(recipe, steps_per_epoch=10, size=1)
    assert isinstance(plain, keras.optimizers.LossScaleOptimizer)
    # A float16 gradient ends at 65504: with this scale the first step cannot be applied.
    optimizer = keras.optimizers.LossScaleOptimizer(plain.inner_optimizer, initial_scale=2.0**40)
    model, _, sums = run(recipe, [even(inputs, labels)], build_model=two_layers, optimizer=optimizer)
    assert all(np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))
    assert math.isfinite(sums[0][0])
    assert float(optimizer.dynamic_scale) == 2.0**39
    assert int(optimizer.inner_optimizer.iterations) == 0
    model, optimizer, sums = run(recipe, [even(inputs, labels)] * 15, build_model=two_layers)
    assert sums[-1][0] < sums[0][0]
    assert int(optimizer.iterations) == 15
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
