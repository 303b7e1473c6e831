"""What a model costs: counted by hand for each kind of layer, in any nesting and for any size."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import layers

from hpcai_cli import catalog
from hpcai_cli.engine import model as models
from hpcai_cli.engine.compression.model_cost import calls, cost_of
from hpcai_cli.errors import DataError


@pytest.mark.parametrize(("layer", "shape", "macs"), [
    (layers.Dense(5), (7,), 7 * 5),
    (layers.Dense(5), (3, 7), 3 * 7 * 5),
    (layers.Conv1D(4, 3), (10, 2), 8 * 3 * 2 * 4),
    (layers.Conv2D(4, 3), (10, 8, 2), 8 * 6 * 9 * 2 * 4),
    (layers.Conv2D(4, 3, padding="same", strides=2), (9, 8, 2), 5 * 4 * 9 * 2 * 4),
    (layers.Conv2D(4, (1, 3), use_bias=False, dilation_rate=2), (5, 9, 2), 5 * 5 * 3 * 2 * 4),
    (layers.Conv2D(6, 3, groups=2), (5, 5, 4), 9 * 9 * 2 * 6),
    (layers.Conv2D(4, 3, data_format="channels_first"), (2, 10, 8), 8 * 6 * 9 * 2 * 4),
    (layers.Conv3D(2, 3), (4, 4, 4, 3), 8 * 27 * 3 * 2),
    (layers.DepthwiseConv2D(3), (10, 8, 5), 8 * 6 * 9 * 5),
    (layers.DepthwiseConv2D(3, depth_multiplier=2), (10, 8, 5), 8 * 6 * 9 * 10),
    (layers.DepthwiseConv1D(3), (10, 5), 8 * 3 * 5),
    (layers.SeparableConv2D(7, 3), (10, 8, 5), 8 * 6 * (9 * 5 + 5 * 7)),
    (layers.SeparableConv1D(7, 3, depth_multiplier=2), (10, 5), 8 * (3 * 10 + 10 * 7)),
    (layers.Conv2DTranspose(4, 3, strides=2), (5, 6, 2), 5 * 6 * 9 * 2 * 4),
    (layers.BatchNormalization(), (5, 6, 2), 0),
    (layers.MaxPooling2D(), (5, 6, 2), 0),
    (layers.Activation("relu"), (5,), 0),
])
def test_one_layer(layer, shape, macs):
    cost = cost_of(keras.Sequential([keras.Input(shape), layer]), shape)
    assert (cost.macs, cost.parameters) == (macs, layer.count_params())
    assert cost.uncounted == ()
    row, = cost.layers
    assert (row.name, row.kind, row.macs) == (layer.name, type(layer).__name__, macs)
    assert row.output_shape == tuple(layer.compute_output_shape((None, *shape)))[1:]


def test_the_tutorials_mnist():
    entry = catalog.find("mnist")
    recipe = entry.recipe.override({"architecture": "tutorial"})
    cost = cost_of(models.build(recipe, entry.function("build_model")), (28, 28, 1))
    assert cost.macs == 26 * 26 * 32 * 9 + 26 * 26 * 32 * 128 + 128 * 10
    assert cost.parameters == 32 * 10 + (26 * 26 * 32 + 1) * 128 + 129 * 10
    assert [row.kind for row in cost.layers] == ["Rescaling", "Conv2D", "Flatten", "Dense", "Dense"]
    assert sum(row.macs for row in cost.layers) == cost.macs
    assert sum(row.parameters for row in cost.layers) == cost.parameters


def test_an_open_size_is_the_one_that_is_given():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalMaxPooling2D()(layers.Conv2D(4, 3)(inputs))))
    assert cost_of(model, (12, 8, 3)).macs == 10 * 6 * 27 * 4 + 8
    assert cost_of(model, (5, 5, 3)).macs == 9 * 27 * 4 + 8
    assert cost_of(model, (12, 8, 3)).layers[0].output_shape == (10, 6, 4)


def test_layers_of_nested_models_have_their_path_as_a_name():
    block = keras.Sequential([keras.Input((8,)), layers.Dense(6, name="wide"), layers.Dense(8, name="narrow")],
                             name="block")
    image = keras.Input((8,))
    body = keras.Model(image, layers.Add()([image, block(image)]), name="body")
    cost = cost_of(keras.Sequential([keras.Input((8,)), body, layers.Dense(2, name="answer")]), (8,))
    assert [row.name for row in cost.layers if row.macs] == ["body/block/wide", "body/block/narrow", "answer"]
    assert cost.macs == 8 * 6 + 6 * 8 + 8 * 2


def test_a_shared_layer_is_computed_twice_and_stored_once():
    image, dense = keras.Input((8,)), layers.Dense(8)
    cost = cost_of(keras.Model(image, dense(dense(image))), (8,))
    assert cost.macs == 2 * 64
    assert cost.parameters == 72
    assert [row.macs for row in cost.layers] == [128]


def test_sparsity_counts_kernels_only():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(10, name="half"), layers.BatchNormalization(),
                              layers.Dense(5, name="full")])
    kernel = np.ones((4, 10))
    kernel[:, ::2] = 0
    model.get_layer("half").set_weights([kernel, np.zeros(10)])
    cost = cost_of(model, (4,))
    assert [row.sparsity for row in cost.layers] == [0.5, None, 0.0]
    assert cost.sparsity == 20 / 90


class Doubled(layers.Layer):
    def call(self, inputs):
        return inputs * 2


@pytest.mark.parametrize("layer", [
    layers.LSTM(3, return_sequences=True, name="odd"), Doubled(name="odd"),
    layers.TimeDistributed(layers.Dense(4), name="odd"), layers.Bidirectional(layers.GRU(2), name="odd")])
def test_what_is_not_known_is_named_and_counts_nothing(layer):
    model = keras.Sequential([keras.Input((6, 4)), layer, layers.Flatten(), layers.Dense(2)])
    cost = cost_of(model, (6, 4))
    assert cost.uncounted == ("odd",)
    assert cost.layers[0].macs == 0
    assert cost.macs == cost.layers[-1].macs > 0
    assert cost.parameters == model.count_params()


def test_operations_and_attention_are_named():
    tokens = keras.Input((6, 4))
    attention = layers.MultiHeadAttention(2, 2, name="attention")(tokens, tokens)
    product = keras.ops.matmul(attention, keras.ops.transpose(tokens, (0, 2, 1)))
    cost = cost_of(keras.Model(tokens, product), (6, 4))
    assert cost.uncounted[0] == "attention"
    assert len(cost.uncounted) == 3
    assert cost.macs == 0


def test_a_model_of_a_class_of_its_own_is_one_unknown_layer():
    class Own(keras.Model):
        def __init__(self):
            super().__init__(name="own")
            self.dense = layers.Dense(3)

        def call(self, inputs):
            return self.dense(inputs)

    model = Own()
    model(np.zeros((1, 5), np.float32))
    cost = cost_of(model, (5,))
    assert (cost.parameters, cost.macs, cost.uncounted) == (18, 0, ("own",))


def test_the_model_stays_as_it_was():
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, layers.Dense(2)(layers.Flatten()(layers.Conv2D(4, 3, name="conv")(image))))
    before = model.get_weights()
    cost_of(model, (8, 8, 3))
    # A second node would leave the layer without an output of its own.
    assert model.get_layer("conv").output.shape == (None, 6, 6, 4)
    assert all(np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))


def test_the_calls_end_with_the_model():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(3), layers.Dense(2)])
    found = calls(model, (8,))
    assert found[-1].layer is model
    assert [call.layer for call in found[:-1]] == model.layers
    assert found[-1].outputs[0] is found[-2].outputs[0]


def test_it_goes_into_json():
    cost = cost_of(keras.Sequential([keras.Input((8,)), layers.Dense(3, name="dense")]), (8,))
    document = json.loads(json.dumps(dataclasses.asdict(cost)))
    assert document["layers"] == [{"name": "dense", "kind": "Dense", "output_shape": [3], "parameters": 27, "macs": 24,
                                   "sparsity": 0.0}]


@pytest.mark.parametrize("shape", [(28, 28, 3), (28, 28), (20, 28, 1), ()])
def test_inputs_of_another_shape_are_refused(shape):
    model = keras.Sequential([keras.Input((28, 28, 1)), layers.Conv2D(4, 3)])
    with pytest.raises(DataError, match=r"takes other inputs; expected \(28, 28, 1\)"):
        cost_of(model, shape)


def test_inputs_that_are_too_small_are_refused():
    image = keras.Input((None, None, 1))
    model = keras.Model(image, layers.Conv2D(4, 5)(image))
    with pytest.raises(DataError, match="shapes within the model cannot be told") as caught:
        cost_of(model, (3, 3, 1))
    assert "\n" not in str(caught.value)


def test_several_inputs_are_refused():
    pair = [keras.Input((2,)), keras.Input((3,))]
    with pytest.raises(DataError, match=r"expected \(2,\) and \(3,\)"):
        cost_of(keras.Model(pair, layers.Concatenate()(pair)), (2,))
