"""A narrowed model computes what the original does without the channels that went, whatever the layers between."""

import keras
import numpy as np
import pytest
from keras import layers

from hpcai_cli import catalog
from hpcai_cli.engine import model as models
from hpcai_cli.engine import model_file
from hpcai_cli.engine.compression.model_cost import cost_of
from hpcai_cli.engine.compression.structured_pruning import narrowed
from hpcai_cli.errors import DataError, UsageError

RECIPES = [
    ("mnist", {}), ("mnist", {"architecture": "tutorial"}), ("mnist-mlp", {}), ("cifar10", {}),
    ("cifar10", {"architecture": "tutorial"}), ("dogs-vs-cats", {"width": 16}),
    ("dogs-vs-cats", {"architecture": "tutorial", "input_shape": "64,64,3"}),
    ("dogs-vs-cats-transfer", {"width": 0.35, "input_shape": "96,96,3"}),
    ("image-folder", {"input_shape": "64,64,3", "num_classes": 4}), ("shoppers", {"input_shape": 9}),
    ("table", {"input_shape": 9, "num_classes": 3}), ("table", {"input_shape": 9, "task": "regression"})]


def recipe_model(name: str, settings: dict) -> tuple[keras.Model, tuple[int, ...]]:
    entry = catalog.find(name)
    recipe = entry.recipe.override({key: str(value) for key, value in settings.items()})
    return models.build(recipe, entry.function("build_model")), recipe.input_shape


def seasoned(model: keras.Model) -> keras.Model:
    """Give biases and normalization values as a training leaves them: none of them what it began with."""
    source = np.random.default_rng(0)
    for variable in model.variables:
        if variable.name in ("gamma", "moving_variance"):
            # Small variances: fifty layers would leave nothing of the picture otherwise.
            variable.assign(source.uniform(0.5, 1.5, variable.shape) * (0.1 if variable.name[0] == "m" else 1))
        elif variable.name in ("beta", "bias", "moving_mean"):
            variable.assign(source.normal(0, 0.1, variable.shape))
    return model


def without(model: keras.Model, kept: dict[str, np.ndarray]) -> keras.Model:
    """Return the model as large as it was, with exact zeros in the channels that are not kept."""
    twin = keras.models.clone_model(model, clone_function=lambda layer: type(layer).from_config(layer.get_config()),
                                    recursive=True)
    twin.set_weights(model.get_weights())
    for path, stay in kept.items():
        layer = twin
        for name in path.split("/"):
            layer = layer.get_layer(name)
        for variable in layer.variables:
            axis = -2 if "Transpose" in type(layer).__name__ and variable.name == "kernel" else -1
            made = variable.name in ("bias", "gamma", "beta", "pointwise_kernel") or (
                variable.name == "kernel" and not isinstance(layer, layers.DepthwiseConv2D))
            if made:
                values = np.moveaxis(np.zeros(variable.shape, np.float32), axis, 0)
                values[stay] = np.moveaxis(variable.numpy(), axis, 0)[stay]
                variable.assign(np.moveaxis(values, 0, axis))
    return twin


def assert_same_answers(model: keras.Model, shape: tuple[int, ...], keep_macs: float):
    before = model.get_weights()
    smaller, report = narrowed(model, shape, keep_macs=keep_macs)
    inputs = np.random.default_rng(1).uniform(0, 255 if len(shape) > 1 else 1, (3, *shape)).astype(np.float32)
    expected = np.array(without(model, report.kept)(inputs, training=False))
    np.testing.assert_allclose(np.array(smaller(inputs, training=False)), expected, rtol=1e-4,
                               atol=1e-5 * np.abs(expected).max())
    assert np.ptp(expected) > 1e-3, "answers that are all the same prove nothing"
    assert all(np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))
    return smaller, report


@pytest.mark.parametrize(("name", "settings"), RECIPES)
def test_the_models_of_the_recipes(name, settings):
    model, shape = recipe_model(name, settings)
    smaller, report = assert_same_answers(seasoned(model), shape, 0.5)
    macs = cost_of(model, shape).macs, cost_of(smaller, shape).macs
    assert macs == (report.macs_before, report.macs_after)
    # Layers lose whole multiples of channels, so that a network of a few layers comes near the share, not upon it.
    assert 0.4 <= macs[1] / macs[0] <= 0.5
    assert report.left_alone == ()
    assert smaller.count_params() < model.count_params()
    assert smaller.output_shape == model.output_shape
    assert smaller.input_shape == model.input_shape
    rows = zip(cost_of(model, shape).layers, cost_of(smaller, shape).layers, strict=True)
    for old, new in rows:
        assert (old.name, old.kind) == (new.name, new.kind)
        if old.name in report.channels:
            assert report.channels[old.name] == (old.output_shape[-1], new.output_shape[-1])
            assert len(report.kept[old.name]) == new.output_shape[-1] >= old.output_shape[-1] / 8


def squeeze_and_excite(x):
    gate = layers.Reshape((1, 1, x.shape[-1]))(layers.GlobalAveragePooling2D()(x))
    gate = layers.Conv2D(8, 1, activation="relu")(gate)
    return layers.Multiply()([x, layers.Conv2D(x.shape[-1], 1, activation="sigmoid")(gate)])


def overlapping(x):
    """Two layers side by side are added to a third: each number of it belongs to one of the two."""
    pair = layers.Concatenate()([layers.Conv2D(8, 3, padding="same")(x), layers.Conv2D(8, 1)(x)])
    return layers.Add()([pair, layers.Conv2D(16, 3, padding="same")(x)])


def shared(x):
    x, again = layers.Conv2D(12, 1)(x), layers.Conv2D(12, 3, padding="same", activation="relu")
    return layers.Average()([again(x), again(again(x))])


def shared_without_weights(x):
    relu = layers.ReLU()
    return relu(layers.Conv2D(20, 3)(relu(layers.Conv2D(8, 3)(x))))


def nested(x):
    """A model in a model, which both get fewer channels than they were made for."""
    inner = keras.Sequential([keras.Input((None, None, 10)), layers.Conv2D(12, 3, padding="same"), layers.ReLU()])
    image = keras.Input((None, None, 8))
    outer = keras.Model(image, layers.Conv2D(9, 1)(inner(layers.Conv2D(10, 1)(image))))
    return outer(layers.Conv2D(8, 3, name="stem")(x))


def upwards(x):
    x = layers.Conv2DTranspose(12, 3, strides=2, use_bias=False)(layers.Conv2D(8, 3)(x))
    x = layers.PReLU(shared_axes=(1, 2))(layers.BatchNormalization()(x))
    return layers.Cropping2D(1)(layers.UpSampling2D()(layers.ZeroPadding2D()(x)))


TOPOLOGIES = {
    "squeeze and excite": lambda x: squeeze_and_excite(layers.Conv2D(16, 3)(x)),
    "overlapping additions": overlapping,
    "a shared layer": shared,
    "a shared activation": shared_without_weights,
    "nested models": nested,
    "transposed": upwards,
    "depthwise with a multiplier": lambda x: layers.DepthwiseConv2D(3, depth_multiplier=2)(layers.Conv2D(12, 3)(x)),
    "separable with a multiplier": lambda x: layers.SeparableConv2D(16, 3, depth_multiplier=2)(
        layers.Conv2D(12, 3)(x)),
    "PReLU with a slope for each pixel": lambda x: layers.PReLU(alpha_initializer="ones")(layers.Conv2D(12, 3)(x)),
    "concatenated along the height": lambda x: layers.Concatenate(axis=1)(
        [layers.Conv2D(12, 3)(x), layers.Conv2D(12, 3)(x)]),
    "one channel for all": lambda x: layers.Multiply()([layers.Conv2D(12, 1)(x), layers.Conv2D(1, 1)(x)]),
    "pixels as steps": lambda x: layers.Conv1D(10, 3, activation="tanh")(
        layers.Reshape((-1, 12))(layers.Conv2D(12, 3)(x))),
    "flattened by Reshape": lambda x: layers.Dense(30)(layers.Reshape((-1,))(layers.Conv2D(12, 3)(x))),
    "flattened by Reshape to a number": lambda x: layers.Reshape((30,))(layers.Dense(30)(layers.Flatten()(x))),
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_what_lies_between_convolutions(name):
    image = keras.Input((9, 8, 3))
    x = TOPOLOGIES[name](layers.Rescaling(1 / 255)(image))
    model = seasoned(keras.Model(image, layers.Dense(4, name="answer")(layers.Flatten()(x))))
    smaller, report = assert_same_answers(model, (9, 8, 3), 0.5)
    assert report.left_alone == ()
    assert report.macs_after <= 0.5 * report.macs_before
    assert report.channels
    assert "answer" not in report.channels


def test_a_layer_before_nested_models_becomes_narrower_too():
    image = keras.Input((9, 8, 3))
    model = keras.Model(image, layers.Dense(4)(layers.GlobalAveragePooling2D()(nested(image))))
    _, report = narrowed(model, (9, 8, 3), keep_macs=0.1)
    assert "stem" in report.channels
    assert any(name.count("/") == 2 for name in report.channels)


class Doubled(layers.Layer):
    def call(self, inputs):
        return inputs * 2


@pytest.mark.parametrize("layer", [
    layers.LayerNormalization(name="odd"), layers.Conv2D(16, 3, groups=4, name="odd"), Doubled(name="odd"),
    layers.Softmax(name="odd"), layers.Activation("softmax", name="odd"),
    layers.Conv2D(16, 1, data_format="channels_first", name="odd"), layers.BatchNormalization(axis=1, name="odd"),
    layers.Rescaling([1.0] * 15 + [2.0], name="odd"), layers.TimeDistributed(layers.Dense(3), name="odd")])
def test_a_layer_that_cannot_be_followed_is_named_and_keeps_all_channels(layer):
    image = keras.Input((10, 16, 3))
    x = layers.Conv2D(16, 3, padding="same", name="before")(layers.Conv2D(32, 3, padding="same", name="first")(image))
    x = layers.Conv2D(24, 1, name="behind")(layer(x))
    model = keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
    _, report = narrowed(model, (10, 16, 3), keep_macs=0.7)
    assert report.left_alone == ("odd",)
    assert "before" not in report.channels
    assert {"first", "behind"} & set(report.channels)


def test_an_activation_over_all_channels_keeps_them():
    model = keras.Sequential([keras.Input((10,)), layers.Dense(20, name="one"),
                              layers.Dense(20, activation="softmax", name="two"), layers.Dense(3)])
    assert list(assert_same_answers(model, (10,), 0.6)[1].channels) == ["one"]


def test_operations_of_keras_are_left_alone():
    numbers = keras.Input((10,))
    hidden = layers.Dense(20, name="two")(layers.Dense(20, name="one")(numbers))
    model = keras.Model(numbers, layers.Dense(3)(keras.ops.sort(hidden)))
    _, report = assert_same_answers(model, (10,), 0.6)
    assert list(report.channels) == ["one"]
    assert len(report.left_alone) == 1


def test_the_least_important_filters_go():
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(10, 3, name="conv"),
                              layers.BatchNormalization(name="norm"), layers.Flatten(), layers.Dense(2)])
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 10))
    gamma = np.ones(10)
    kernel[..., [1, 4]] *= 0.01
    gamma[7] = 0.01
    model.get_layer("conv").set_weights([kernel, np.zeros(10)])
    model.get_layer("norm").set_weights([gamma, *model.get_layer("norm").get_weights()[1:]])
    _, report = narrowed(model, (8, 8, 3), keep_macs=0.7)
    assert sorted(set(range(10)) - set(report.kept["conv"])) == [1, 4, 7]
    assert np.array_equal(report.kept["conv"], report.kept["norm"])


def test_wide_layers_keep_a_multiple_that_processors_like():
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(64, 3, name="64"), layers.Conv2D(20, 3, name="20"),
                              layers.Conv2D(100, 3, name="100"), layers.Flatten(), layers.Dense(2)])
    for share in (0.2, 0.5, 0.8, 0.95):
        channels = {row.name: row.output_shape[-1] for row in cost_of(
            narrowed(model, (8, 8, 3), keep_macs=share)[0], (8, 8, 3)).layers}
        assert channels["64"] % 16 == 0
        assert channels["20"] % 8 == 0 or channels["20"] == 20
        assert channels["100"] % 16 == 0 or channels["100"] == 100


def test_no_convolution_of_one_pixel_with_strides_gets_few_channels():
    """Its gradient in oneDNN would write beyond its memory."""
    image = keras.Input((16, 16, 3))
    x = layers.Conv2D(32, 3, padding="same")(image)
    x = layers.Conv2D(32, 3, padding="same")(layers.Conv2D(32, 1, strides=2, name="strided")(x))
    model = keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
    smaller, report = narrowed(model, (16, 16, 3), keep_macs=0.25)
    kernel = smaller.get_layer("strided").kernel
    assert min(kernel.shape[-2:]) == 16
    assert report.macs_after < 0.25 * report.macs_before


def test_protected_layers_keep_their_filters():
    model, shape = recipe_model("cifar10", {"width": 8})
    names = [layer.name for layer in model.layers if isinstance(layer, layers.Conv2D)]
    _, report = narrowed(model, shape, keep_macs=0.8, protect=(names[3],))
    # The addition makes the channels of the one before the block the same.
    assert {names[3], names[1]}.isdisjoint(report.channels)
    assert report.channels


def test_a_nested_model_is_protected_as_a_whole():
    model, shape = recipe_model("dogs-vs-cats-transfer", {"width": 0.35, "input_shape": "96,96,3"})
    with pytest.raises(UsageError, match="no filters or units that can be removed"):
        narrowed(model, shape, keep_macs=0.5, protect=("mobilenetv2_0.35_96",))


def test_it_is_saved_and_loaded_like_any_other(tmp_path):
    model, shape = recipe_model("dogs-vs-cats-transfer", {"width": 0.35, "input_shape": "96,96,3"})
    smaller, _ = narrowed(seasoned(model), shape, keep_macs=0.4)
    smaller.save(tmp_path / "model.keras")
    model_file.check(tmp_path / "model.keras")
    inputs = np.random.default_rng(1).uniform(0, 255, (2, *shape)).astype(np.float32)
    np.testing.assert_allclose(np.array(model_file.load(tmp_path / "model.keras")(inputs)), np.array(smaller(inputs)),
                               rtol=1e-5, atol=1e-6)


def test_policies_regularizers_and_frozen_layers_stay():
    keras.utils.set_random_seed(0)
    body = keras.Sequential([keras.Input((8,)), layers.Dense(32, dtype="mixed_bfloat16", kernel_regularizer="l2"),
                             layers.Dense(16)], name="body")
    body.trainable = False
    model = keras.Sequential([keras.Input((8,), name="numbers"), body, layers.Dense(20, name="free"),
                              layers.Dropout(0.5, seed=3), layers.Dense(2)], name="whole")
    smaller, report = narrowed(model, (8,), keep_macs=0.5)
    assert "body/" + body.layers[0].name in report.channels
    assert smaller.name == "whole"
    assert not smaller.get_layer("body").trainable
    assert [variable.path for variable in smaller.trainable_variables] == [
        variable.path for variable in model.trainable_variables]
    first = smaller.get_layer("body").layers[0]
    assert first.dtype_policy.name == "mixed_bfloat16"
    assert first.kernel_regularizer.l2 == body.layers[0].kernel_regularizer.l2
    assert smaller.layers[2].rate == 0.5


def test_what_is_left_can_be_trained():
    keras.utils.set_random_seed(0)
    model, shape = recipe_model("mnist", {"width": 8})
    smaller, _ = narrowed(model, shape, keep_macs=0.4)
    images = np.random.default_rng(0).integers(0, 255, (64, *shape)).astype(np.float32)
    labels = np.arange(64) % 10
    images[np.arange(64), labels] = 255
    smaller.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = smaller.fit(images, labels, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, float("nan"), float("inf")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UsageError, match=f"above 0 and below 1; received: {share}"):
        narrowed(keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(2)]), (4,), keep_macs=share)


def test_a_model_that_cannot_be_cut_is_refused():
    with pytest.raises(UsageError, match="the model has no filters or units that can be removed; expected .*: 'none'"):
        narrowed(keras.Sequential([keras.Input((4,)), layers.Dense(2)]), (4,), keep_macs=0.5)
    recurrent = keras.Sequential([keras.Input((4, 3)), layers.LSTM(8, name="memory"), layers.Dense(2)])
    with pytest.raises(UsageError, match="received: 'memory'"):
        narrowed(recurrent, (4, 3), keep_macs=0.5)


def test_a_model_that_cannot_be_cut_so_far_is_refused_with_what_can_be():
    model = keras.Sequential([keras.Input((100,)), layers.Dense(32), layers.Dense(2)])
    with pytest.raises(UsageError, match=r"cut to this share.*expected at least 0\.250; received: 0\.01"):
        narrowed(model, (100,), keep_macs=0.01)
    assert narrowed(model, (100,), keep_macs=0.25)[1].macs_after == 8 * 102


def test_a_layer_to_protect_that_does_not_exist_is_refused():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, name="hidden"), layers.Dense(2, name="answer")])
    with pytest.raises(UsageError, match="no such layer to protect; expected one of hidden, answer; received: 'hiden'"):
        narrowed(model, (4,), keep_macs=0.5, protect=("hiden",))


def test_weights_that_are_no_numbers_are_refused():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, name="hidden"), layers.Dense(2)])
    model.get_layer("hidden").kernel.assign(np.full((4, 8), np.nan))
    with pytest.raises(DataError, match="layer hidden are no finite numbers"):
        narrowed(model, (4,), keep_macs=0.5)


def test_another_shape_is_refused():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(2)])
    with pytest.raises(DataError, match="takes other inputs"):
        narrowed(model, (5,), keep_macs=0.5)


def test_a_layer_that_cannot_be_made_again_is_refused():
    class Stubborn(layers.Layer):
        def __init__(self, size):
            super().__init__()
            self.size = size

        def get_config(self):
            return {}

        def call(self, inputs):
            return inputs

    model = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(8), Stubborn(3), layers.Dense(2)])
    with pytest.raises(UsageError, match="cannot be made again with fewer filters"):
        narrowed(model, (4,), keep_macs=0.7)
