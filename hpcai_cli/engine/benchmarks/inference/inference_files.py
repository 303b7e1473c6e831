"""Writes one model in every format that the inference benchmark compares."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from hpcai_cli import console
from hpcai_cli.engine.benchmarks.inference.inference_formats import FORMATS
from hpcai_cli.engine.compression import quantization
from hpcai_cli.engine.deployment import formats
from hpcai_cli.errors import HpcaiError, MissingError, UnsuitableError, printable
from hpcai_cli.run import write_bytes


@dataclass
class Files:
    """The files of one model, written below a folder as they are asked for, each once."""

    model: keras.Model
    folder: Path
    calibration: np.ndarray
    """Examples as stored, (n, *input_shape), from which int8 takes the ranges of the activations."""

    def file(self, name: str) -> Path:
        """Return the file or folder of a format.

        Args:
            name: one of FORMATS.

        Raises:
            UnsuitableError: the model has what the format lacks.
            MissingError: a package is missing that writes the format.
        """
        wanted = FORMATS[name]
        folder = self.folder / f"{wanted.file}-{wanted.conversion}"
        path = folder / formats.FILES[wanted.file]
        if path.exists():
            return path
        folder.mkdir(exist_ok=True)
        shape, dtype = self.calibration.shape[1:], self.calibration.dtype
        if wanted.conversion == "float32":
            return formats.write(self.model, wanted.file, folder, input_shape=shape, dtype=dtype)
        if wanted.file == "tflite":
            write_bytes(path, quantization.convert(self.model, shape, kind=wanted.conversion,
                                                   calibration=self.calibration))
        else:
            _quantize_onnx(self.file("onnx"), path, self.calibration)
        return path


def bytes_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.rglob("*")
                                                          if each.is_file())


def _quantize_onnx(source: Path, target: Path, calibration: np.ndarray) -> None:
    """Write an ONNX file whose weights and activations are int8, per channel, by ONNX Runtime's static quantization.

    As in our TFLite files, the scaling of the inputs stays in float32.
    """
    try:
        import onnx
        from onnxruntime import quantization as tool
    except ImportError as error:
        raise MissingError("quantizing ONNX files needs packages of their own", expected="onnx and onnxruntime",
                           mend="run `pip install 'hpcai[onnx]'`", received=error.name or str(error)) from None
    rows = np.linspace(0, len(calibration) - 1, min(len(calibration), quantization.CALIBRATION_EXAMPLES)).astype(int)

    class Reader(tool.CalibrationDataReader):
        """Gives one example after the other."""

        def __init__(self):
            self._rows = iter(rows)

        def get_next(self) -> dict | None:
            row = next(self._rows, None)
            return None if row is None else {graph.input[0].name: calibration[row:row + 1]}

    try:
        with console.quiet(), tempfile.TemporaryDirectory() as place:
            # Folds what is constant; without it more operators are quantized than there need be.
            folded = Path(place) / "model.onnx"
            tool.quant_pre_process(source, folded, skip_symbolic_shape=True)
            graph = onnx.load(folded).graph
            tool.quantize_static(folded, target, Reader(), per_channel=True, activation_type=tool.QuantType.QUInt8,
                                 weight_type=tool.QuantType.QInt8, nodes_to_exclude=_before_weights(graph))
    except (HpcaiError, MemoryError, OSError):
        raise
    except Exception as error:
        first_line = printable((str(error).strip() or type(error).__name__).split("\n")[0])
        raise UnsuitableError(f"the model cannot be quantized as ONNX: {first_line}") from error


def _before_weights(graph) -> list[str]:
    """Return the names of an ONNX graph's nodes before the first one with weights."""
    names = []
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            break
        names.append(node.name)
    return names
