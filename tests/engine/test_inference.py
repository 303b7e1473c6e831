"""Models of every kind answer alike, and what does not fit or cannot be trusted is refused."""

import dataclasses
import os
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from hpcai_cli.engine import training
from hpcai_cli.engine.compression import quantization
from hpcai_cli.engine.inference import open_model
from hpcai_cli.errors import DataError, MissingError
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run, read_json, write_bytes, write_json

IMAGES = np.random.default_rng(7).integers(0, 256, (9, 4, 4, 1), dtype=np.uint8)


def describe(run: Run, recipe: Recipe, reference: str = "tiny") -> Run:
    write_json(run.recipe_file, recipe.to_json())
    write_json(run.manifest_file, {"recipe_reference": reference, "class_names": list(recipe.class_names)})
    return run


@pytest.fixture
def job(tiny):
    """Train for an epoch, and leave a run folder that says what it is."""
    job = tiny.job(epochs=1)
    training.train(job, resume=False)
    describe(job.run, job.recipe)
    return job


@pytest.fixture
def run(tmp_path) -> Run:
    """Make a run folder without a model: three classes of 4x4 images."""
    (tmp_path / "made").mkdir()
    return describe(Run(tmp_path / "made"), Recipe(name="made", summary="", input_shape=(4, 4, 1), num_classes=3,
                                                   class_names=("a", "b", "c")))


def dense(outputs: int = 3, shape: tuple = (4, 4, 1)) -> keras.Model:
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input(shape), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(),
                             keras.layers.Dense(outputs)])


def logits(model: keras.Model, images: np.ndarray) -> np.ndarray:
    return model(images.astype(np.float32), training=False).numpy()


def finder(job):
    return lambda reference: SimpleNamespace(function={"build_model": job.build_model}.get)


# ---- Every kind ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_run_and_its_model_file(job, count):
    wanted = logits(keras.saving.load_model(job.run.model_file), IMAGES[:count])
    for path in (job.run.folder, job.run.model_file):
        opened = open_model(path)
        assert (opened.kind, opened.file, opened.run.folder) == ("keras", job.run.model_file, job.run.folder)
        assert opened.recipe == job.recipe
        scores = opened.forward(IMAGES[:count])
        assert type(scores) is np.ndarray and scores.dtype == np.float32
        np.testing.assert_allclose(scores, wanted, atol=1e-6)


def test_a_checkpoint_has_the_weights_of_its_step(tiny):
    job = tiny.job(epochs=2)
    training.train(job, resume=False)
    describe(job.run, job.recipe)
    first, last = sorted(job.run.checkpoints.iterdir())
    scores = {path: open_model(path, find_recipe=finder(job)).forward(IMAGES) for path in (first, last)}
    assert not np.allclose(scores[first], scores[last])
    best = {1: first, 2: last}[read_json(job.run.result_file)["best_epoch"]]
    np.testing.assert_allclose(open_model(job.run.folder).forward(IMAGES), scores[best], atol=1e-6)


def test_a_compressed_run_is_a_run(job):
    model = keras.saving.load_model(job.run.model_file)
    made = describe(Run(job.run.compressed / "float16"), dataclasses.replace(job.recipe, class_names=("x", "y", "z")))
    write_bytes(made.tflite_file, quantization.convert(model, (4, 4, 1), kind="float16"))
    for path in (made.folder, made.tflite_file):
        opened = open_model(path)
        assert (opened.kind, opened.file, opened.run.folder) == ("tflite", made.tflite_file, made.folder)
        assert opened.recipe.class_names == ("x", "y", "z")
        np.testing.assert_allclose(opened.forward(IMAGES), logits(model, IMAGES), atol=0.02)


def test_where_both_are_there_the_tflite_file_counts(job):
    other = dense()
    write_bytes(job.run.tflite_file, quantization.convert(other, (4, 4, 1), kind="float32"))
    np.testing.assert_allclose(open_model(job.run.folder).forward(IMAGES), logits(other, IMAGES), atol=1e-4)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_saved_model(run, count):
    model = dense()
    model.export(run.folder / "exports" / "saved", verbose=False)
    opened = open_model(run.folder / "exports" / "saved")
    assert opened.kind == "saved_model" and opened.run.folder == run.folder
    np.testing.assert_allclose(opened.forward(IMAGES[:count]), logits(model, IMAGES[:count]), atol=1e-5)


@pytest.mark.long
def test_one_logit_becomes_two_scores_in_every_kind(run, tmp_path):
    two = describe(run, Recipe(name="made", summary="", input_shape=(4, 4, 1), num_classes=2, class_names=("a", "b")))
    model = dense(1)
    model.save(tmp_path / "model.keras")
    model.export(tmp_path / "saved", verbose=False)
    (tmp_path / "model.tflite").write_bytes(quantization.convert(model, (4, 4, 1), kind="float32"))
    wanted = np.concatenate([np.zeros((9, 1)), logits(model, IMAGES)], axis=1)
    for name in ("model.keras", "saved", "model.tflite"):
        np.testing.assert_allclose(open_model(tmp_path / name, like=two.folder).forward(IMAGES), wanted, atol=1e-4)


def test_a_model_of_a_fixed_batch_takes_any(run, tmp_path):
    model = dense()
    module = tf.Module()
    weights = [tf.constant(weight) for weight in model.get_weights()]
    module.call = tf.function(lambda images: tf.reshape(images / 255, (4, 16)) @ weights[0] + weights[1],
                              input_signature=[tf.TensorSpec((4, 4, 4, 1), tf.float32)])
    save(module, tmp_path / "saved")
    forward = open_model(tmp_path / "saved", like=run.folder).forward
    for count in (1, 4, 9):
        np.testing.assert_allclose(forward(IMAGES[:count]), logits(model, IMAGES[:count]), atol=1e-5)


def save(module: tf.Module, folder: Path) -> Path:
    tf.saved_model.save(module, str(folder), signatures=module.call)
    return folder


# ---- Which run -----------------------------------------------------------------------------------------------------

def test_a_model_outside_any_run_needs_one_that_is_like_it(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "model.keras"
    dense().save(file)
    with pytest.raises(DataError, match="the model lies in no run folder; .*name the run .*with --like RUN"):
        open_model(file)
    assert open_model(file, like=run.folder).run.folder == run.folder


def test_the_nearest_run_above_counts(run, monkeypatch):
    dense().save(run.folder / "copy.keras")
    monkeypatch.chdir(run.folder)
    assert open_model(Path("copy.keras")).run.folder == Path(".")
    monkeypatch.chdir(run.folder.parent)
    assert open_model(Path("made/copy.keras")).run.folder == Path("made")


@pytest.mark.parametrize(("name", "said"), [("nowhere", "not a run folder"), ("none.onnx", "does not exist"),
                                            ("model.h5", "no kind of model file"), (".", "not a run folder")])
def test_what_is_no_model(run, tmp_path, name, said):
    (tmp_path / "model.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(DataError, match=said):
        open_model(tmp_path / name, like=run.folder)


def test_a_run_that_was_not_finished_says_how_to(run):
    with pytest.raises(DataError, match="finish the training with `hpcai train --resume"):
        open_model(run.folder)


def test_a_recipe_that_leaves_the_shape_open(run):
    describe(run, Recipe(name="made", summary="", num_classes=3))
    with pytest.raises(DataError, match="leaves shape or classes open"):
        open_model(run.folder)


# ---- What does not fit ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["keras", "tflite", "saved_model"])
@pytest.mark.parametrize(("outputs", "shape"), [(4, (4, 4, 1)), (1, (4, 4, 1)), (3, (5, 4, 1)), (3, (4, 4, 3)),
                                                (3, (16,))])
def test_other_shapes_are_refused(run, tmp_path, kind, outputs, shape):
    model, path = dense(outputs, shape), tmp_path / {"keras": "m.keras", "tflite": "m.tflite"}.get(kind, "saved")
    if kind == "keras":
        model.save(path)
    elif kind == "tflite":
        path.write_bytes(quantization.convert(model, shape, kind="float32"))
    else:
        model.export(path, verbose=False)
    with pytest.raises(DataError, match=r"other outputs than recipe made|does not take the examples|takes other inputs|"
                                        r"does not fit recipe made") as caught:
        open_model(path, like=run.folder, trust=kind == "tflite")
    assert str(path) in str(caught.value)


def test_a_model_that_answers_whole_numbers_gives_no_scores(run, tmp_path):
    module = tf.Module()
    module.call = tf.function(lambda images: tf.cast(tf.reshape(images, (-1, 16))[:, :3], tf.int64),
                              input_signature=[tf.TensorSpec((None, 4, 4, 1), tf.float32)])
    with pytest.raises(DataError, match="gives no scores; expected numbers of a float type; received: int64"):
        open_model(save(module, tmp_path / "saved"), like=run.folder)


@pytest.mark.parametrize("name", ["m.keras", "m.tflite", "saved/saved_model.pb"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x01\x12\xff\xff\xff\xff\x0f", bytes(100)])
def test_what_only_has_the_name_of_a_model(run, tmp_path, name, content):
    write_bytes(tmp_path / name, content)
    with pytest.raises(DataError):
        open_model(tmp_path / name.split("/")[0], like=run.folder)


# ---- Checkpoints ---------------------------------------------------------------------------------------------------

def last_checkpoint(job) -> Path:
    return sorted(job.run.checkpoints.iterdir())[-1]


def test_a_checkpoint_must_verify(job):
    folder = last_checkpoint(job)
    state = folder / "state.json"
    state.write_text(state.read_text() + " ")
    with pytest.raises(DataError, match="does not verify: state.json does not match its hash"):
        open_model(folder, find_recipe=finder(job))


@pytest.mark.parametrize("damage", ["cut", "packed", "huge", "gone", "object"])
def test_an_array_file_from_a_stranger(job, damage):
    folder = last_checkpoint(job)
    file = folder / "arrays.npz"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "packed":
        np.savez_compressed(file, **{"model-0": np.zeros(1 << 20)})
    elif damage == "gone":
        file.unlink()
    elif damage == "object":
        np.savez(file, **{"model-0": np.array([{"a": 1}], object)})
    else:
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,), }"
        header = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("model-0.npy", header)
    with pytest.raises(DataError, match="does not verify"):
        open_model(folder, find_recipe=finder(job))


def test_a_checkpoint_of_another_model(job):
    def other(recipe):
        return keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])

    with pytest.raises(DataError, match="is of another model than recipe tiny builds; expected 2 variables"):
        open_model(last_checkpoint(job), find_recipe=lambda reference: SimpleNamespace(function=lambda name: other))


def test_the_code_of_a_strangers_run_is_not_run(job, tmp_path):
    asked = []

    def find(reference):
        asked.append(reference)
        return finder(job)(reference)

    describe(job.run, job.recipe, str(tmp_path / "evil.py"))
    with pytest.raises(DataError, match="built by the code in .*evil.py.*if the file is your own, add --trust-model"):
        open_model(last_checkpoint(job), find_recipe=find)
    assert asked == []
    open_model(last_checkpoint(job), find_recipe=find, trust=True)
    assert asked == [str(tmp_path / "evil.py")]


@pytest.mark.parametrize("manifest", [{}, {"recipe_reference": 5}])
def test_a_manifest_that_names_no_recipe(job, manifest):
    write_json(job.run.manifest_file, manifest)
    with pytest.raises(DataError, match="names no recipe"):
        open_model(last_checkpoint(job), find_recipe=finder(job))


# ---- SavedModels from strangers ------------------------------------------------------------------------------------

def module_that(act) -> tf.Module:
    """A model that answers, and does something beside it."""
    module = tf.Module()

    def call(images):
        done = act(images)
        with tf.control_dependencies([] if done is None else [done]):
            return tf.reshape(images, (-1, 16))[:, :3] * 1.0

    module.call = tf.function(call, input_signature=[tf.TensorSpec((None, 4, 4, 1), tf.float32)])
    return module


def written(images):
    return tf.io.write_file("stolen", "x")


def written_in_a_loop(images):
    return tf.while_loop(lambda step: step < 1, lambda step: (written_then(step),), [tf.constant(0)])[0]


def written_then(step):
    with tf.control_dependencies([tf.io.write_file("stolen", "x")]):
        return step + 1


def saved(images):
    return tf.raw_ops.SaveV2(prefix="stolen", tensor_names=["a"], shape_and_slices=[""], tensors=[tf.constant(1.0)])


def read(images):
    return tf.io.read_file("/etc/hostname")


def python(images):
    return tf.py_function(lambda: os.system("touch stolen"), [], tf.int64)


@pytest.mark.parametrize(("act", "operation"), [(written, "WriteFile"), (written_in_a_loop, "WriteFile"),
                                                (saved, "SaveV2"), (read, "ReadFile"), (python, "EagerPyFunc")])
def test_a_saved_model_that_does_something_else(run, tmp_path, act, operation):
    folder = save(module_that(act), tmp_path / "saved")
    with pytest.raises(DataError, match=f"it has the operations .*{operation}.*if it is your own, add --trust-model"):
        open_model(folder, like=run.folder)
    assert not list(Path(".").glob("stolen*"))
    if act in (written, saved):
        open_model(folder, like=run.folder, trust=True)
        assert list(Path(".").glob("stolen*")), "what was refused would have run"


def test_a_function_that_could_take_anothers_place(run, tmp_path):
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    folder = save(module_that(lambda images: None), tmp_path / "saved")
    model = SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    saving = next(function for function in model.meta_graphs[0].graph_def.library.function
                  if any(node.op == "SaveV2" for node in function.node_def))
    saving.attr["api_implements"].s = b"lstm"
    (folder / "saved_model.pb").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="it has the operations .*SaveV2"):
        open_model(folder, like=run.folder)


def test_a_constant_that_is_larger_than_any_memory(run, tmp_path):
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    folder = save(module_that(lambda images: None), tmp_path / "saved")
    model = SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    node = next(node for function in model.meta_graphs[0].graph_def.library.function for node in function.node_def
                if node.op == "Const")
    node.attr["value"].tensor.tensor_shape.ClearField("dim")
    for _ in range(4):
        node.attr["value"].tensor.tensor_shape.dim.add().size = 1 << 20
    (folder / "saved_model.pb").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="its constant .* has the shape"):
        open_model(folder, like=run.folder)


@pytest.mark.parametrize("name", ["assets/words.txt", "saved_model.pbtxt", "variables/other"])
def test_a_saved_model_with_other_files(run, tmp_path, name):
    folder = save(module_that(lambda images: None), tmp_path / "saved")
    write_bytes(folder / name, b"x")
    with pytest.raises(DataError, match="which inference does not need"):
        open_model(folder, like=run.folder)
    shutil.rmtree(folder / "variables")
    (folder / "variables").symlink_to("/etc")
    with pytest.raises(DataError, match="it holds variables, which is no plain file"):
        open_model(folder, like=run.folder, trust=True)


# ---- ONNX ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def onnx():
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


def onnx_model(onnx, *, batch="n", kind=None, outputs: int = 3, nodes=None, extra_inputs=()):
    """Return images (n, 4, 4, 1) -> the first columns of their pixels times a weight."""
    helper, kinds = onnx.helper, onnx.TensorProto
    weights = np.eye(16, dtype=np.float32)[:, :outputs]
    constants = [onnx.numpy_helper.from_array(np.array([-1, 16]), "flat"), onnx.numpy_helper.from_array(weights, "w")]
    graph = helper.make_graph(
        nodes or [helper.make_node("Cast", ["images"], ["numbers"], to=kinds.FLOAT),
                  helper.make_node("Reshape", ["numbers", "flat"], ["rows"]),
                  helper.make_node("MatMul", ["rows", "w"], ["scores"])], "g",
        [helper.make_tensor_value_info("images", kind or kinds.FLOAT, (batch, 4, 4, 1)), *extra_inputs],
        [helper.make_tensor_value_info("scores", kinds.FLOAT, (batch, outputs))], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


@pytest.mark.parametrize("batch", ["n", 4])
@pytest.mark.parametrize("kind", ["FLOAT", "UINT8"])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_an_onnx_file(run, onnx, batch, kind, count):
    onnx.save(onnx_model(onnx, batch=batch, kind=getattr(onnx.TensorProto, kind)), run.folder / "m.onnx")
    opened = open_model(run.folder / "m.onnx")
    assert opened.kind == "onnx"
    assert opened.forward(IMAGES[:count]).tolist() == IMAGES[:count].reshape(count, 16)[:, :3].tolist()


@pytest.mark.long
def test_an_onnx_file_that_does_not_fit(run, onnx):
    file, kinds = run.folder / "m.onnx", onnx.TensorProto
    more = onnx.helper.make_tensor_value_info("more", kinds.FLOAT, (1,))
    for model, said in ((onnx_model(onnx, outputs=4), "other outputs than recipe made has"),
                        (onnx_model(onnx, kind=kinds.DOUBLE), r"it takes tensor\(double\)"),
                        (onnx_model(onnx, extra_inputs=[more]), "it has the inputs images, more")):
        onnx.save(model, file)
        with pytest.raises(DataError, match=said):
            open_model(file)
    for content in (b"", b"hello", bytes(100), onnx_model(onnx).SerializeToString()[:-40]):
        file.write_bytes(content)
        with pytest.raises(DataError, match="this ONNX file cannot be used"):
            open_model(file)


def test_an_onnx_file_that_names_another_file(run, onnx):
    Path("secret").write_bytes(np.eye(16, dtype=np.float32)[:, :3].tobytes())
    for inside in (False, True):
        model = onnx_model(onnx)
        tensor = model.graph.initializer[1]
        onnx.external_data_helper.set_external_data(tensor, "secret")
        tensor.ClearField("raw_data")
        if inside:
            # As the value of an attribute, within the branch of a condition.
            branch = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=tensor)], "b", [], [])
            model = onnx_model(onnx)
            model.graph.node.add(op_type="If").attribute.add(
                name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(branch)
        (run.folder / "m.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(DataError, match="its tensor 'w' is outside the file"):
            open_model(run.folder / "m.onnx")


def test_an_operator_that_is_not_the_standards(run, onnx):
    node = onnx.helper.make_node("EPContext", ["images"], ["scores"], domain="com.microsoft",
                                 ep_cache_context="/etc/hostname", embed_mode=0)
    model = onnx_model(onnx, nodes=[node])
    model.opset_import.add(domain="com.microsoft", version=1)
    (run.folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="it has the operator com.microsoft.EPContext"):
        open_model(run.folder / "m.onnx")


def test_without_onnxruntime(run, monkeypatch):
    (run.folder / "m.onnx").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingError, match=r"pip install 'hpcai\[onnx\]'"):
        open_model(run.folder / "m.onnx")


def test_onnx_runs_on_the_best_that_is_installed():
    from hpcai_cli.engine.onnx_file import providers_of

    assert providers_of(["AzureExecutionProvider", "CPUExecutionProvider"]) == ["CPUExecutionProvider"]
    assert providers_of(["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"]) == [
        "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
