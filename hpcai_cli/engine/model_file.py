"""Opens model.keras files, which may come from strangers: everything in them is checked before Keras sees them.

Keras resolves the `module` and `class_name` pairs of a file to importable objects, which has let files run code
(CVE-2025-1550, CVE-2025-8747, CVE-2025-9905 and others). An exact list of classes is the defence; a prefix is not.
"""

import io
import json
import zipfile
from pathlib import Path

import h5py
import keras

from hpcai_cli.errors import DataError, printable

MEMBERS = {"metadata.json", "config.json", "model.weights.h5"}
LARGEST_CONFIG = 16 << 20
LARGEST_WEIGHTS = 16 << 30
DEEPEST = 100
"""Levels of nesting in a configuration; real models have about ten."""

_LAYERS = """
    Activation ActivityRegularization Add AlphaDropout Attention Average AveragePooling1D AveragePooling2D
    AveragePooling3D BatchNormalization Bidirectional CategoryEncoding CenterCrop Concatenate Conv1D Conv1DTranspose
    Conv2D Conv2DTranspose Conv3D Conv3DTranspose Cropping1D Cropping2D Cropping3D Dense DepthwiseConv1D DepthwiseConv2D
    Dot Dropout EinsumDense ELU Embedding Flatten GaussianDropout GaussianNoise GlobalAveragePooling1D
    GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D
    GroupNormalization GroupQueryAttention GRU GRUCell Identity InputLayer LayerNormalization LeakyReLU LSTM LSTMCell
    Masking MaxPooling1D MaxPooling2D MaxPooling3D Maximum Minimum MultiHeadAttention Multiply Normalization Permute
    PReLU RandomBrightness RandomContrast RandomCrop RandomFlip RandomRotation RandomTranslation RandomZoom ReLU
    RepeatVector Rescaling Reshape Resizing RMSNormalization SeparableConv1D SeparableConv2D SimpleRNN SimpleRNNCell
    Softmax SpatialDropout1D SpatialDropout2D SpatialDropout3D SpectralNormalization StackedRNNCells Subtract
    TimeDistributed UnitNormalization UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D
"""
_INITIALIZERS = """
    Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity LecunNormal LecunUniform Ones Orthogonal
    RandomNormal RandomUniform TruncatedNormal VarianceScaling Zeros
"""
ALLOWED = (
    {("keras.layers", name) for name in _LAYERS.split()}
    | {("keras.initializers", name) for name in _INITIALIZERS.split()}
    | {("keras.regularizers", name) for name in ("L1", "L2", "L1L2", "OrthogonalRegularizer")}
    | {("keras.constraints", name) for name in ("MaxNorm", "MinMaxNorm", "NonNeg", "UnitNorm")}
    | {("keras", "DTypePolicy"), ("keras", "Sequential"), ("keras", "Functional"), ("keras", "Model"),
       ("keras.src.models.functional", "Functional"), ("keras.models", "Sequential")}
    | {("keras.random", "SeedGenerator"), ("keras.src.random.seed_generator", "SeedGenerator")}
)
"""Pairs of module and class that a file may name."""
_MARKERS = {"__keras_tensor__", "__tensor__", "__numpy__", "__tuple__", "__ellipsis__"}
"""What Keras writes in the place of a class name for values that are no objects."""


def load(path: Path, *, trust: bool = False) -> keras.Model:
    """Load a model for inference.

    Args:
        trust: leave out the check of the classes, for files that you made yourself with classes of your own. A file
            from a stranger can then run code.

    Raises:
        DataError: the file is missing, broken, or names something that is not on the list.
    """
    check(path, trust=trust)
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=not trust)
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        raise DataError(f"{path} is no model that Keras can load: {printable(first_line)}",
                        expected="a model.keras from `hpcai train`",
                        mend="if it has classes of your own, add --trust-model") from error


def check(path: Path, *, trust: bool = False) -> None:
    """Check the archive, its configuration and its weights file without building anything.

    Raises:
        DataError: what is wrong.
    """
    if not path.is_file():
        is_form = path.absolute().parent.parent.name == "compressed"
        raise DataError("the model file does not exist", expected="a model.keras, which a finished training writes",
                        mend="finish it with the same `hpcai compress`" if is_form
                        else f"finish the training with `hpcai train --resume {path.parent}`", received=str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            sizes = {part.filename: part.file_size for part in parts}
            if set(sizes) != MEMBERS or len(sizes) != len(parts):
                raise ValueError(f"it holds {', '.join(sorted(sizes)[:5]) or 'nothing'}")
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                # A few kilobytes could unpack to more than the memory holds.
                raise ValueError("its parts are packed, which Keras never does")
            if (sizes["config.json"] > LARGEST_CONFIG or sizes["model.weights.h5"] > LARGEST_WEIGHTS
                    or sum(sizes.values()) > path.stat().st_size):
                raise ValueError("its parts are larger than the file, or than any real model's")
            if any(part.compress_size != part.file_size for part in parts):
                # zipfile takes the memory for what a part says it has in the file before it reads.
                raise ValueError("its parts have two different sizes")
            if not trust:
                _check_config(json.loads(archive.read("config.json")))
            with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as weights:
                check_weights(weights, sizes["model.weights.h5"])
    except (OSError, EOFError, ValueError, TypeError, KeyError, RuntimeError, OverflowError,
            zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no model file that can be trusted: {printable(str(error))}",
                        expected="a model.keras from `hpcai train`") from None


def _check_config(config: object) -> None:
    pending = [(config, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > DEEPEST:
            raise ValueError("its configuration is nested too deeply")
        if isinstance(value, dict):
            if "class_name" in value:
                _check_class(value)
            pending += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            pending += [(item, depth + 1) for item in value]


def _check_class(value: dict) -> None:
    name, module = str(value["class_name"]), value.get("module")
    if name in _MARKERS and module is None:
        return
    registered = value.get("registered_name")
    if (str(module), name) not in ALLOWED or registered not in (None, name):
        as_what = "" if registered in (None, name) else f" as {registered}"
        raise ValueError(f"it names the class {module}.{name}{as_what}, which is not on the list of allowed ones; if "
                         "the file is your own, add --trust-model")


def check_weights(weights: h5py.File, size: int) -> None:
    """Refuse links and storage outside the file, and datasets that are more than the file is long."""
    pending, seen, total = [weights], set(), 0
    while pending:
        group = pending.pop()
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"its weights have a link at {name}")
            item = group[name]
            # Each object once: with two links from each group to the next, the paths would double at every level.
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                raise ValueError(f"its weights have {name} in two places")
            seen.add(address)
            if isinstance(item, h5py.Group):
                pending.append(item)
                continue
            if not isinstance(item, h5py.Dataset) or item.is_virtual or item.external:
                raise ValueError(f"its weights keep {name} outside the file")
            total += (item.size or 0) * item.dtype.itemsize
            if item.dtype.kind == "O" or total > size:
                raise ValueError(f"its weights say that {name} is larger than the file")
