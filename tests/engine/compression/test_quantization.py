"""TFLite conversion and running: the same answers as Keras, any batch, and broken files that only give a sentence."""

import keras
import numpy as np
import pytest
from keras import layers
from tensorflow.lite.python import schema_py_generated as schema

from hpcai_cli.engine import tflite_file
from hpcai_cli.engine.compression import plan, quantization
from hpcai_cli.engine.serving import runners
from hpcai_cli.errors import DataError, UsageError

SHAPE = (8, 8, 1)


def digits_network() -> keras.Model:
    """Return a convolutional network with batch norm behind and before convolutions, its size open as that of
    dogs-vs-cats is."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((None, None, 1))
    x = layers.Rescaling(1 / 8, offset=-1.0)(inputs)
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="first")(x)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.SeparableConv2D(16, 3, name="second")(x)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(layers.MaxPooling2D()(x)))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, name="answer")(x))


@pytest.fixture(scope="module")
def trained():
    """Return a network that was trained on scikit-learn's digits, and held-out images with their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images[..., None].astype(np.uint8), digits.target
    model = digits_network()
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images[:1400].astype(np.float32), labels[:1400], epochs=10, batch_size=50, verbose=0)
    return model, images[:1400], images[1400:], labels[1400:]


@pytest.fixture(scope="module")
def int8(trained) -> bytes:
    model, images, _, _ = trained
    return quantization.convert(model, SHAPE, kind="int8", calibration=images[:200])


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(axis=1) == labels).mean())


def run(content: bytes, inputs: np.ndarray) -> np.ndarray:
    return tflite_file.runner(content, threads=1)(inputs)


@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 1e-4), ("float16", 0.05), ("dynamic", 1.0)])
def test_a_converted_model_answers_as_keras_does(trained, kind, tolerance):
    model, _, images, labels = trained
    expected = model.predict(images.astype(np.float32), verbose=0)
    scores = run(quantization.convert(model, SHAPE, kind=kind), images)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=tolerance)
    assert accuracy(scores, labels) >= accuracy(expected, labels) - 0.01


def test_int8_keeps_the_accuracy(trained, int8):
    model, _, images, labels = trained
    expected = model.predict(images.astype(np.float32), verbose=0)
    assert accuracy(expected, labels) > 0.9
    assert accuracy(run(int8, images), labels) >= accuracy(expected, labels) - 0.02
    assert quantization.left_in_float(int8) == []


def test_compression_makes_the_file_smaller(capfd):
    model = keras.Sequential([keras.Input(SHAPE), layers.Flatten(), layers.Dense(200), layers.Dense(10)])
    images = np.random.default_rng(0).integers(0, 256, (20, *SHAPE), dtype=np.uint8)
    size = {kind: len(quantization.convert(model, SHAPE, kind=kind, calibration=images)) for kind in plan.CONVERSIONS}
    weights = 4 * model.count_params()
    assert size["float32"] > weights
    assert size["float16"] < 0.6 * weights
    assert size["dynamic"] < 0.4 * weights
    assert size["int8"] < 0.4 * weights
    # The converter has much to say that is not for people.
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("count", [1, 2, 7, tflite_file.LARGEST_BATCH + 3, 1])
def test_any_batch_gives_each_example_its_answer(trained, int8, count):
    _, images, _, _ = trained
    runner = tflite_file.runner(int8, threads=1)
    one_by_one = np.concatenate([runner(images[row:row + 1]) for row in range(count)])
    np.testing.assert_allclose(runner(images[:count]), one_by_one, atol=1e-5)


def test_features_enter_as_they_are_stored():
    rows = np.random.default_rng(0).normal(0, [1.0, 1000.0, 0.001], (300, 3)).astype(np.float32)
    normalization = layers.Normalization()
    normalization.adapt(rows)
    model = keras.Sequential([keras.Input((3,)), normalization, layers.Dense(16, activation="relu"), layers.Dense(1)])
    expected = model.predict(rows, verbose=0)
    content = quantization.convert(model, (3,), kind="int8", calibration=rows)
    # Each column counts, though one scale for all three would round the small ones away.
    assert np.abs(run(content, rows) - expected).mean() < 0.03 * np.abs(expected).mean()


def test_named_layers_stay_in_float(trained, int8):
    model, images, unseen, _ = trained
    content = quantization.convert(model, SHAPE, kind="int8", calibration=images[:200], keep_float=["answer"])
    assert quantization.left_in_float(content) == ["answer"]
    assert len(content) > len(int8)
    separable = quantization.convert(model, SHAPE, kind="int8", calibration=images[:200], keep_float=["second"])
    assert set(quantization.left_in_float(separable)) >= {"second", "second_depthwise"}
    every = quantization.convert(model, SHAPE, kind="int8", calibration=images[:200],
                                 keep_float=[layer.name for layer in model.layers])
    np.testing.assert_allclose(run(every, unseen), model.predict(unseen.astype(np.float32), verbose=0), atol=1e-4)


def test_a_layer_that_tflite_cannot_quantize_is_named():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((12,)), layers.Dense(8, name="first"),
                              layers.Activation("elu", name="curve"), layers.Dense(3, name="answer")])
    rows = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
    content = quantization.convert(model, (12,), kind="int8", calibration=rows)
    assert quantization.left_in_float(content) == ["curve"]
    np.testing.assert_allclose(run(content, rows), model.predict(rows, verbose=0), atol=0.1)


def test_a_mixed_precision_model_is_converted_in_float32():
    def network():
        keras.utils.set_random_seed(1)
        return keras.Sequential([keras.Input(SHAPE), layers.Rescaling(1 / 16), layers.Conv2D(4, 3), layers.Flatten(),
                                 layers.Dense(3, dtype="float32")])

    images = np.random.default_rng(0).integers(0, 17, (5, *SHAPE), dtype=np.uint8)
    expected = network().predict(images.astype(np.float32), verbose=0)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = network()
    finally:
        keras.config.set_dtype_policy(before)
    np.testing.assert_allclose(run(quantization.convert(model, SHAPE, kind="float32"), images), expected, atol=1e-5)


def test_calibration_data_of_another_shape_are_refused(trained):
    model, images, _, _ = trained
    with pytest.raises(DataError, match=r"calibration data have another shape.*\(n, 8, 8, 1\).*\(5, 4, 8, 1\)"):
        quantization.convert(model, SHAPE, kind="int8", calibration=images[:5, :4])
    with pytest.raises(UsageError, match="no such layer.*'dense_99'"):
        quantization.convert(model, SHAPE, kind="int8", calibration=images, keep_float=["dense_99"])


def test_what_tflite_lacks_is_said_in_one_sentence(capfd):
    class Determinant(layers.Layer):
        def call(self, inputs):
            return keras.ops.reshape(keras.ops.det(inputs), (-1, 1))

    model = keras.Sequential([keras.Input((3, 3)), Determinant()])
    with pytest.raises(UsageError, match="cannot be converted to float32 TFLite") as raised:
        quantization.convert(model, (3, 3), kind="float32")
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


def test_inputs_of_another_kind_are_refused(trained, int8):
    _, images, _, _ = trained
    runner = tflite_file.runner(int8, threads=1)
    for wrong in (images[:2].astype(np.float32), images[:2, :4]):
        with pytest.raises(DataError, match=r"other inputs than these; expected uint8 \(n, 8, 8, 1\)"):
            runner(wrong)


def repacked(content: bytes, change) -> bytes:
    """Return the model with a change in its tables."""
    import flatbuffers

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    change(model)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def huge(model) -> None:
    model.subgraphs[0].tensors[0].shape = [1, 2**20, 2**20, 1]


def custom(model) -> None:
    code = model.operatorCodes[0]
    code.builtinCode, code.deprecatedBuiltinCode, code.customCode = 32, 32, "FlexWriteFile"


def strayed(model) -> None:
    model.subgraphs[0].operators[1].inputs = [10_000, 1]


def two_scales(model) -> None:
    tensor = next(tensor for tensor in model.subgraphs[0].tensors if tensor.quantization is not None
                  and tensor.quantization.scale is not None and len(tensor.quantization.scale) > 2)
    tensor.quantization.scale, tensor.quantization.zeroPoint = [1.0, 1.0], [0, 0]


def opened(content: bytes, folder):
    """Open what may be anybody's file, as every command does."""
    file = folder / "model.tflite"
    file.write_bytes(content)
    return runners.scores_of("tflite", file, input_shape=SHAPE, columns=10, owner="digits", threads=1)


@pytest.mark.parametrize(("change", "said"), [
    (huge, "has the shape"), (custom, "operator CUSTOM, which may not be run"), (strayed, "a tensor that is not there"),
    (two_scales, "has 2 scales"), (lambda model: model.subgraphs.append(model.subgraphs[0]), "it has 2 graphs"),
    (lambda model: model.subgraphs[0].operators.clear(), "cannot be run")])
def test_a_model_that_does_not_hang_together_is_refused(int8, change, said, tmp_path):
    with pytest.raises(DataError, match=said) as raised:
        opened(repacked(int8, change), tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"TFL3", b"PK\x03\x04" + bytes(100), b"\xff" * 4 + b"TFL3" + b"\xff" * 40,
                                     b"\x08\0\0\0TFL3" + bytes(200)])
def test_what_is_no_tflite_file_is_refused(content, tmp_path):
    with pytest.raises(DataError, match="no TFLite model|cannot be run"):
        opened(content, tmp_path)


def test_a_truncated_file_is_refused(int8, tmp_path):
    for share in (0.1, 0.5, 0.9, 0.999):
        with pytest.raises(DataError, match="no TFLite model|cannot be run"):
            opened(int8[:int(share * len(int8))], tmp_path)


def test_a_file_that_crashes_the_interpreter_crashes_only_its_trial(int8, trained, tmp_path):
    def dilate(model):
        for operator in model.subgraphs[0].operators:
            if isinstance(operator.builtinOptions, schema.Conv2DOptionsT):
                operator.builtinOptions.strideW = operator.builtinOptions.strideH = 1000

    with pytest.raises(DataError, match="this TFLite model cannot be run"):
        opened(repacked(int8, dilate), tmp_path)
    _, images, _, _ = trained
    # What is whole passes the trial.
    assert opened(int8, tmp_path)(images[:4]).shape == (4, 10)
