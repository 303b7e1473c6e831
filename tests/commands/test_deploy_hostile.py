"""Model files of strangers given to real commands: each is refused in one sentence, and none is executed.

What code is in them would only create a file, by whose absence the tests see that it did not run.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow.lite.python import schema_py_generated as schema

from hpcai_cli.engine import store
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run, write_json

SHAPE, CLASSES = (4, 4, 1), ("a", "b", "c")
FILES = {"keras": "model.keras", "onnx": "model.onnx", "saved_model": "saved_model", "tflite": "model.tflite"}
HPCAI, SECONDS = str(Path(sys.executable).parent / "hpcai"), 60
COMMANDS = """
import gc, json, os, signal, sys
if "tensorflow" in sys.argv:
    import keras, tensorflow
    from hpcai_cli.engine import inference, prediction
    from hpcai_cli.engine.deployment import export
    from hpcai_cli.engine.reports import judging
from hpcai_cli.engine.deployment import bundle, places
from hpcai_cli.engine.serving import supervisor, warm_up
from hpcai_cli.main import main
gc.freeze()
for line in sys.stdin:
    asked = json.loads(line)
    if not (pid := os.fork()):
        signal.alarm(asked["seconds"])
        os.chdir(asked["folder"])
        os.environ.update(asked["environ"])
        for number, name in enumerate((os.devnull, "stdout", "stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["hpcai", *asked["words"]]
        try:
            main()
        except SystemExit as end:
            sys.stdout.flush(), sys.stderr.flush()
            # To take TensorFlow down takes seconds.
            os._exit(end.code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
os._exit(0)
"""
"""Runs each command line in a process of its own, forked once the libraries are loaded, which takes seconds."""


class Commands:
    """Runs hpcai."""

    def __init__(self, *words: str):
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMANDS, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})

    def __call__(self, *words: object) -> SimpleNamespace:
        """Run a command line in the current folder: .code, .stdout, .stderr."""
        asked = {"folder": os.getcwd(), "words": list(map(str, words)), "seconds": SECONDS,
                 "environ": {"HPCAI_CACHE": os.environ["HPCAI_CACHE"]}}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return SimpleNamespace(code=code, stdout=Path("stdout").read_text(), stderr=Path("stderr").read_text())

    def close(self) -> None:
        with self._process as process:
            process.stdin.close()


@pytest.fixture(scope="module")
def light():
    """Commands for what is done without TensorFlow."""
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def heavy():
    commands = Commands("tensorflow")
    yield commands
    commands.close()


def refused(done, *words: str) -> None:
    assert (done.code, done.stdout) == (3, ""), done
    line, end, rest = done.stderr.partition("\n")
    assert line.startswith("error: ") and (end, rest) == ("\n", ""), done.stderr
    assert line.isprintable() and "Traceback" not in line and not Path("trap").exists()
    for word in words:
        assert word in line, line


# ---- Keras ---------------------------------------------------------------------------------------------------------

def member(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Write a model.keras again with one of its parts changed."""
    with zipfile.ZipFile(path) as archive:
        members = {part: archive.read(part) for part in archive.namelist()}
    members[name] = change(members[name])
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in members.items():
            archive.writestr(part, content)


def activation(entry: dict) -> Callable[[Path], None]:
    """Return what makes an object of a class of another kind the activation of the last layer."""
    def change(path: Path) -> None:
        def apply(content: bytes) -> bytes:
            config = json.loads(content)
            config["config"]["layers"][-1]["config"]["activation"] = entry
            return json.dumps(config).encode()
        member(path, "config.json", apply)
    return change


def kernel(make: Callable[[h5py.File, str, tuple], None]) -> Callable[[Path], None]:
    """Return what makes something else of the weights of the last layer."""
    def change(path: Path) -> None:
        def apply(content: bytes) -> bytes:
            stream = io.BytesIO(content)
            with h5py.File(stream, "a") as file:
                shape = file["layers/dense/vars/0"].shape
                del file["layers/dense/vars/0"]
                make(file, "layers/dense/vars/0", shape)
            return stream.getvalue()
        member(path, "model.weights.h5", apply)
    return change


def a_lambda(path: Path) -> None:
    model = keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), keras.layers.Lambda(
        lambda values: (__import__("pathlib").Path("trap").touch(), values)[1], output_shape=(16,)),
        keras.layers.Dense(3)])
    model.save(path)
    # To build the model, Keras may have called it.
    Path("trap").unlink(missing_ok=True)


def virtual(file: h5py.File, name: str, shape: tuple) -> None:
    layout = h5py.VirtualLayout(shape, "f4")
    layout[:] = h5py.VirtualSource("secret.h5", "secret", shape)
    file.create_virtual_dataset(name, layout)


def soft(file: h5py.File, name: str, shape: tuple) -> None:
    file[name] = h5py.SoftLink("/layers/dense/vars/1")


def external(file: h5py.File, name: str, shape: tuple) -> None:
    file[name] = h5py.ExternalLink("secret.h5", "/secret")


RUNS = "open('trap', 'w')"
KERAS = {
    "a Lambda layer": ("keras.layers.Lambda", a_lambda),
    "a function of os": ("os.system", activation({"module": "os", "class_name": "system", "config": "touch trap"})),
    "exec as a function": ("builtins.function", activation({
        "module": "builtins", "class_name": "function", "config": "exec", "registered_name": "function",
        "inner_config": RUNS})),
    "exec as a class": ("builtins.exec", activation({"module": "builtins", "class_name": "exec", "config": RUNS})),
    "a downloader": ("keras.utils.get_file", activation({
        "module": "keras.utils", "class_name": "get_file", "registered_name": None,
        "config": {"fname": "trap", "origin": "file:///etc/hostname"}})),
    "a registered class": ("keras.layers.ReLU as Custom>Evil", activation({
        "module": "keras.layers", "class_name": "ReLU", "config": {}, "registered_name": "Custom>Evil"})),
    "nesting": ("recursion", lambda path: member(path, "config.json", lambda old: b'{"a":' * 100_000)),
    "external storage": ("outside the file", kernel(lambda file, name, shape: file.create_dataset(
        name, shape, "f4", external=[("secret", 0, h5py.h5f.UNLIMITED)]))),
    "a soft link": ("have a link", kernel(soft)), "an external link": ("have a link", kernel(external)),
    "a virtual dataset": ("outside the file", kernel(virtual)),
    "an absurd shape": ("larger than the file", kernel(lambda file, name, shape: file.create_dataset(
        name, (10**6, 10**6), "f4", chunks=(100, 100))))}


# ---- SavedModel ----------------------------------------------------------------------------------------------------

def saved(act: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[Path], None]:
    """Return what writes a model that answers, and does something beside it."""
    def write(path: Path) -> None:
        def call(images):
            with tf.control_dependencies([act(images)]):
                return tf.reshape(images, (-1, 16))[:, :3] * 1.0
        module = tf.Module()
        module.call = tf.function(call, input_signature=[tf.TensorSpec((None, *SHAPE), tf.float32)])
        tf.saved_model.save(module, str(path), signatures=module.call)
    return write


def beside(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        saved(lambda images: images)(path)
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("x")
    return write


SAVED_MODEL = {
    "a file is written": ("WriteFile", saved(lambda images: tf.io.write_file("trap", "x"))),
    "a file is read": ("ReadFile", saved(lambda images: tf.io.read_file("/etc/hostname"))),
    "Python is run": ("EagerPyFunc", saved(lambda images: tf.py_function(lambda: Path("trap").touch() or 1, [],
                                                                         tf.int64))),
    "an asset": ("assets/words.txt", beside("assets/words.txt")),
    "a second graph": ("saved_model.pbtxt", beside("saved_model.pbtxt"))}


# ---- ONNX and TFLite -----------------------------------------------------------------------------------------------

def onnx_model(name: str = "", **node) -> Callable[[Path], None]:
    """Return what writes an ONNX file: whose weights are in a file of this name, or with another operator."""
    def write(path: Path) -> None:
        onnx = pytest.importorskip("onnx")
        helper, kinds = onnx.helper, onnx.TensorProto
        weights = onnx.numpy_helper.from_array(np.eye(16, dtype=np.float32)[:, :3], "w")
        if name:
            onnx.external_data_helper.set_external_data(weights, os.path.abspath(name) if name == "secret" else name)
            weights.ClearField("raw_data")
        nodes = [helper.make_node("Flatten", ["images"], ["rows"]),
                 helper.make_node(**({"op_type": "MatMul"} | node), inputs=["rows", "w"], outputs=["scores"])]
        graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("images", kinds.FLOAT, ("n", *SHAPE))],
                                  [helper.make_tensor_value_info("scores", kinds.FLOAT, ("n", 3))], [weights])
        imports = [helper.make_opsetid(domain, version) for domain, version in (("", 15), ("evil", 1))]
        path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString())
    return write


ONNX = {
    "values in a file beside it": ("outside the file", onnx_model("weights.bin")),
    "values in a file above it": ("outside the file", onnx_model("../secret")),
    "values in any file": ("outside the file", onnx_model("secret")),
    "another's operator": ("evil.Evil", onnx_model(op_type="Evil", domain="evil")),
    "an operator that the standard lacks": ("No Op registered for Evil", onnx_model(op_type="Evil"))}


@pytest.fixture(scope="module")
def tflite() -> bytes:
    run = tf.function(lambda images: tf.reshape(images, (-1, 16))[:, :3],
                      input_signature=[tf.TensorSpec((None, *SHAPE), tf.float32)])
    return tf.lite.TFLiteConverter.from_concrete_functions([run.get_concrete_function()]).convert()


def repacked(change: Callable) -> Callable[[bytes], bytes]:
    """Return what changes a model's tables."""
    def apply(content: bytes) -> bytes:
        import flatbuffers

        model = schema.ModelT.InitFromPackedBuf(content, 0)
        change(model)
        builder = flatbuffers.Builder(1 << 12)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())
    return apply


def operator(code: int, name: str | None = None) -> Callable[[bytes], bytes]:
    def change(model) -> None:
        first = model.operatorCodes[0]
        first.builtinCode, first.deprecatedBuiltinCode, first.customCode = code, min(code, 127), name
    return repacked(change)


def absurd(model) -> None:
    model.subgraphs[0].tensors[0].shape = [1, 2**20, 2**20, 1]


TFLITE = {
    "a custom operator": ("the operator CUSTOM", operator(schema.BuiltinOperator.CUSTOM, "FlexWriteFile")),
    "a call of another graph": ("the operator CALL_ONCE", operator(schema.BuiltinOperator.CALL_ONCE)),
    "memory between calls": ("the operator VAR_HANDLE", operator(schema.BuiltinOperator.VAR_HANDLE)),
    "an absurd shape": ("has the shape", repacked(absurd)),
    "half a file": ("no TFLite model", lambda content: content[:len(content) // 2]),
    "another kind of file": ("no TFLite model", lambda content: b"PK\x03\x04" + content[4:])}
CRASH = operator(schema.BuiltinOperator.SPLIT)
"""Without the options of that operator, which the interpreter reads all the same."""


# ---- Where they lie ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    model = keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), keras.layers.Dense(3)])
    model.save(path := tmp_path_factory.mktemp("good") / "model.keras")
    return path


@pytest.fixture
def folder(good, tflite) -> Path:
    """Write a run, data and secrets into the current folder; the models are written into `export`."""
    run = Run(Path("run"))
    run.folder.mkdir()
    recipe = Recipe(name="made", summary="", input_shape=SHAPE, num_classes=3, class_names=CLASSES)
    write_json(run.recipe_file, recipe.to_json())
    write_json(run.manifest_file, {"recipe_reference": "mnist", "class_names": list(CLASSES)})
    arrays = {"images": np.zeros((6, *SHAPE), np.uint8), "labels": np.arange(6) % 3}
    store.write(Path("data.h5"), {"train": arrays, "test": arrays}, recipe="made", class_names=CLASSES,
                source_fingerprint="s", options={})
    Image.new("L", (4, 4)).save("image.png")
    Path("secret").write_bytes(bytes(4000))
    with h5py.File("secret.h5", "w") as file:
        file["secret"] = np.zeros((16, 3), np.float32)
    Path("export").mkdir()
    (Path("export") / "weights.bin").write_bytes(bytes(4000))
    return Path("export")


def made(folder: Path, good: Path, tflite: bytes, kind: str, write: Callable) -> Path:
    """Write a hostile model, and an artefact.json in which everything is right."""
    path = folder / FILES[kind]
    if kind == "tflite":
        path.write_bytes(write(tflite))
    else:
        if kind == "keras":
            shutil.copyfile(good, path)
        write(path)
    describe(folder, kind)
    return path


def describe(folder: Path, of: str = "tflite", **changes) -> None:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
             if path.is_file() and path.name != "artefact.json"}
    (folder / "artefact.json").write_text(json.dumps({
        "schema": "hpcai.artefact/1", "name": "made", "kind": of, "file": FILES[of], "task": "classification",
        "class_names": CLASSES, "decision_threshold": None, "inputs": "images", "input_shape": SHAPE,
        "files": {name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
                  for name, content in files.items()}} | changes))


# ---- Refusals ------------------------------------------------------------------------------------------------------

WRITERS = {"keras": KERAS, "saved_model": SAVED_MODEL, "onnx": ONNX, "tflite": TFLITE}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, corpus in WRITERS.items() for name in corpus])
def test_a_hostile_model_is_refused_by_all(folder, good, tflite, light, heavy, kind, name):
    said, write = WRITERS[kind][name]
    path = made(folder, good, tflite, kind, write)
    server = heavy if kind in ("keras", "saved_model") else light
    refused(server("deploy", "serve", folder, "--port", 0), str(path), said)
    refused(heavy("predict", path, "image.png", "--like", "run"), str(path), said)
    if name == next(iter(WRITERS[kind])):
        refused(heavy("evaluate", path, "--like", "run", "--data", "data.h5"), str(path), said)
    if kind == "keras":
        shutil.copyfile(path, "run/model.keras")
        refused(heavy("deploy", "export", "run", "--data", "data.h5"), "run/model.keras", said)
        assert sorted(entry.name for entry in Path("run").iterdir()) == ["manifest.json", "model.keras", "recipe.json"]


def test_what_was_refused_would_have_run(folder, good, tflite, heavy):
    """What is not hostile is answered; what is, acts where it is trusted."""
    assert heavy("predict", good, "image.png", "--like", "run").code == 0
    for kind, write in (("keras", a_lambda), ("saved_model", SAVED_MODEL["a file is written"][1])):
        path = made(folder, good, tflite, kind, write)
        assert heavy("predict", path, "image.png", "--like", "run", "--trust-model").code == 0
        Path("trap").unlink()


def test_a_model_that_crashes_its_interpreter(folder, good, tflite):
    made(folder, good, tflite, "tflite", CRASH)
    for words in (["serve", "--port", "0"], ["bundle", "--edge", "--output", "bundle"]):
        done = subprocess.run([HPCAI, "deploy", *words, folder], capture_output=True, text=True, timeout=SECONDS)
        refused(SimpleNamespace(code=done.returncode, stdout=done.stdout, stderr=done.stderr), "it crashes")
    assert not list(Path().glob("*bundle*"))


# ---- artefact.json -------------------------------------------------------------------------------------------------

def files(**changes) -> Callable[[Path], None]:
    """Return what gives the files of an artefact.json, whose sums are those of 4,000 zeros."""
    def write(folder: Path) -> None:
        said = {"sha256": hashlib.sha256(bytes(4000)).hexdigest(), "bytes": 4000}
        document = json.loads((folder / "artefact.json").read_text())
        describe(folder, files=document["files"] | dict.fromkeys(changes.pop("names", ()), said), **changes)
    return write


def link(folder: Path) -> None:
    (folder / "MODEL_CARD.md").symlink_to("../secret")
    describe(folder)


def endless(folder: Path) -> None:
    (folder / "MODEL_CARD.md").write_bytes(bytes(4000))
    describe(folder)
    (folder / "MODEL_CARD.md").unlink()
    (folder / "MODEL_CARD.md").symlink_to("/dev/zero")


def pipe(folder: Path) -> None:
    files(names=["MODEL_CARD.md"])(folder)
    os.mkfifo(folder / "MODEL_CARD.md")


def other_model(folder: Path) -> None:
    (folder / "model.tflite").rename("elsewhere.tflite")
    (folder / "model.tflite").symlink_to("../elsewhere.tflite")


def text(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "artefact.json").write_text(content)


def no_encoding(folder: Path) -> None:
    run = tf.function(lambda rows: rows[:, :3], input_signature=[tf.TensorSpec((None, 16), tf.float32)])
    (folder / "model.tflite").write_bytes(tf.lite.TFLiteConverter.from_concrete_functions(
        [run.get_concrete_function()]).convert())
    describe(folder, inputs="features", input_shape=[16], encoding={"columns": [{}]})


def reference(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "reference.json").write_text(content)
        describe(folder)
    return write


def exchanged(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(3999) + b"x")


DOCUMENTS = {
    "a file above": ("files cannot be", files(names=["../secret"])),
    "a file above, later": ("files cannot be", files(names=["a/../../secret"])),
    "any file": ("files cannot be", files(names=["/etc/hostname"])),
    "a name with a zero": ("files cannot be", files(names=["a\0b"])),
    "a name with half a sign": ("files cannot be", files(names=["\ud800"])),
    "a name of several lines": ("files cannot be", files(names=["a\nb"])),
    "a long name": ("File name too long", files(names=["a" * 5000])),
    "a file that is not there": ("No such file", files(names=["b"])),
    "a model above": ("its file is not among its files", files(file="../run")),
    "no model": ("its file is not among its files", files(file="")),
    "the folder as the model": ("its file is not among its files", files(file=".")),
    "a link to a file above": ("no plain file", link), "a link to the model": ("no plain file", other_model),
    "a link without an end": ("no plain file", endless), "a pipe": ("no plain file", pipe),
    "another file": ("not the file that was exported", exchanged),
    "a negative shape": ("input_shape cannot be", files(input_shape=[-4, 4, 1])),
    "an endless shape": ("input_shape cannot be", files(input_shape=[float("inf"), 4, 1])),
    "an absurd shape": ("input_shape cannot be", files(input_shape=[2**40, 2**40, 1])),
    "a kind of file that runs code": ("kind cannot be", files(kind="pickle")),
    "nesting": ("recursion", text("[" * 100_000)), "no object": ("schema", text("[]")), "no JSON": ("", text("\0")),
    "a number without an end": ("", text('{"schema": ' + "9" * 10_000 + "}"))}
OPENED = {
    "a shape that fits no memory": ("takes other inputs", files(input_shape=[16_384, 16_384, 1])),
    "another shape": ("other inputs", files(input_shape=[4, 4, 3])),
    "other classes": ("other outputs", files(class_names=["a"] * 1000)),
    "an encoding that is none": ("encoding", no_encoding), "a deep reference": ("recursion", reference("[" * 100_000)),
    "no reference": ("reference statistics", reference('{"schema": "hpcai.reference/1", "inputs": 5}'))}
"""What only opening the model tells."""


@pytest.mark.parametrize("name", [*DOCUMENTS, *OPENED])
def test_a_hostile_document_is_refused(folder, good, tflite, light, name):
    made(folder, good, tflite, "tflite", lambda content: content)
    said, write = (DOCUMENTS | OPENED)[name]
    write(folder)
    refused(light("deploy", "serve", folder, "--port", 0), said)
    if name in DOCUMENTS:
        refused(light("deploy", "bundle", folder, "--output", "bundle"), said)
        assert not list(Path().glob("*bundle*"))
