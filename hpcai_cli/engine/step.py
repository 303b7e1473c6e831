"""The training step: forward, backward, averaged over the ranks, applied; some in a row, compiled once."""

import re
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from hpcai_cli.engine.compression.distillation import Teacher
from hpcai_cli.engine.compression.pruning import KeptZeros, MagnitudePruning
from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.engine.learning_rates import ChangingRates, learning_rates
from hpcai_cli.engine.model import moving_statistics
from hpcai_cli.engine.pipeline import Block
from hpcai_cli.engine.task import task_of
from hpcai_cli.errors import UsageError
from hpcai_cli.recipe import Recipe

HALT = 2.0
"""A wish to commit that no further step may be taken before."""


class Wishes:
    """What this rank wishes while compiled steps run; any thread may set it, and the next step has it.

    Attributes:
        stop: float32 (), 1 from when this rank was asked to stop.
        save: float32 (), 1 while rank 0 finds that a checkpoint is due.
        commit: float32 (), 1 while rank 0 of an elastic job finds that the state should be kept in memory, 2 (HALT)
            while ranks wait to take part.
        halted: bool (), true when a step saw that a rank was asked to stop or that ranks wait; no step is taken then.
    """

    def __init__(self):
        with tf.device("CPU:0"):
            self.stop = tf.Variable(0.0, trainable=False)
            self.save = tf.Variable(0.0, trainable=False)
            self.commit = tf.Variable(0.0, trainable=False)
            self.halted = tf.Variable(False, trainable=False)

    def begin(self) -> None:
        """Take back what is still set of an earlier beginning: all ranks have to begin alike."""
        for wish in (self.save, self.commit):
            wish.assign(0.0)
        self.halted.assign(False)


def compile_steps(model: keras.Model, optimizer: keras.optimizers.Optimizer, recipe: Recipe,
                  ranks: Serial | Horovod, *, block: Block, augment: Callable | None = None,
                  weight_of_class: np.ndarray | None = None, teacher: Teacher | None = None,
                  pruning: MagnitudePruning | KeptZeros | None = None, wishes: Wishes | None = None) -> Callable:
    """Return the compiled steps (inputs, labels, weights, seed, count) -> sums, for blocks like `block`.

    inputs, labels and weights are a block's, of which the first `count`, int32 (), steps are taken, or fewer when a
    rank was asked to stop or ranks wait to take part: none after the one in which all see it. seed, int32 (2,), is the
    augmentation's for the first of them. `sums` is float32 (g, 5), a row for each step: the mean loss over the step's
    examples of all ranks, the sum of the task's measure over them (how many were classified rightly), how many ranks
    were asked to stop, how many wish a checkpoint, and the wish to commit.

    Args:
        weight_of_class: float32 (num_classes,), the weight of each class's examples in the loss.
        teacher: whose scores the model learns beside the labels.
        pruning: sets weights to zero after each update.
        wishes: this rank's; nobody's by default.
    """
    task, wishes = task_of(recipe), wishes or Wishes()
    trainable = model.trainable_variables
    statistics = moving_statistics(model)

    @tf.function
    def augmented(inputs, seed):
        # AutoGraph is for the recipe's function alone, which may branch: converting ours takes longer than tracing it.
        return augment(inputs, seed)

    def losses_of(labels, scores):
        losses = task.losses(labels, scores)
        return losses if weight_of_class is None else losses * tf.cast(tf.gather(weight_of_class, labels), losses.dtype)

    def loss_of(inputs, labels, weights, seed):
        if recipe.mixup:
            inputs, share = mixed(inputs, seed, alpha=recipe.mixup)
        if teacher is not None:
            labels, taught = teacher.taught(labels, inputs)
        scores = task.scores(model(inputs, training=True))
        losses = losses_of(labels, scores)
        if recipe.mixup:
            losses = share * losses + (1 - share) * losses_of(tf.roll(labels, 1, axis=0), scores)
        if teacher is not None:
            losses = teacher.losses(losses, scores, taught)
        # Regularization counts once per step: the weights of a whole step sum to the number of ranks.
        weights = tf.cast(weights, losses.dtype)
        loss = tf.reduce_sum(losses * weights) + sum(model.losses, 0.0) * tf.reduce_sum(weights)
        measures = tf.cast(task.measures(labels, scores), tf.float32)
        return loss, tf.reduce_sum(tf.where(weights > 0, measures, 0.0))

    def gradients_of(inputs, labels, weights, seed):
        with tf.GradientTape() as tape:
            loss, measure = loss_of(inputs, labels, weights, seed)
            scaled = optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, trainable, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return gradients, tf.stack([tf.cast(loss, tf.float32), measure])

    def accumulated(inputs, labels, weights, seed):
        def add(number, totals, sums):
            part = slice(number * recipe.batch_size, (number + 1) * recipe.batch_size)
            gradients, more = gradients_of(inputs[part], labels[part], weights[part], seed + [number, 0])
            totals = [a + tf.convert_to_tensor(b) for a, b in zip(totals, gradients, strict=True)]
            return number + 1, totals, sums + more

        # One part after the other: side by side they would need the memory that accumulation is there to save.
        start = (0, [tf.zeros_like(variable.value) for variable in trainable], tf.zeros(2))
        _, gradients, sums = tf.while_loop(lambda number, *_: number < recipe.accumulation_steps, add, start,
                                           parallel_iterations=1)
        return gradients, sums

    def step(inputs, labels, weights, seed):
        if augment is not None:
            inputs = augmented(inputs, seed)
        gradients, sums = (gradients_of if recipe.accumulation_steps == 1 else accumulated)(
            inputs, labels, weights, seed)
        size = ranks.size_in_step()
        sums = tf.concat([sums[:1] / tf.cast(size, tf.float32), sums[1:], [wishes.stop, wishes.save, wishes.commit]],
                         axis=0)
        if tf.is_tensor(size) or size * ranks.parts > 1:
            # Averaged before the optimizer sees them: clipping and the float16 loss scale then decide alike on every
            # rank. Batch norm's moving statistics are averaged too, or the ranks would hold different models.
            gradients, means, sums = ranks.reduce(
                gradients, [variable.value for variable in statistics], sums,
                half=recipe.gradient_compression == "float16", adasum=recipe.gradient_reduction == "adasum")
            for variable, mean in zip(statistics, means, strict=True):
                variable.assign(mean)
        before = pruning.kept() if pruning else None
        optimizer.apply(gradients, trainable)
        if pruning:
            pruning.apply(before, getattr(optimizer, "inner_optimizer", optimizer).iterations)
        return sums

    @tf.function(autograph=False)
    def steps(inputs, labels, weights, seed, count):
        def one(number, halted, rows):
            # Step and rank have a seed of their own, which resuming finds again.
            sums = tf.ensure_shape(step(inputs[number], labels[number], weights[number],
                                        seed + [0, number * ranks.size_in_step()]), (5,))
            return number + 1, (sums[2] > 0) | (sums[4] >= HALT), rows.write(number, sums)

        rows = tf.TensorArray(tf.float32, size=len(block.labels), element_shape=(5,))
        # The same loop for one step and for many: whether steps come alone or together changes no bit of the result.
        _, halted, rows = tf.while_loop(lambda number, halted, _: (number < count) & ~halted, one,
                                        (0, wishes.halted.read_value(), rows), parallel_iterations=1)
        wishes.halted.assign(halted)
        return rows.stack()

    try:
        # One concrete function: looking up the right one at each call takes as long as a small network's step.
        compiled = steps.get_concrete_function(
            *(tf.TensorSpec(array.shape, array.dtype) for array in (block.inputs, block.labels, block.weights)),
            tf.TensorSpec((2,), tf.int32), tf.TensorSpec((), tf.int32))
        # The graph alone does not keep its variables.
        compiled.wishes = wishes
        return compiled
    except Exception as error:
        raise UsageError(f"recipe {recipe.name}: augment and model cannot be compiled to a step",
                         expected="an augmented batch that the model takes", received=_cause(error)) from error


def _cause(error: Exception) -> str:
    """Return what a recipe's function raised, in one line."""
    # AutoGraph hides it behind a trace of its own code, and Keras writes it in bold below where it happened.
    hidden = getattr(error, "ag_error_metadata", None)
    text = hidden.cause_message if hidden else f"{type(error).__name__}: {error}"
    bold = re.search(r"\x1b\[1m(.*?)\x1b\[0m", text, re.DOTALL)
    return (bold[1] if bold else text).strip().split("\n")[0]


def mixed(inputs: tf.Tensor, seed: tf.Tensor, *, alpha: float) -> tuple[tf.Tensor, tf.Tensor]:
    """Lay over each example the one before it in the batch (mixup, arXiv 1710.09412).

    Returns:
        float32 inputs, and float32 (b,) in [0.5, 1], the share of each example that is its own.
    """
    draws = tf.random.stateless_gamma([2, tf.shape(inputs)[0]], seed + [5, 0], alpha)
    share = draws[0] / tf.maximum(draws[0] + draws[1], 1e-20)
    # The larger share is the example's own, so that the measure of the training still means something.
    share = tf.maximum(share, 1 - share)
    inputs = tf.cast(inputs, tf.float32)
    place = tf.reshape(share, [-1] + [1] * (len(inputs.shape) - 1))
    return place * inputs + (1 - place) * tf.roll(inputs, 1, axis=0), share


def build_optimizer(recipe: Recipe, *, steps_per_epoch: int, size: int,
                    schedule: ChangingRates | None = None) -> keras.optimizers.Optimizer:
    """Return the recipe's optimizer with its learning-rate schedule for a job of `size` ranks, or with another one."""
    schedule = schedule or learning_rates(recipe, steps_per_epoch=steps_per_epoch, size=size)
    common = {"learning_rate": schedule, "global_clipnorm": recipe.clip_norm or None,
              "weight_decay": recipe.weight_decay or None}
    if recipe.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(momentum=recipe.momentum, nesterov=recipe.momentum > 0, **common)
    else:
        kind = {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW, "lamb": keras.optimizers.Lamb}
        if recipe.optimizer == "adamw":
            common["weight_decay"] = recipe.weight_decay
        optimizer = kind[recipe.optimizer](**common)
    if keras.config.dtype_policy().name == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer
