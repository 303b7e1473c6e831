"""A recipe's model: what is wrong with it is said before any training, and its state goes out and in unchanged."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import layers

from hpcai_cli.engine import model as subject
from hpcai_cli.errors import DataError, MissingError, UsageError
from hpcai_cli.recipe import Recipe

RECIPE = Recipe(name="tiny", summary="", input_shape=(4, 4, 1), num_classes=3, seed=11)


def dense(recipe: Recipe, *, units: int = 5) -> keras.Model:
    return keras.Sequential([keras.Input(recipe.input_shape), layers.Flatten(), layers.Dense(units),
                             layers.Dropout(0.5), layers.Dense(recipe.num_classes)])


def test_the_seed_decides_the_weights():
    first, second = (subject.build(RECIPE, dense).get_weights() for _ in range(2))
    other = subject.build(RECIPE.override({"seed": "12"}), dense).get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_a_model_without_an_input_is_built():
    model = subject.build(RECIPE, lambda recipe: keras.Sequential([layers.Flatten(), layers.Dense(3)]))
    assert model.count_params() == 51


def raises(recipe):
    raise ValueError("architecture is compact or tutorial\nand a second line")


def returns(*body, shape=(4, 4, 1)):
    return lambda recipe: keras.Sequential([keras.Input(shape), *body])


def two_outputs(recipe):
    image = keras.Input(recipe.input_shape)
    flat = layers.Flatten()(image)
    return keras.Model(image, [layers.Dense(3)(flat), layers.Dense(3)(flat)])


@pytest.mark.parametrize(("build_model", "words"), [
    (raises, "build_model fails; expected a Keras model; "
             "received: 'ValueError: architecture is compact or tutorial'"),
    (lambda recipe: None, "build_model gives no model; expected a keras.Model; received: 'NoneType'"),
    (lambda recipe: layers.Dense(3), "build_model gives no model; expected a keras.Model; received: 'Dense'"),
    (returns(layers.Flatten(), layers.Dense(3), shape=(5, 5, 1)), "does not take its input_shape (4, 4, 1)"),
    (returns(layers.Flatten(), layers.Dense(4)), "another shape; expected (3,), one logit per class; received: (4,)"),
    (returns(layers.Dense(3)), "gives outputs of another shape; expected (3,), one logit per class; "
                               "received: (4, 4, 3)"),
    (returns(layers.Flatten(), layers.Dense(3, trainable=False)), "has nothing to train"),
    (two_outputs, "gives outputs of another shape; expected (3,), one logit per class; received: 'list'"),
])
def test_what_is_wrong_with_a_model_is_said_in_one_line(build_model, words):
    with pytest.raises(UsageError) as caught:
        subject.build(RECIPE, build_model)
    assert str(caught.value).startswith("recipe tiny: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_state_goes_out_and_in_again():
    model, twin = subject.build(RECIPE, dense), subject.build(RECIPE.override({"seed": "1"}), dense)
    optimizers = [keras.optimizers.Adam(0.01) for _ in range(2)]
    for owner, optimizer in zip((model, twin), optimizers, strict=True):
        optimizer.build(owner.trainable_variables)
    gradients = [np.ones(variable.shape, np.float32) for variable in model.trainable_variables]
    optimizers[0].apply(gradients, model.trainable_variables)
    model(np.ones((2, 4, 4, 1), np.float32), training=True)
    values = subject.arrays(model, optimizers[0])
    subject.restore(values, twin, optimizers[1])
    found = subject.arrays(twin, optimizers[1])
    assert list(found) == list(values)
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    # Dropout's generator goes on where the other one stood.
    image = np.ones((2, 4, 4, 1), np.float32)
    np.testing.assert_array_equal(model(image, training=True), twin(image, training=True))


def test_values_of_another_model_are_refused():
    model = subject.build(RECIPE, dense)
    other = subject.build(RECIPE, lambda recipe: dense(recipe, units=6))
    optimizer = keras.optimizers.SGD()
    optimizer.build(other.trainable_variables)
    with pytest.raises(DataError, match=r"of another model: .*kernel does not fit; expected shape \(16, 5\).*"
                                        r"received: \(16, 6\)"):
        subject.restore(subject.arrays(other, optimizer), model)
    with pytest.raises(DataError, match="received: None"):
        subject.restore({}, model)


def test_each_rank_draws_dropout_masks_of_its_own():
    image, masks = np.ones((1, 4, 4, 1), np.float32), []
    for rank in range(3):
        model = subject.build(RECIPE, lambda recipe: keras.Sequential(
            [layers.Flatten(), layers.Dropout(0.5), layers.Dense(3, name="scores"), layers.Dropout(0.5)]))
        before = [variable.numpy() for variable in model.variables]
        subject.spread_random_state(model, rank)
        changed = [variable.path for variable, old in zip(model.variables, before, strict=True)
                   if not np.array_equal(variable.numpy(), old)]
        assert len(changed) == (2 if rank else 0)
        assert not any("scores" in path for path in changed)
        masks.append(np.asarray(model.layers[1](np.ones((1, 200), np.float32), training=True)) > 0)
        assert model(image, training=True).shape == (1, 3)
    assert all(0.3 < (masks[a] == masks[b]).mean() < 0.7 for a, b in ((0, 1), (0, 2), (1, 2)))


# ---- One output ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("settings", "units", "right"), [
    ({"num_classes": 2}, 1, True), ({"num_classes": 2}, 2, True), ({"num_classes": 3}, 1, False),
    ({"num_classes": 0, "task": "regression"}, 1, True), ({"num_classes": 0, "task": "regression"}, 2, False)])
def test_two_classes_may_have_one_logit_and_a_number_has_one(settings, units, right):
    recipe = dataclasses.replace(RECIPE, **settings)
    build_model = returns(layers.Flatten(), layers.Dense(units))
    if right:
        assert subject.build(recipe, build_model).output_shape == (None, units)
        return
    with pytest.raises(UsageError, match=rf"another shape; expected \(.*; received: \({units},\)"):
        subject.build(recipe, build_model)


# ---- adapt ---------------------------------------------------------------------------------------------------------

def test_what_adapt_is_given_is_what_was_asked_for():
    model, seen = subject.build(RECIPE, dense), []
    subject.adapt(RECIPE, model, lambda *given: seen.append(given), "inputs", "labels")
    assert seen == [(model, "inputs", "labels", RECIPE)]
    subject.adapt(RECIPE, model, None, "inputs", "labels")


def test_an_adapt_that_fails_is_told_in_one_line():
    def fails(*_):
        raise KeyError("layers\nand more")

    with pytest.raises(UsageError, match="^recipe tiny: adapt fails; expected a change of the model's weights; "
                                         "received: .*KeyError") as caught:
        subject.adapt(RECIPE, None, fails, None, None)
    assert "\n" not in str(caught.value)

    def lacks(*_):
        raise MissingError("no weights", received="imagenet")

    with pytest.raises(MissingError, match="^no weights; received: 'imagenet'$"):
        subject.adapt(RECIPE, None, lacks, None, None)


def test_statistics_that_were_assigned_are_used():
    """Keras computes with what its Normalization kept beside its variables, until it is told."""
    def build_model(recipe):
        inner = keras.Sequential([keras.Input((4,)), layers.Normalization()])
        return keras.Sequential([keras.Input(recipe.input_shape), layers.Flatten(), layers.Dense(4), inner,
                                 layers.Dense(3)])

    recipe = dataclasses.replace(RECIPE, input_shape=(4,))
    one, other = (subject.build(recipe, build_model) for _ in range(2))
    rows = np.random.default_rng(0).normal(5, 3, (50, 4)).astype(np.float32)
    normalization = one.layers[2].layers[0]
    normalization.adapt(rows)
    np.testing.assert_allclose(normalization(rows), (rows - rows.mean(axis=0)) / rows.std(axis=0), atol=1e-4)
    for variable, value in zip(other.variables, one.variables, strict=True):
        variable.assign(value)
    subject.settle_statistics(other)
    np.testing.assert_array_equal(other(rows), one(rows))


def test_moving_statistics_are_what_trains_without_a_gradient():
    def with_norms(recipe):
        frozen = keras.Sequential([layers.Dense(4, name="frozen"), layers.BatchNormalization(name="frozen_norm")],
                                  name="pretrained", trainable=False)
        return keras.Sequential([keras.Input(recipe.input_shape), layers.Flatten(), frozen,
                                 layers.BatchNormalization(name="norm"), layers.Dropout(0.5), layers.Dense(3)])

    found = subject.moving_statistics(subject.build(RECIPE, with_norms))
    assert [variable.path.partition("norm/")[2] for variable in found] == ["moving_mean", "moving_variance"]
