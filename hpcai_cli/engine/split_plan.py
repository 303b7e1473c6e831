"""Which layers of a model are split over the ranks that share it, and how."""

from collections import Counter
from dataclasses import dataclass

import keras
from keras import layers

from hpcai_cli.engine.compression import model_cost
from hpcai_cli.engine.compression.channels import POINTWISE
from hpcai_cli.engine.split_layers import ColumnDense, GatheredDense, PartDropout, RowDense

LEAST_WIDTH = 64
"""Columns of a dense layer that each rank gets at least: with fewer a rank's product is over before a message is, which
takes a millisecond."""
_PLAIN_REGULARIZERS = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)
_ACTIVATIONS = {layers.ReLU, layers.LeakyReLU, layers.ELU, layers.Identity}


@dataclass(frozen=True)
class Split:
    """A layer that is to be split."""

    layer: keras.Layer
    name: str
    """The layer's, behind those of the models it is nested in."""
    kind: type
    """What it becomes, one of `split_layers.AXES`."""


class _Graph:
    """Which calls of layers read what others give."""

    def __init__(self, model: keras.Model, input_shape: tuple[int, ...]):
        # All of them are kept, because tensors are known by their identities.
        self._all = model_cost.calls(model, input_shape)
        self.calls = [call for call in self._all if not model_cost.is_nested(call.layer)]
        self._times = Counter(id(call.layer) for call in self.calls)
        self._ends = {id(tensor) for tensor in self._all[-1].outputs}
        self._readers: dict[int, list[model_cost.Call]] = {}
        for call in self.calls:
            for tensor in call.inputs:
                self._readers.setdefault(id(tensor), []).append(call)

    def is_called_once(self, call: model_cost.Call) -> bool:
        return self._times[id(call.layer)] == 1

    def behind(self, call: model_cost.Call) -> model_cost.Call | None:
        """Return the one call that reads what this one gives; None where there are others, or it reads more."""
        if len(call.outputs) != 1 or id(call.outputs[0]) in self._ends:
            return None
        readers = self._readers.get(id(call.outputs[0]), [])
        return readers[0] if len(readers) == 1 and len(readers[0].inputs) == 1 and self.is_called_once(
            readers[0]) else None


def plan(model: keras.Model, input_shape: tuple[int, ...], parts: int) -> list[Split]:
    """Return the layers to split, in the order in which they are called.

    Each dense layer that is wide enough is split by columns. Where another one follows, with nothing between them but
    what treats each number by itself, that is split by rows; otherwise the outputs are gathered.

    Args:
        input_shape: of one example, without the batch.

    Raises:
        DataError: the model's shapes cannot be told.
    """
    graph = _Graph(model, input_shape)
    found: dict[int, Split] = {}
    for call in graph.calls:
        if id(call.layer) in found or not graph.is_called_once(call) or not _is_wide(call.layer, parts):
            continue
        between, partner = _followed(graph, call)
        kinds = [(call, ColumnDense if partner else GatheredDense)]
        if partner:
            kinds += [(each, PartDropout) for each in between if type(each.layer) is layers.Dropout]
            kinds.append((partner, RowDense))
        found |= {id(each.layer): Split(each.layer, each.name, kind) for each, kind in kinds}
    return list(found.values())


def _followed(graph: _Graph, call: model_cost.Call) -> tuple[list[model_cost.Call], model_cost.Call | None]:
    """Return the dense layer that follows and the layers between; None where there is none that can be split."""
    between = []
    behind = graph.behind(call)
    while behind and _treats_each_number_by_itself(behind.layer):
        between.append(behind)
        behind = graph.behind(behind)
    return between, behind if behind and _can_be_split(behind.layer) else None


def _is_wide(layer: keras.Layer, parts: int) -> bool:
    return _can_be_split(layer) and layer.activation in POINTWISE and (
        layer.units >= parts * LEAST_WIDTH and layer.units % parts == 0)


def _can_be_split(layer: keras.Layer) -> bool:
    """Tell whether a layer is a dense one that is trained, without anything that takes its weights as a whole."""
    # A class of the user's own may compute whatever it likes.
    return type(layer) is layers.Dense and layer.trainable and not layer.lora_enabled and (
        layer.quantization_mode is None) and all(variable.trainable for variable in layer.weights) and all(
        getattr(layer, name) is None for name in ("activity_regularizer", "kernel_constraint", "bias_constraint")) and (
        all(regularizer is None or type(regularizer) in _PLAIN_REGULARIZERS
            for regularizer in (layer.kernel_regularizer, layer.bias_regularizer)))


def _treats_each_number_by_itself(layer: keras.Layer) -> bool:
    if getattr(layer, "activity_regularizer", None) is not None:
        return False
    if type(layer) is layers.Activation:
        return layer.activation in POINTWISE
    return type(layer) in _ACTIVATIONS or type(layer) is layers.Dropout and layer.noise_shape is None
