"""Which layers are split: pairs of dense layers, wide ones alone, and nothing that takes a number's neighbors."""

import keras
import pytest
from keras import layers

from hpcai_cli.engine.split_plan import plan


def sequential(*body):
    return keras.Sequential([keras.Input((8,)), *body, layers.Dense(3, name="last")])


def wide(name: str = "wide", units: int = 128, **settings):
    return layers.Dense(units, name=name, **settings)


def found(model: keras.Model, parts: int = 2) -> list[str]:
    return [f"{each.name} {each.kind.__name__}" for each in plan(model, (8,), parts)]


@pytest.mark.parametrize("between", [
    [], [layers.Activation("gelu")], [layers.ReLU()], [layers.LeakyReLU(), layers.ELU(), layers.Identity()]])
def test_two_dense_layers_are_a_pair(between):
    assert found(sequential(wide(), *between)) == ["wide ColumnDense", "last RowDense"]
    assert found(sequential(wide("first", activation="relu"), *between, wide("second"), layers.Softmax())) == [
        "first ColumnDense", "second RowDense"]


def test_dropout_in_a_pair_is_split_too():
    model = sequential(layers.Dropout(0.2), wide(), layers.Dropout(0.5, name="within"))
    assert found(model) == ["wide ColumnDense", "within PartDropout", "last RowDense"]


@pytest.mark.parametrize("between", [
    layers.Softmax(), layers.Activation("softmax"), layers.BatchNormalization(), layers.LayerNormalization(),
    layers.Dropout(0.5, noise_shape=(None, 1)), layers.PReLU(), layers.Activation(lambda x: x),
    layers.ReLU(activity_regularizer="l2"), layers.Reshape((128,))])
def test_what_takes_neighbors_or_is_not_known_gets_all_outputs(between):
    assert found(sequential(wide(), between)) == ["wide GatheredDense"]


@pytest.mark.parametrize("changes", [
    {"units": 127}, {"units": 130, "activation": lambda x: x}, {"units": 64}, {"activation": "softmax"},
    {"kernel_constraint": "non_neg"}, {"activity_regularizer": "l2"}, {"kernel_regularizer": "orthogonal_regularizer"},
    {"trainable": False}, {"lora_rank": 2}])
def test_what_is_narrow_or_taken_as_a_whole_is_left_alone(changes):
    assert found(sequential(wide(**changes))) == []


def test_the_least_width_grows_with_the_parts():
    assert found(sequential(wide(units=192)), parts=3) == ["wide ColumnDense", "last RowDense"]
    assert found(sequential(wide(units=192)), parts=4) == []


class Own(layers.Dense):
    """A class of the user's own, which may compute anything."""


def test_a_class_of_the_user_s_own_is_left_alone():
    assert found(sequential(Own(128))) == []
    assert found(sequential(wide(), Own(8))) == ["wide GatheredDense"]


def test_in_a_graph_a_pair_has_one_reader():
    inputs = keras.Input((8,))
    first = wide("first")(inputs)
    second = wide("second")(first)
    both = keras.Model(inputs, layers.Dense(3, name="last")(layers.Add()([first, second])))
    assert found(both) == ["first GatheredDense", "second GatheredDense"]
    shared = wide("shared", units=128)
    body = keras.Sequential([keras.Input((128,)), wide("inner", activation="tanh")], name="body")
    outputs = layers.Dense(3, name="last")(body(shared(shared(wide("in")(inputs)))))
    assert found(keras.Model(inputs, outputs)) == ["in GatheredDense", "body/inner ColumnDense", "last RowDense"]


def test_a_model_with_code_of_its_own_is_not_known():
    class Network(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = wide()

        def call(self, inputs):
            return self.dense(inputs)

    assert found(Network()) == []
