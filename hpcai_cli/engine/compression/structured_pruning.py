"""Structured pruning: whole filters and units are removed, and the model really becomes smaller.

A channel that goes is missing everywhere (channels.py finds where): its filter, its place in batch normalization, its
part of the kernels behind.
"""

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import keras
import numpy as np
from keras import layers

from hpcai_cli.engine.compression import model_cost
from hpcai_cli.engine.compression.channels import PRODUCING, Graph, joined
from hpcai_cli.engine.model import settle_statistics
from hpcai_cli.errors import DataError, UnsuitableError, UsageError, printable

LEAST_SHARE = 1 / 8
"""Of each layer's channels at least this share stays."""
EVEN_SHARE = 3 / 4
"""Of the share of multiply-accumulates that stays, that each layer's channels keep at least where that goes."""
COST_EXPONENT = 0.15
"""Of what a channel costs, by which its importance is divided. With 0 the cheapest layers lose as many as those at full
resolution, whose time is that of moving their numbers: half of dogs-vs-cats' multiply-accumulates ran 1.4 times faster
then, with 0.15 1.65 times, with 0.5 1.76 times, which takes all from the first layers."""
MULTIPLES = ((64, 16), (16, 8))
"""Layers of at least so many channels keep a multiple of so many, which fills the registers of processors: at the same
multiply-accumulates dogs-vs-cats was about a tenth faster than with half of these."""
LEAST_STRIDED = 16
"""Channels that stay before and behind a convolution of one pixel with strides: with fewer, oneDNN's gradient of it
writes beyond its memory (TensorFlow 2.21)."""


@dataclass(frozen=True)
class Narrowing:
    """What was removed.

    Attributes:
        macs_before, macs_after: multiply-accumulates of one example.
        channels: filters or units of each layer that lost some, (before, after), by the layer's name; a layer of a
            nested model is `body/name`.
        kept: indices of the channels that stayed in the outputs of each layer that lost some, normalization and the
            like included, by the layer's name.
        left_alone: names of layers of which it is not known how they treat channels; those that go in and come out
            stayed.
    """

    macs_before: int
    macs_after: int
    channels: dict[str, tuple[int, int]]
    kept: dict[str, np.ndarray]
    left_alone: tuple[str, ...]


def narrowed(model: keras.Model, input_shape: tuple[int, ...], *, keep_macs: float,
             protect: tuple[str, ...] = ()) -> tuple[keras.Model, Narrowing]:
    """Return a smaller model with the weights of what is left, to be fine-tuned, and what was removed.

    Args:
        model: with one input and one output; it stays as it is.
        input_shape: of one example, without the batch.
        keep_macs: share of the multiply-accumulates that may stay, in (0, 1).
        protect: names of layers whose filters or units all stay.

    Raises:
        UsageError: the share is out of range, a layer to protect does not exist, or the model cannot be cut that far.
        DataError: the model takes no such inputs, or has weights that are no numbers.
    """
    if not 0 < keep_macs < 1:
        raise UsageError("the share of multiply-accumulates to keep is out of range",
                         expected="a number above 0 and below 1", received=keep_macs)
    graph = Graph(model, input_shape, protect)
    kept = _choose(graph, keep_macs)
    smaller = _rebuild(model, graph, kept)
    lost = {member.name: np.flatnonzero(kept[graph.roots(member.outputs)]) for member in graph.members.values()
            if member.axes and not kept[graph.roots(member.outputs)].all()}
    channels = {member.name: (len(member.outputs), len(lost[member.name])) for member in graph.producers()
                if member.name in lost}
    return smaller, Narrowing(model_cost.cost_of(model, input_shape).macs,
                              model_cost.cost_of(smaller, input_shape).macs, channels, lost, graph.left_alone())


def _choose(graph: Graph, keep_macs: float) -> np.ndarray:
    """Return which channels stay, bool by number; only the roots count.

    The least important go first, measured by what they cost (COST_EXPONENT).
    """
    total = _macs(graph, np.ones(len(graph), bool))
    importance = _importance(graph) / _costs(graph, total) ** COST_EXPONENT
    # Where the share is that of a whole number of channels, the product may fall short of it by a digit.
    target = keep_macs * total * (1 + 1e-9)
    if not len(_order(graph, importance, LEAST_SHARE)):
        raise UnsuitableError("the model has no filters or units that can be removed", expected="convolutions or dense "
                              "layers before the last one", received=", ".join(graph.left_alone()) or "none")
    # Evenly over the layers where that goes far enough; where some layers cannot be cut, the others lose more.
    for share in (max(LEAST_SHARE, EVEN_SHARE * keep_macs), LEAST_SHARE):
        order = _order(graph, importance, share)
        least = _macs(graph, _without(graph, order, importance))
        if least <= target:
            break
    else:
        raise UnsuitableError("the model cannot be cut to this share of its multiply-accumulates",
                              expected=f"at least {np.ceil(least / total * 1000) / 1000:.3f}", received=keep_macs)
    count = bisect.bisect_left(range(len(order)), True, key=lambda count: _macs(
        graph, _without(graph, order[:count], importance)) <= target)
    kept = _without(graph, order[:count], importance)
    # The last layer that lost channels may have lost more than it had to; others take up what is left.
    for roots in sorted(_widths(graph), key=lambda roots: -importance[roots].max()):
        while len(gone := _ascending(roots[~kept[roots]], importance)):
            wider = kept.copy()
            wider[gone[-_multiple(roots):]] = True
            if _macs(graph, wider) > target:
                break
            kept = wider
    return kept


def _order(graph: Graph, importance: np.ndarray, share: float) -> np.ndarray:
    """Return the channels that may go, the least important first, where each layer keeps a share of its own."""
    return _ascending(np.setdiff1d(graph.free(), joined(_reserved(graph, importance, share))), importance)


def _without(graph: Graph, gone: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Return which channels stay when some go, and each layer keeps a whole multiple."""
    kept = np.ones(len(graph), bool)
    kept[gone] = False
    for roots in _widths(graph):
        gone = _ascending(roots[~kept[roots]], importance)
        back = (len(gone) - len(roots)) % _multiple(roots)
        kept[gone[max(0, len(gone) - back):]] = True
    return kept


def _widths(graph: Graph) -> list[np.ndarray]:
    return [graph.roots(member.outputs) for member in graph.producers()]


def _ascending(numbers: np.ndarray, importance: np.ndarray) -> np.ndarray:
    return numbers[np.argsort(importance[numbers], kind="stable")]


def _multiple(channels: np.ndarray) -> int:
    return next((multiple for least, multiple in MULTIPLES if len(channels) >= least), 1)


def _reserved(graph: Graph, importance: np.ndarray, share: float) -> Iterator[np.ndarray]:
    """Return the channels of each layer that stay, a share of them at least."""
    for member in graph.producers():
        roots = _ascending(graph.roots(member.outputs), importance)
        yield roots[-max(1, round(len(roots) * share)):]
        layer = member.layer
        if max(getattr(layer, "kernel_size", (3,))) == 1 and max(layer.strides) > 1:
            yield roots[-LEAST_STRIDED:]
            yield _ascending(np.unique(graph.roots(member.inputs)), importance)[-LEAST_STRIDED:]


def _importance(graph: Graph) -> np.ndarray:
    """Return how important each channel is, float64 by number; only the roots count.

    It is the L2 norm of the filter that makes it, times the scale of the batch normalization behind, and the norm of
    the weights that read it, each relative to the mean of its layer, and the mean over the layers that share it (in the
    manner of arXiv 1608.08710 and 2301.12900).
    """
    sums, counts = np.zeros((2, len(graph))), np.zeros((2, len(graph)))
    for member, kernel, axis, numbers in graph.kernel_axes():
        made = numbers is member.outputs
        weights = np.moveaxis(getattr(member.layer, kernel).numpy(), axis, -1)
        norms = np.sqrt(np.sum(np.square(weights), axis=tuple(range(weights.ndim - 1)), dtype=np.float64))
        norms = norms * member.scale if made else norms
        if not np.isfinite(norms).all():
            raise DataError(f"the weights of layer {printable(member.name)} are no finite numbers",
                            expected="a model whose training has not diverged")
        np.add.at(sums[int(made)], graph.roots(numbers), norms / (norms.mean() or 1.0))
        np.add.at(counts[int(made)], graph.roots(numbers), 1)
    return (sums / np.maximum(counts, 1)).sum(axis=0)


def _costs(graph: Graph, total: int) -> np.ndarray:
    """Return which share of all multiply-accumulates goes with each channel alone, float64 by number."""
    costs = np.ones(len(graph))
    for member in graph.producers():
        roots = np.unique(graph.roots(member.outputs))
        kept = np.ones(len(graph), bool)
        kept[roots[0]] = False
        costs[roots] = max(1, total - _macs(graph, kept)) / total
    return costs


def _macs(graph: Graph, kept: np.ndarray) -> int:
    """Return the multiply-accumulates of one example with the channels that are kept."""
    total = 0
    for member in graph.members.values():
        for kernel, count in member.positions.items():
            axes = member.axes.get(kernel, {}).values()
            others = model_cost.kernel_size(member.layer, kernel) // prod(len(numbers) for numbers in axes)
            total += count * others * prod(int(kept[graph.roots(numbers)].sum()) for numbers in axes)
    return total


def _rebuild(model: keras.Model, graph: Graph, kept: np.ndarray) -> keras.Model:
    """Return a model like this one with the channels that are kept, and their weights."""
    done = {}

    def staying(numbers: np.ndarray) -> np.ndarray:
        return kept[graph.roots(numbers)]

    def rebuilt(layer: keras.Layer) -> keras.Layer:
        if id(layer) not in done:
            member = graph.members[id(layer)]
            if model_cost.is_nested(layer):
                stay = staying(member.inputs)
                done[id(layer)] = _narrower_model(layer, None if stay.all() else int(stay.sum()), rebuilt)
            else:
                done[id(layer)] = _narrower_layer(layer, int(staying(member.outputs).sum()))
        return done[id(layer)]

    try:
        smaller = rebuilt(model)
    except Exception as error:
        first_line = printable(str(error).strip().split("\n")[0])
        raise UnsuitableError(f"the model cannot be made again with fewer filters: {first_line}",
                              expected="layers that get_config and from_config make again") from error
    for member in graph.members.values():
        new = done[id(member.layer)]
        if new is member.layer or model_cost.is_nested(new):
            continue
        for old, variable in zip(member.layer.variables, new.variables, strict=True):
            value = old.numpy()
            for axis, numbers in member.axes.get(old.name, {}).items():
                value = np.compress(staying(numbers), value, axis)
            variable.assign(value)
    settle_statistics(smaller)
    return smaller


def _narrower_layer(layer: keras.Layer, channels: int) -> keras.Layer:
    """Return a new layer with so many output channels; 0 for one that is not to change."""
    if not isinstance(layer, keras.Layer):
        return layer  # An operation of Keras has no state.
    config = layer.get_config()
    if channels and type(layer) in PRODUCING:
        config["units" if type(layer) is layers.Dense else "filters"] = channels
    if channels and type(layer) is layers.Reshape and config["target_shape"][-1] != -1:
        config["target_shape"] = (*config["target_shape"][:-1], channels)
    return type(layer).from_config(config)


def _narrower_model(model: keras.Model, channels: int | None, rebuilt: Callable) -> keras.Model:
    """Return a new model of rebuilt layers, its one input with so many channels; None for as many as before."""
    inputs = None
    if channels is not None:
        inputs = keras.tree.map_structure(
            lambda tensor: keras.Input(batch_shape=(*tensor.shape[:-1], channels), dtype=tensor.dtype,
                                       name=tensor.name),
            model.inputs if isinstance(model, keras.Sequential) else model.input)
    smaller = keras.models.clone_model(model, input_tensors=inputs, clone_function=rebuilt)
    if not model.trainable:
        # A clone begins trainable; its layers have their own mark already.
        smaller.trainable = False
    return smaller
