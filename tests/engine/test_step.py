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
from hpcai_cli.engine.step import HALT, Wishes, build_optimizer, compile_steps, mixed
from hpcai_cli.engine.task import class_weights
from hpcai_cli.errors import UsageError
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
        wishes: Wishes | None = None, weight_of_class=None):
    """Train on the batches (inputs, labels, weights), some per call; return model, optimizer and each step's sums."""
    model = build(recipe, build_model)
    optimizer = optimizer or build_optimizer(recipe, steps_per_epoch=10, size=1)
    optimizer.build(model.trainable_variables)
    buffers = [np.stack([array] * together) for array in batches[0]]
    steps = compile_steps(model, optimizer, recipe, Serial(), block=Block(*buffers, [4]), augment=augment,
                          weight_of_class=weight_of_class, wishes=wishes)
    sums = []
    for first in range(0, len(batches), together):
        some = batches[first:first + together]
        for buffer, arrays in zip(buffers, zip(*some, strict=True), strict=True):
            buffer[:len(some)] = arrays
        found = steps(*map(tf.constant, buffers), tf.constant([7, first]), tf.constant(len(some)))
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
    assert sums[0][1:].tolist() == [right.sum(), 0, 0, 0]
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


def test_augmentation_may_branch_on_what_it_sees():
    """AutoGraph makes a graph of it, though not of our own code."""
    def augment(inputs, seed):
        if seed[1] > 0:  # noqa: SIM108
            inputs = inputs * 0.0
        else:
            inputs = inputs + 1.0
        return inputs

    batches = [even(*examples(4))] * 2
    _, _, sums = run(RECIPE, batches, augment=augment)
    (inputs, *others), _ = batches
    _, _, plain = run(RECIPE, [[inputs + 1.0, *others], [inputs * 0.0, *others]])
    np.testing.assert_array_equal(sums, plain)


def test_no_step_follows_the_one_in_which_the_wish_to_stop_is_seen():
    wishes = Wishes()
    _, _, sums = run(RECIPE, [even(*examples(4))] * 3, wishes=wishes, together=3)
    assert [row[2:].tolist() for row in sums] == [[0, 0, 0]] * 3
    wishes.stop.assign(1.0)
    _, optimizer, sums = run(RECIPE, [even(*examples(4))] * 6, wishes=wishes, together=3)
    assert [row[2] for row in sums] == [1, 0, 0, 0, 0, 0]
    assert not any(row.any() for row in sums[1:])
    assert int(optimizer.iterations) == 1


def test_no_step_follows_the_one_in_which_ranks_are_seen_to_wait():
    wishes = Wishes()
    wishes.commit.assign(1.0)
    _, optimizer, sums = run(RECIPE, [even(*examples(4))] * 3, wishes=wishes, together=3)
    assert [row[4] for row in sums] == [1, 1, 1], "a commit alone ends nothing"
    wishes.commit.assign(HALT)
    _, optimizer, sums = run(RECIPE, [even(*examples(4))] * 6, wishes=wishes, together=3)
    assert [row[4] for row in sums] == [HALT, 0, 0, 0, 0, 0]
    assert int(optimizer.iterations) == 1
    wishes.begin()
    _, optimizer, _ = run(RECIPE, [even(*examples(4))] * 3, wishes=wishes, together=3)
    assert int(optimizer.iterations) == 3


def test_the_wish_for_a_checkpoint_ends_nothing():
    wishes = Wishes()
    wishes.save.assign(1.0)
    _, optimizer, sums = run(RECIPE, [even(*examples(4))] * 3, wishes=wishes, together=3)
    assert [row[2:].tolist() for row in sums] == [[0, 1, 0]] * 3
    assert int(optimizer.iterations) == 3


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


# ---- Weights of the classes, mixup, numbers ------------------------------------------------------------------------

def test_class_weights_make_the_loss_a_weighted_mean():
    """An example of weight 3 counts like three of it; the gradient follows."""
    inputs, labels = examples(8)
    weights = np.array([0.5, 1.0, 3.0], np.float32)
    before = build(RECIPE, linear).get_weights()
    recipe = RECIPE.override({"batch_size": "8"})
    model, _, sums = run(recipe, [even(inputs, labels)], weight_of_class=weights)
    losses = [by_hand(before, inputs[place:place + 1], labels[place:place + 1])[0] for place in range(8)]
    assert sums[0][0] == pytest.approx((weights[labels] * losses).mean(), rel=1e-5)
    plain = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    plain.set_weights(before)
    plain.compile(keras.optimizers.SGD(0.5), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    plain.fit(inputs, labels, batch_size=8, epochs=1, shuffle=False, verbose=0,
              class_weight=dict(enumerate(weights.tolist())))
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_balanced_classes_weigh_the_same_together():
    recipe = RECIPE.override({"class_weights": "balanced", "batch_size": "8"})
    inputs, labels = examples(8)
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 2])
    before = build(RECIPE, linear).get_weights()
    _, _, sums = run(recipe, [even(inputs, labels)], weight_of_class=class_weights(recipe, labels))
    by_class = [by_hand(before, inputs[labels == number], labels[labels == number])[0] for number in range(3)]
    assert sums[0][0] == pytest.approx(np.mean(by_class), rel=1e-5)


def test_mixed_examples_are_mixtures_of_two_and_mostly_their_own():
    inputs = np.random.default_rng(0).integers(0, 256, (500, 3, 2, 1), dtype=np.uint8)
    found, share = (tensor.numpy() for tensor in mixed(tf.constant(inputs), tf.constant([1, 2]), alpha=0.3))
    assert 0.5 <= share.min() < 0.52 and 0.98 < share.max() <= 1
    place = share[:, None, None, None]
    np.testing.assert_allclose(found, place * inputs + (1 - place) * np.roll(inputs, 1, axis=0), atol=1e-3)
    # The larger of x and 1 - x, of Beta(0.3, 0.3).
    draws = np.random.default_rng(0).beta(0.3, 0.3, 100_000)
    assert share.mean() == pytest.approx(np.maximum(draws, 1 - draws).mean(), abs=0.02)
    again, _ = mixed(tf.constant(inputs), tf.constant([1, 2]), alpha=0.3)
    np.testing.assert_array_equal(again, found)
    other, _ = mixed(tf.constant(inputs), tf.constant([1, 3]), alpha=0.3)
    assert not np.array_equal(other, found)


@pytest.mark.parametrize("alpha", [1e-6, 0.01, 10.0])
def test_any_strength_of_mixup_gives_numbers(alpha):
    inputs, share = mixed(tf.ones((300, 2)), tf.constant([1, 2]), alpha=alpha)
    assert np.isfinite(inputs).all()
    assert 0.5 <= share.numpy().min() <= share.numpy().max() <= 1


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_mixup_is_the_mixture_of_two_losses(weighted):
    recipe = RECIPE.override({"mixup": "0.8", "label_smoothing": "0.1", "batch_size": "8"})
    weight_of_class = np.array([0.5, 1.0, 3.0], np.float32) if weighted else None
    inputs, labels = examples(8)
    before = build(RECIPE, linear).get_weights()
    _, _, sums = run(recipe, [even(inputs, labels)], weight_of_class=weight_of_class)
    # The seed of the first step, as the test's `run` gives it.
    blended, share = (tensor.numpy().astype(np.float64) for tensor in
                      mixed(tf.constant(inputs), tf.constant([7, 0]), alpha=0.8))
    others, total = np.roll(labels, 1), 0.0
    for place in range(8):
        for label, part in ((labels[place], share[place]), (others[place], 1 - share[place])):
            loss, *_ = by_hand(before, blended[place:place + 1], np.array([label]), smoothing=0.1)
            total += part * loss * (weight_of_class[label] if weighted else 1) / 8
    assert sums[0][0] == pytest.approx(total, rel=1e-5)
    right = (blended @ before[0] + before[1]).argmax(axis=1) == labels
    assert sums[0][1] == right.sum()


def test_mixup_with_accumulation_and_a_padded_step():
    recipe = RECIPE.override({"mixup": "0.4", "accumulation_steps": "2"})
    inputs, labels = examples(8)
    weights = np.array([1 / 5] * 5 + [0] * 3, np.float32)
    model, _, sums = run(recipe, [(inputs, labels, weights)])
    again, _, same = run(recipe, [(inputs, labels, weights)])
    assert math.isfinite(sums[0][0]) and sums[0].tolist() == same[0].tolist()
    assert 0 <= sums[0][1] <= 5
    for one, other in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("mixup", ["0", "0.4"])
def test_a_number_is_fitted_by_its_squared_error(mixup):
    recipe = Recipe(name="line", summary="", input_shape=(6,), task="regression", inputs="features", batch_size=8,
                    optimizer="sgd", learning_rate=0.1, momentum=0.0, schedule="constant").override({"mixup": mixup})
    inputs, _ = examples(8)
    labels = (inputs @ np.arange(6) + 5).astype(np.float32)

    def build_model(recipe):
        return keras.Sequential([keras.Input((6,)), layers.Dense(1)])

    before = build(recipe, build_model).get_weights()
    model, _, sums = run(recipe, [even(inputs, labels)], build_model=build_model)
    targets = labels
    if mixup != "0":
        inputs, share = (tensor.numpy() for tensor in mixed(tf.constant(inputs), tf.constant([7, 0]), alpha=0.4))
        targets = share * labels + (1 - share) * np.roll(labels, 1)
    predicted = (inputs @ before[0] + before[1])[:, 0]
    assert sums[0][1] == pytest.approx(np.abs(predicted - labels).sum(), rel=1e-4)
    if mixup == "0":
        assert sums[0][0] == pytest.approx(np.square(predicted - labels).mean(), rel=1e-4)
    # The gradient of a mixture of two squares is that of the square to the mixture of the two.
    error = 2 * (predicted - targets) / 8
    np.testing.assert_allclose(model.get_weights()[0][:, 0], before[0][:, 0] - 0.1 * inputs.T @ error, atol=1e-4)
    np.testing.assert_allclose(model.get_weights()[1], before[1] - 0.1 * error.sum(), atol=1e-4)


# ---- What is wrong with an augmentation ----------------------------------------------------------------------------

def raises(inputs, seed):
    raise ValueError("no such change\nand a second line")


def refuses(inputs, seed):
    raise UsageError("crop is too large", expected="at most 6", received=7)


@pytest.mark.parametrize(("augment", "words"), [
    (raises, "ValueError: no such change"), (refuses, "crop is too large; expected at most 6; received: 7"),
    (lambda inputs, seed: inputs[:, :4], "received: "), (lambda inputs, seed: None, "received: ")],
    ids=["raises", "refuses", "other shape", "nothing"])
def test_an_augmentation_that_fails_is_told_in_one_line(augment, words):
    with pytest.raises(UsageError) as caught:
        run(RECIPE, [even(*examples(4))], augment=augment)
    assert words in str(caught.value)
    assert "in user code" not in str(caught.value)
    assert "\n" not in str(caught.value)
