"""Opens SavedModel folders, which may come from strangers: their operations are compared with a list before TensorFlow
sees them, since a SavedModel is a program that may read, write and call what it likes.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.function_pb2 import FunctionDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from hpcai_cli import console
from hpcai_cli.errors import DataError, printable

FILES = re.compile(r"saved_model\.pb|fingerprint\.pb|variables/variables\.(index|data-\d{5}-of-\d{5})")
"""What a folder may hold."""
LARGEST_GRAPH = 1 << 30
LARGEST_WEIGHTS = 16 << 30
LARGEST_CONSTANT = 1 << 28
"""Elements that one constant may declare: a single value can stand for all of them."""

_OPERATIONS = """
    Abs Acos Acosh Add AddN AddV2 All Any ArgMax ArgMin Asin Asinh Assert Atan Atan2 Atanh AvgPool AvgPool3D
    BatchMatMul BatchMatMulV2 BatchMatMulV3 BatchToSpaceND BiasAdd BroadcastArgs BroadcastTo Bucketize Case Cast Ceil
    ClipByValue ConcatV2 Const Conv2D Conv2DBackpropInput Conv3D Conv3DBackpropInputV2 Cos Cosh CropAndResize Cumprod
    Cumsum DenseBincount DepthToSpace DepthwiseConv2dNative DepthwiseConv2dNativeBackpropInput Div DivNoNan Einsum Elu
    EmptyTensorList EnsureShape Equal Erf Erfc Exp ExpandDims Expm1 ExtractImagePatches FakeQuantWithMinMaxArgs
    FakeQuantWithMinMaxVars FakeQuantWithMinMaxVarsPerChannel Fill Floor FloorDiv FloorMod FusedBatchNorm
    FusedBatchNormV2 FusedBatchNormV3 Gather GatherNd GatherV2 Greater GreaterEqual Identity IdentityN If
    ImageProjectiveTransformV3 InvertPermutation IsFinite IsInf IsNan L2Loss LeakyRelu Less LessEqual LinSpace Log
    Log1p LogicalAnd LogicalNot LogicalOr LogSoftmax LowerBound LRN MatMul MatrixBandPart Max Maximum MaxPool
    MaxPool3D MaxPoolV2 Mean Min Minimum MirrorPad Mod Mul MulNoNan Neg NoOp NotEqual OneHot OnesLike Pack Pad PadV2
    PartitionedCall Pow PreventGradient Prod QuantizeAndDequantizeV2 QuantizeAndDequantizeV3 QuantizeAndDequantizeV4
    Range Rank ReadVariableOp RealDiv Reciprocal Relu Relu6 Reshape ResizeBicubic ResizeBilinear ResizeNearestNeighbor
    ResourceGather ReverseV2 Rint Roll Round Rsqrt ScatterNd Select SelectV2 Selu Shape ShapeN Sigmoid Sign Sin Sinh
    Size Slice Softmax Softplus Softsign SpaceToBatchND SpaceToDepth Split SplitV Sqrt Square SquaredDifference
    Squeeze StatefulPartitionedCall StatelessCase StatelessIf StatelessWhile StopGradient StridedSlice Sub Sum Tan
    Tanh TensorListConcatV2 TensorListElementShape TensorListFromTensor TensorListGetItem TensorListLength
    TensorListPopBack TensorListPushBack TensorListReserve TensorListSetItem TensorListStack TensorScatterUpdate Tile
    TopKV2 Transpose TruncateDiv TruncateMod Unpack UnsortedSegmentSum UpperBound Where While Xdivy Xlogy ZerosLike
"""
ALLOWED = set(_OPERATIONS.split())
"""Operations of inference; none of them touches a file, another process, or memory that outlasts the call."""
SAVING = {"AssignVariableOp", "DisableCopyOnRead", "MergeV2Checkpoints", "RestoreV2", "SaveV2", "ShardedFilename",
          "StaticRegexFullMatch", "StringJoin"}
"""What the functions have, beside ALLOWED, by which a SavedModel saves itself; loading and answering call none."""
_PLAIN_ATTRIBUTES = {"_input_shapes", "_construction_context"}
"""Any other attribute of a function could make TensorFlow take it in another's place (`api_implements`)."""


def runner(folder: Path, *, trust: bool = False) -> tuple[Callable[[np.ndarray], np.ndarray], tuple, np.dtype]:
    """Return the model's inference, inputs (b, ...) -> outputs, and shape and type of what it takes.

    In the shape None stands for any size.

    Args:
        trust: leave out the check of files and operations, for a folder that you made yourself.

    Raises:
        DataError: the folder is broken, or holds what is not allowed.
    """
    try:
        if trust:
            _check_files(folder, trust)
        else:
            check(folder)
        with console.quiet():
            loaded = tf.saved_model.load(str(folder))
        names = [name for name in ("serving_default", "serve", *loaded.signatures) if name in loaded.signatures]
        if not names:
            raise ValueError("it has no signature to call")
        signature = loaded.signatures[names[0]]
        inputs, outputs = signature.structured_input_signature[1], signature.structured_outputs
        if (len(inputs), len(outputs)) != (1, 1):
            raise ValueError(f"it has {len(inputs)} inputs and {len(outputs)} outputs")
        (name, given), (taken,) = *inputs.items(), outputs
        if given.shape.rank is None or given.dtype not in (tf.float32, tf.uint8):
            raise ValueError(f"it takes {given.dtype.name} {given.shape}, where uint8 or float32 of a known rank is "
                             "expected")
    except Exception as error:
        raise _unusable(error) from None

    def run(inputs: np.ndarray) -> np.ndarray:
        # What was loaded goes with the last reference to it, and its variables with it.
        assert loaded is not None
        return signature(**{name: tf.constant(inputs)})[taken].numpy()
    return run, tuple(given.shape), np.dtype(given.dtype.as_numpy_dtype)


def check(folder: Path) -> None:
    """Refuse what does more than inference, without running anything.

    Raises:
        DataError: what is wrong.
    """
    try:
        _check_files(folder, trust=False)
        _check_operations(SavedModel.FromString((folder / "saved_model.pb").read_bytes()))
    except Exception as error:
        raise _unusable(error) from None


def _unusable(error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
    return DataError(f"this SavedModel cannot be used: {printable(first_line)}",
                     expected="one input, one output and operations of inference only",
                     mend="if it is your own, add --trust-model")


def _check_files(folder: Path, trust: bool) -> None:
    sizes = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ValueError(f"it holds {name}, which is no plain file")
        if path.is_file():
            sizes[name] = path.stat().st_size
    foreign = [name for name in sizes if not FILES.fullmatch(name)]
    if foreign and not trust:
        raise ValueError(f"it holds {', '.join(sorted(foreign)[:3])}, which inference does not need")
    if sizes["saved_model.pb"] > LARGEST_GRAPH or sum(sizes.values()) > LARGEST_WEIGHTS:
        raise ValueError("it is larger than any real model")


def _check_operations(model: SavedModel) -> None:
    if len(model.meta_graphs) != 1 or not model.meta_graphs[0].HasField("object_graph_def"):
        raise ValueError("it is of TensorFlow 1, or has several graphs")
    graph = model.meta_graphs[0]
    functions = {function.signature.name: function for function in graph.graph_def.library.function}
    for node in graph.graph_def.node:
        _check_constants(node)
    called = _called(graph, functions)
    for name, function in functions.items():
        allowed = ALLOWED if name in called else ALLOWED | SAVING
        for node in function.node_def:
            _check_constants(node)
        found = {node.op for node in function.node_def} - allowed - set(functions)
        if found:
            raise ValueError(f"it has the operations {', '.join(sorted(found)[:5])}")


def _called(graph: MetaGraphDef, functions: dict[str, FunctionDef]) -> set[str]:
    """Return the names of the functions that loading or answering may call."""
    pending = [*graph.object_graph_def.concrete_functions,
               *(gradient.gradient_func for gradient in graph.graph_def.library.gradient),
               *(name for name, function in functions.items() if set(function.attr) - _PLAIN_ATTRIBUTES)]
    found = set()
    while pending:
        name = pending.pop()
        if name in functions and name not in found:
            found.add(name)
            pending += _names_in(functions[name].node_def)
    return found


def _names_in(nodes: Iterable[NodeDef]) -> Iterator[str]:
    """Yield the names of all functions that nodes may call: as an operation, or by an attribute."""
    for node in nodes:
        yield node.op
        for value in node.attr.values():
            yield value.func.name
            yield from (function.name for function in value.list.func)


def _check_constants(node: NodeDef) -> None:
    for value in node.attr.values():
        dims = [dim.size for dim in value.tensor.tensor_shape.dim]
        if any(dim < 0 for dim in dims) or int(np.prod(dims, dtype=object)) > LARGEST_CONSTANT:
            raise ValueError(f"its constant {node.name} has the shape {dims}")
