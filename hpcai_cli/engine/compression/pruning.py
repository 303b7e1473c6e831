"""Magnitude pruning in the training step: the smallest weights of each kernel go to zero and stay there.

What is pruned shows in the weights themselves, as zeros, so that a checkpoint needs nothing more and a resumed training
goes on exactly.
"""

import keras
import tensorflow as tf

from hpcai_cli.errors import UnsuitableError

PATTERNS = ("unstructured", "2:4")
EVERY = 20
"""Steps between two updates of what is zero; in between the other weights recover."""
BEGIN, END = 0.0, 0.6
"""Shares of the training in which weights go; the rest of it only recovers."""
SMALL = 0.01
"""Kernels with a smaller share of all weights are left alone: they cost little and are the most sensitive, as the first
convolution is."""
_KERNELS = {"Dense": "kernel", "Conv1D": "kernel", "Conv2D": "kernel", "Conv3D": "kernel", "Conv2DTranspose": "kernel",
            "SeparableConv2D": "pointwise_kernel", "SeparableConv1D": "pointwise_kernel", "EinsumDense": "kernel"}
"""Where each class of layers keeps the weights that can go; a depthwise kernel has too few."""


def prunable(model: keras.Model, pattern: str) -> tuple[dict[str, keras.Variable], list[str]]:
    """Return the kernels to prune by their layers' names, and the names of layers with weights that are left alone."""
    layers = [layer for layer in model._flatten_layers(recursive=True, include_self=False) if layer.weights
              and not isinstance(layer, keras.Model)]
    total = sum(variable.shape.num_elements() for layer in layers for variable in layer.trainable_variables)
    chosen, left = {}, []
    for layer in layers:
        kernel = getattr(layer, _KERNELS.get(type(layer).__name__, ""), None)
        if kernel is None or not kernel.trainable:
            left += [layer.name] if len(layer.weights[0].shape) > 1 else []
        elif kernel.shape.num_elements() < SMALL * total or pattern == "2:4" and kernel.shape[-2] % 4:
            left.append(layer.name)
        else:
            chosen[layer.name] = kernel
    return chosen, left


class MagnitudePruning:
    """Sets the weights of smallest magnitude to zero while a model trains.

    Sources: the schedule is equation 1 of Zhu and Gupta, arXiv 1710.01878; two of each four weights along the inputs is
    the pattern of arXiv 2104.08378.

    Args:
        model: with the kernels in float32.
        sparsity: share of the weights of all prunable kernels and of those left alone that is zero at the end, in
            (0, 1); without a meaning for 2:4, which is half.
        pattern: one of PATTERNS.
        steps: of the whole training.

    Raises:
        UnsuitableError: the model has nothing to prune, or not enough of it.
    """

    def __init__(self, model: keras.Model, *, sparsity: float, pattern: str = "unstructured", steps: int):
        chosen, left = prunable(model, pattern)
        if not chosen:
            raise UnsuitableError("the model has no layers that can be pruned this way",
                                  expected="convolutions or dense layers with enough weights",
                                  received=", ".join(left) or "no layers with weights")
        self._kernels, self._pattern = list(chosen.values()), pattern
        reached = sum(kernel.shape.num_elements() for kernel in self._kernels)
        aside = sum(_kernel_sizes(model)) - reached
        # What is left alone makes the others sparser, so that the whole is as sparse as it was asked for.
        self.sparsity = sparsity * (reached + aside) / reached
        if pattern == "unstructured" and self.sparsity >= 1:
            raise UnsuitableError("the layers that can be pruned are too small a part of the model for this sparsity",
                                  expected=f"less than {reached / (reached + aside):.3f}", received=sparsity)
        self._first, self._last = int(BEGIN * steps), max(1, int(END * steps))

    def kept(self) -> list[tf.Tensor]:
        """Return which weights are not zero, bool tensors, before an update."""
        return [tf.not_equal(kernel.value, 0.0) for kernel in self._kernels]

    def apply(self, kept: list[tf.Tensor], step: tf.Tensor) -> None:
        """Set to zero again what an update has moved, and further weights where it is time.

        Args:
            kept: what `kept` returned before the update.
            step: updates so far, the last one included, int64 ().
        """
        sparsity = self._at(tf.cast(step, tf.float32))
        due = (step % EVERY == 1) & (step <= self._last) | (step == self._last)
        for kernel, mask in zip(self._kernels, kept, strict=True):
            weights = kernel.value * tf.cast(mask, kernel.dtype)
            kernel.assign(tf.cond(due, lambda weights=weights: self._thinned(weights, sparsity),
                                  lambda weights=weights: weights))

    def _at(self, step: tf.Tensor) -> tf.Tensor:
        share = tf.clip_by_value((step - self._first) / max(1, self._last - self._first), 0.0, 1.0)
        return self.sparsity * (1 - (1 - share) ** 3)

    def _thinned(self, weights: tf.Tensor, sparsity: tf.Tensor) -> tf.Tensor:
        sizes = tf.abs(weights)
        if self._pattern == "2:4":
            return tf.where(_two_largest_of_four(sizes), weights, 0.0)
        flat = tf.sort(tf.reshape(sizes, [-1]))
        count = tf.size(flat)
        # The largest of those that go; without any to go, nothing is smaller than the smallest.
        place = tf.cast(tf.round(sparsity * tf.cast(count, tf.float32)), tf.int32)
        threshold = tf.where(place > 0, flat[tf.maximum(place - 1, 0)], -1.0)
        return tf.where(sizes > threshold, weights, 0.0)


class KeptZeros:
    """Keeps at zero what a pruning before this training has set to zero; the same functions as MagnitudePruning."""

    def __init__(self, model: keras.Model):
        self._kernels = [variable for variable in model.trainable_variables if len(variable.shape) > 1]

    def kept(self) -> list[tf.Tensor]:
        """Return which weights are not zero, bool tensors, before an update."""
        return [tf.not_equal(kernel.value, 0.0) for kernel in self._kernels]

    def apply(self, kept: list[tf.Tensor], step: tf.Tensor) -> None:
        """Set to zero again what an update has moved."""
        for kernel, mask in zip(self._kernels, kept, strict=True):
            kernel.assign(kernel.value * tf.cast(mask, kernel.dtype))


def _kernel_sizes(model: keras.Model) -> list[int]:
    return [variable.shape.num_elements() for variable in model.trainable_variables if len(variable.shape) > 1]


def _two_largest_of_four(sizes: tf.Tensor) -> tf.Tensor:
    """Return the mask of the two largest of each four neighbors along the inputs, the last axis but one."""
    inputs, outputs = sizes.shape[-2:]
    groups = tf.reshape(sizes, [-1, inputs // 4, 4, outputs])
    # By rank and not by a threshold: of equal weights no third one stays.
    order = tf.argsort(tf.argsort(groups, axis=2, direction="DESCENDING", stable=True), axis=2)
    return tf.reshape(order < 2, sizes.shape)
