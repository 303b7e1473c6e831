"""The formats that the fuzzer mutates: good files to begin with, and the project's own function that reads each."""

import contextlib
import gzip
import hashlib
import io
import json
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

IMAGE_SHAPE = (24, 24, 3)


@dataclass(frozen=True)
class Format:
    """One kind of file from strangers."""

    good: Callable[[], list[bytes]]
    """Makes files that the reader accepts."""
    read: Callable[[Path, bytes], None]
    """Takes a folder of its own and the content; puts the file where its reader looks for it, and reads it."""
    repair: Callable[[bytes], bytes] | None = None
    """Sets checksums right again, so that half of the mutations get past them."""
    unpacked: Callable[[bytes], bytes] | None = None
    """Gives what `repair` packs, to mutate that instead."""
    is_text: bool = False
    """Half of the mutations leave it text."""


def _source() -> random.Random:
    return random.Random("good files")


# ---- IDX ----

def _idx(*sizes: int) -> bytes:
    count = 1
    for size in sizes:
        count *= size
    values = bytes(_source().randrange(10) for _ in range(count))
    return bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes) + values


def _read_idx(mutated: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        from hpcai_cli.engine.raw.idx import read_images_and_labels

        if not any(folder.iterdir()):
            for split in ("train", "t10k"):
                (folder / f"{split}-images-idx3-ubyte").write_bytes(_idx(5, 8, 8))
                (folder / f"{split}-labels-idx1-ubyte").write_bytes(_idx(5))
        (folder / mutated).write_bytes(content)
        read_images_and_labels(folder, num_classes=10, image_shape=(8, 8, 1))
    return read


# ---- archives ----

_MEMBERS = {"train/cat/1.jpg": b"cat" * 50, "train/dog/2.jpg": b"dog" * 50, "readme.txt": b"\0" * 2000}


def _zip() -> list[bytes]:
    inner = _zip_of(_MEMBERS, zipfile.ZIP_STORED)
    return [_zip_of(_MEMBERS, zipfile.ZIP_DEFLATED), inner,
            _zip_of({"train.zip": inner, "empty/": b""}, zipfile.ZIP_DEFLATED)]


def _zip_of(members: dict[str, bytes], packing: int) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", packing) as archive:
        for name, member in members.items():
            archive.writestr(zipfile.ZipInfo(name), member, packing)
    return content.getvalue()


def _tar(kind: int = tarfile.PAX_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=kind) as archive:
        for name, member in {**_MEMBERS, f"{'long/' * 30}n\u00e9.jpg": b"x"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(member)
            archive.addfile(info, io.BytesIO(member))
    return content.getvalue()


def _tars() -> list[bytes]:
    return [_tar(), _tar(tarfile.GNU_FORMAT)]


def _tar_sums(content: bytes) -> bytes:
    """Set the checksum of every block that looks like a header right."""
    blocks = [bytearray(content[start:start + 512]) for start in range(0, len(content), 512)]
    for block in blocks:
        if block[257:262] == b"ustar":
            block[148:156] = b"        "
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def _gzip(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


def _unpack(folder: Path, content: bytes) -> None:
    from hpcai_cli.engine.raw.archives import unpack

    shutil.rmtree(folder / "files", ignore_errors=True)
    (folder / "archive").write_bytes(content)
    unpack(folder / "archive", folder / "files", named="archive")


# ---- images ----

def _images(kind: str, modes: tuple[str, ...], **options) -> Callable[[], list[bytes]]:
    def good() -> list[bytes]:
        from PIL import Image

        made = []
        for mode in modes:
            picture = Image.frombytes("RGB", (40, 30), _source().randbytes(3600)).resize((40, 30)).convert(mode)
            exif = Image.Exif()
            exif[0x0112] = 6
            content = io.BytesIO()
            picture.save(content, kind, **options, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
            made.append(content.getvalue())
        return made
    return good


def _read_image(folder: Path, content: bytes) -> None:
    from hpcai_cli.engine.raw import images

    images.decode(content, IMAGE_SHAPE)


def _png_sums(content: bytes) -> bytes:
    """Set the checksum of every chunk right, as far as the lengths lead."""
    repaired, place = bytearray(content), 8
    while place + 12 <= len(repaired):
        end = place + 8 + struct.unpack_from(">I", repaired, place)[0]
        if end + 4 > len(repaired):
            break
        struct.pack_into(">I", repaired, end, zlib.crc32(repaired[place + 4:end]))
        place = end + 4
    return bytes(repaired)


# ---- tables ----

def _csv() -> list[bytes]:
    source = _source()
    rows = [(source.randrange(100), round(source.random(), 3), source.choice(["red", "green", ""]),
             source.choice(["TRUE", "FALSE"]), source.choice(["yes", "no"])) for _ in range(40)]
    plain = "size,price,color,sold,label\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    quoted = plain.replace("red", '"r\n""e""d"').replace("\n", "\r\n")
    return [plain.encode(), ("\ufeff" + quoted).encode(), plain.replace(",", ";").replace(".", ",").encode("latin-1"),
            plain.replace(",", "\t").encode("utf-16")]


def _read_csv(task: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        from hpcai_cli.engine.raw.table_encoding import encode
        from hpcai_cli.engine.raw.tables import read_table
        from hpcai_cli.recipe import Recipe

        (folder / "table.csv").write_bytes(content)
        label = "label" if task == "classification" else "price"
        recipe = Recipe(name="table", summary="", inputs="features", task=task, test_fraction=0.2)
        encode(read_table(folder, label=label, task=task), recipe)
    return read


# ---- CIFAR ----

def _cifar_binary() -> list[bytes]:
    return [b"".join(bytes([number]) + _source().randbytes(3072) for number in range(3))]


def _read_cifar_binary(folder: Path, content: bytes) -> None:
    from hpcai_cli.engine.raw.cifar import read_cifar

    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / f"{name}.bin").write_bytes(content)
    read_cifar(folder)


def _cifar_pickles() -> list[bytes]:
    import numpy as np

    rows = np.frombuffer(_source().randbytes(2 * 3072), np.uint8).reshape(2, 3072)
    batch = {"batch_label": "training", "data": rows, "fine_labels": [3, 99], "filenames": ["a.png", "b.png"]}
    return [pickle.dumps(batch | {"fine_labels": labels}, protocol) for protocol in (2, 3, 4, 5)
            for labels in ([3, 99], np.array([3, 99]))]


def _read_cifar_pickle(folder: Path, content: bytes) -> None:
    from hpcai_cli.engine.raw.cifar import read_cifar

    for name in ("train", "test"):
        (folder / name).write_bytes(content)
    read_cifar(folder, num_classes=100)


# ---- dataset files, models, recipes ----

def _datasets() -> list[bytes]:
    import tempfile

    import numpy as np

    from hpcai_cli.engine import store

    made = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, dtype, label_dtype in (("images", "uint8", "int64"), ("features", "float32", "float32")):
            shape = (6, 4, 4, 1) if kind == "images" else (6, 3)
            inputs = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
            arrays = {kind: inputs, "labels": (np.arange(6) % 2).astype(label_dtype)}
            store.write(Path(folder, "d.h5"), {"train": arrays, "test": arrays}, recipe="tiny", source_fingerprint="s",
                        class_names=("a", "b") if kind == "images" else (), options={"seed": 1})
            made.append(Path(folder, "d.h5").read_bytes())
    return made


def _read_dataset(folder: Path, content: bytes) -> None:
    from hpcai_cli.engine import store
    from hpcai_cli.engine.raw import inspection
    from hpcai_cli.errors import HpcaiError

    (folder / "data.h5").write_bytes(content)
    dataset = store.Dataset(folder / "data.h5")
    # A damaged value fails the proof below, but training reads the file without one.
    for split in dataset.splits.values():
        split.inputs[:2].sum()
        split.labels[:2].sum()
    if dataset.inputs_name == "images":
        with contextlib.suppress(HpcaiError):
            inspection.draw_contact_sheet(folder / "data.h5", folder / "sheet.png", per_class=1)
    inspection.inspect(folder / "data.h5")


def _checkpoints() -> list[bytes]:
    import numpy as np

    content = io.BytesIO()
    np.savez(content, **{"model-0": np.ones((3, 4), np.float32), "model-1": np.arange(4), "optimizer-0": np.int64(7)})
    return [content.getvalue()]


def _read_checkpoint(folder: Path, content: bytes) -> None:
    from hpcai_cli.engine import checkpoint

    step = folder / "step-00000001"
    step.mkdir(exist_ok=True)
    values = {"step": 1, "epoch": 0, "cursor": 0, "sums": [], "history": [], "best": {}, "fingerprint": "f"}
    parts = {"arrays.npz": content, "state.json": json.dumps(values).encode()}
    for name, part in parts.items():
        (step / name).write_bytes(part)
    # Whoever damages a file on purpose writes its hash too.
    (step / "manifest.json").write_text(json.dumps({"sha256": {
        name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}}))
    checkpoint.read(step)


def _models() -> list[bytes]:
    import tempfile

    import keras

    keras.utils.set_random_seed(0)
    layers = [keras.Input((4, 4, 1)), keras.layers.Conv2D(2, 3), keras.layers.BatchNormalization(),
              keras.layers.Flatten(), keras.layers.Dense(3)]
    with tempfile.TemporaryDirectory() as folder:
        keras.Sequential(layers).save(Path(folder, "model.keras"))
        return [Path(folder, "model.keras").read_bytes()]


def _read_model(folder: Path, content: bytes) -> None:
    from hpcai_cli.engine import model_file

    path = folder / "model.keras"
    path.write_bytes(content)
    model_file.check(path)
    # What passes the check Keras must survive too; building takes long, so not for each.
    if zlib.crc32(content) % 20 == 0:
        model_file.load(path)


def _model_parts(part: str) -> Callable[[], list[bytes]]:
    def good() -> list[bytes]:
        with zipfile.ZipFile(io.BytesIO(_models()[0])) as archive:
            return [archive.read(part)]
    return good


def _read_model_part(part: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        members = {name: (folder / name).read_bytes() if (folder / name).exists() else b"" for name in _MODEL_PARTS}
        if not all(members.values()):
            with zipfile.ZipFile(io.BytesIO(_models()[0])) as archive:
                members = {name: archive.read(name) for name in _MODEL_PARTS}
            for name, member in members.items():
                (folder / name).write_bytes(member)
        _read_model(folder, _zip_of(members | {part: content}, zipfile.ZIP_STORED))
    return read


def _tflite() -> list[bytes]:
    import keras
    import numpy as np

    from hpcai_cli.engine.compression import quantization

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Conv2D(2, 3), keras.layers.Flatten(),
                              keras.layers.Dense(3)])
    return [quantization.convert(model, (4, 4, 1), kind=kind, calibration=np.zeros((2, 4, 4, 1), np.uint8))
            for kind in ("float32", "int8")]


def _read_tflite(folder: Path, content: bytes) -> None:
    from hpcai_cli.engine import tflite_file

    # What passes is tried in a process of its own, which may crash: that takes seconds, and is not for this.
    tflite_file.check(content)


def _onnx() -> list[bytes]:
    import numpy as np
    import onnx

    weights = [onnx.numpy_helper.from_array(np.ones(shape, np.float32), name)
               for name, shape in (("kernel", (2, 1, 3, 3)), ("matrix", (8, 3)))]
    nodes = [onnx.helper.make_node("Conv", ["inputs", "kernel"], ["maps"]),
             onnx.helper.make_node("Relu", ["maps"], ["positive"]),
             onnx.helper.make_node("Flatten", ["positive"], ["flat"]),
             onnx.helper.make_node("MatMul", ["flat", "matrix"], ["scores"])]
    number = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes, "tiny", [onnx.helper.make_tensor_value_info("inputs", number, ["n", 1, 4, 4])],
        [onnx.helper.make_tensor_value_info("scores", number, ["n", 3])], weights)
    return [onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)],
                                   ir_version=8).SerializeToString()]


def _read_onnx(folder: Path, content: bytes) -> None:
    import numpy as np

    from hpcai_cli.engine import onnx_file

    run, shape, dtype = onnx_file.runner(content, threads=1)
    # What it raises is told by those who ask it; it must not end the process.
    with contextlib.suppress(Exception):
        run(np.ones([size or 2 for size in shape], dtype))


_MODEL_PARTS = ("metadata.json", "config.json", "model.weights.h5")
_VALUES = {"name": "tiny", "epochs": 3, "learning_rate": 0.01, "precision": "float32", "input_shape": [28, 28, 1],
           "class_names": ["a", "b"], "num_classes": 2, "options": {"width": 16, "dropout": 0.5, "fast": True}}


def _json() -> list[bytes]:
    return [json.dumps(_VALUES, indent=indent).encode() for indent in (None, 2)]


def _toml() -> list[bytes]:
    return [b'epochs = 3\nlearning_rate = 1e-2\nprecision = "float32"\ninput_shape = [28, 28, 1]\n'
            b'class_names = ["a", "b"]\n\n[options]\nwidth = 16\nfast = true\ndropout = 0.5 # half\n',
            b"epochs = 1_000\nbatch_size = 0x20\nsummary = '''\na\n'''\noptions.width = 1\n"]


def _read_recipe(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        from hpcai_cli.recipe import Recipe, read_values

        (folder / name).write_bytes(content)
        values = read_values(folder / name)
        Recipe(**(_VALUES | {"summary": ""})).override(values)
    return read


FORMATS = {
    "idx-images": Format(lambda: [_idx(5, 8, 8)], _read_idx("train-images-idx3-ubyte")),
    "idx-labels": Format(lambda: [_idx(5)], _read_idx("train-labels-idx1-ubyte")),
    "idx-gzip": Format(lambda: [_gzip(_idx(5, 8, 8))], _read_idx("train-images-idx3-ubyte"), _gzip, gzip.decompress),
    "zip": Format(_zip, _unpack),
    "tar": Format(_tars, _unpack, _tar_sums),
    "tar-gzip": Format(lambda: [_gzip(tar) for tar in _tars()], _unpack, lambda content: _gzip(_tar_sums(content)),
                       gzip.decompress),
    "png": Format(_images("PNG", ("RGB", "RGBA", "P", "L", "1", "I;16", "LA")), _read_image, _png_sums),
    "jpeg": Format(_images("JPEG", ("RGB", "L", "CMYK")), _read_image),
    "gif": Format(_images("GIF", ("P", "L")), _read_image),
    "bmp": Format(_images("BMP", ("RGB", "P", "L", "1")), _read_image),
    "webp": Format(_images("WEBP", ("RGB", "RGBA")), _read_image),
    "tiff": Format(lambda: [*_images("TIFF", ("RGB", "CMYK", "P", "F"))(),
                            *_images("TIFF", ("RGB",), compression="tiff_lzw")(),
                            *_images("TIFF", ("L",), compression="tiff_adobe_deflate")(),
                            *_images("TIFF", ("RGB",), compression="jpeg")()], _read_image),
    "csv": Format(_csv, _read_csv("classification"), is_text=True),
    "csv-regression": Format(_csv, _read_csv("regression"), is_text=True),
    "cifar-binary": Format(_cifar_binary, _read_cifar_binary),
    "cifar-pickle": Format(_cifar_pickles, _read_cifar_pickle),
    "dataset": Format(_datasets, _read_dataset),
    "recipe-json": Format(_json, _read_recipe("recipe.json"), is_text=True),
    "recipe-toml": Format(_toml, _read_recipe("recipe.toml"), is_text=True),
    "checkpoint": Format(_checkpoints, _read_checkpoint),
    "model": Format(_models, _read_model),
    "model-config": Format(_model_parts("config.json"), _read_model_part("config.json"), is_text=True),
    "model-weights": Format(_model_parts("model.weights.h5"), _read_model_part("model.weights.h5")),
    "tflite": Format(_tflite, _read_tflite),
    "onnx": Format(_onnx, _read_onnx),
}
