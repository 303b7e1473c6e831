"""The copies of the model among the ranks of a job: one on each rank, or one on each group of ranks that share it."""

import keras
import numpy as np
import tensorflow as tf

from hpcai_cli import console
from hpcai_cli.engine import model as models
from hpcai_cli.engine import rank_groups, split_layers, split_plan
from hpcai_cli.engine.distributed import Horovod, Serial, prove_in_step
from hpcai_cli.errors import UsageError


class Replicas:
    """The copies of the model, each on `parts` consecutive ranks: what is data parallel counts these, not ranks.

    With more than one part, dense layers are split over the ranks of a copy (tensor parallelism, arXiv 1909.08053), and
    everything else is on each of them. All ranks of a copy see the same examples. Checkpoints and model files are those
    of a whole model. Each rank builds the whole before it keeps its part, and rank 0 gathers weights and optimizer for
    each checkpoint: what shrinks is what lies in memory meanwhile.

    Attributes:
        rank: the number of the copy that this rank holds, or shares.
        size: how many copies there are.
        parts: how many ranks share one.
        parameters: of a whole model, once `split` was called.
    """

    def __init__(self, ranks: Serial | Horovod, parts: int = 1):
        self._ranks, self.parts = ranks, parts
        self.rank, self.size = ranks.rank // parts, ranks.size // parts
        self.parameters = 0
        self._plan: list[split_plan.Split] = []
        self._axes: dict[str, int] = {}
        self._parts: set[int] = set()
        self._is_part: list[bool] = []
        self._restored: dict[str, np.ndarray] = {}
        self._clip_norm: float | None = None
        if parts > 1:
            self._exchange = split_layers.Exchange(ranks, rank_groups.sharing(ranks.rank, parts))

    # ---- Splitting -------------------------------------------------------------------------------------------------

    def split(self, model: keras.Model, input_shape: tuple[int, ...]) -> None:
        """Leave of each layer that can be split the part of this rank; rank 0's values count.

        Raises:
            UsageError: there is no such layer.
        """
        self.parameters = model.count_params()
        if self.parts == 1:
            return
        self._plan = split_plan.plan(model, input_shape, self.parts)
        if not self._plan:
            error = UsageError(
                f"--tensor-parallel {self.parts} finds no layer to split", received=self.parts,
                expected=f"a dense layer of at least {self.parts * split_plan.LEAST_WIDTH} units, a multiple of "
                f"{self.parts}, in a Sequential or a functional model", mend="leave it out")
            error.collective = True
            raise error
        self._ranks.broadcast([variable for each in self._plan for variable in each.layer.weights])
        for number, each in enumerate(self._plan):
            split_layers.split(each.layer, each.kind, self._exchange, f"split_{number}")
        kinds = {split_layers.ColumnDense: "columns", split_layers.GatheredDense: "columns and gathered",
                 split_layers.RowDense: "rows"}
        names = ", ".join(f"{each.name} by {kinds[each.kind]}" for each in self._plan if each.kind in kinds)
        console.note(f"tensor parallel: {names}; each of {self.parts} processes holds "
                     f"{100 * model.count_params() / self.parameters:.1f} % of {self.parameters:,} parameters")

    def attach(self, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
        """Take note of what the optimizer, built for what is left of the model, keeps for each part."""
        if not self._plan:
            return
        axes = {variable.path: split_layers.AXES[each.kind][name] for each in self._plan
                for name, variable in split_layers.weights_of(each.layer).items()}
        # So Keras names what an optimizer keeps for a variable.
        slots = {path.replace("/", "_") + "_": axis for path, axis in axes.items()}
        for name, variable in models.named_variables(model, optimizer).items():
            if name.startswith("model"):
                found = axes.get(variable.path)
            else:
                found = next((axis for start, axis in slots.items() if variable.name.startswith(start)), None)
            if found is not None:
                self._axes[name] = found
                self._parts.add(id(variable))
        paths = [variable.path for variable in model.trainable_variables]
        self._is_part = [path in axes for path in paths]
        # The optimizer would clip by the norm of what this rank holds.
        self._clip_norm, optimizer.global_clipnorm = optimizer.global_clipnorm, None

    def join(self, model: keras.Model) -> None:
        """Make the model of rank 0 whole again, that of the others stays as it is: nothing is trained any more."""
        for each in self._plan:
            axes = split_layers.AXES[each.kind]
            values = {name: self._whole(variable, axes[name])
                      for name, variable in split_layers.weights_of(each.layer).items()}
            if self._ranks.rank == 0:
                split_layers.make_whole(each.layer, values)

    # ---- What the training does with all copies --------------------------------------------------------------------

    def reduce(self, gradients, averages, sums, *, half: bool = False, adasum: bool = False):
        """Return the mean over the copies of the gradients and of `averages`, and the sum of the vector `sums`.

        What all ranks hold is averaged over all: the ranks of a copy have the same up to rounding, and go on with the
        same bits. The arguments are those of `distributed.Horovod.reduce`.
        """
        if not self._plan:
            return self._ranks.reduce(gradients, averages, sums, half=half, adasum=adasum)
        assert not adasum, "Adasum knows no process sets"
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        shared = [gradient for gradient, is_part in zip(gradients, self._is_part, strict=True) if not is_part]
        own = [gradient for gradient, is_part in zip(gradients, self._is_part, strict=True) if is_part]
        shared, averages, sums = self._ranks.reduce(shared, averages, sums, half=half)
        if self.size > 1:
            own = self._averaged_alike(own, half=half)
        shared, own = self._clipped(shared, own)
        shared, own = iter(shared), iter(own)
        merged = [next(own if is_part else shared) for is_part in self._is_part]
        return merged, averages, sums / self.parts

    def size_in_step(self) -> int | tf.Tensor:
        """Return the number of copies, for a step that is being compiled; a tensor where it is not always the same."""
        return self._ranks.size_in_step() if self.parts == 1 else self.size

    def _averaged_alike(self, own: list[tf.Tensor], *, half: bool) -> list[tf.Tensor]:
        """Return the means over the ranks that hold the same parts."""
        operations, alike = self._ranks.operations, rank_groups.alike(self._ranks.rank, self.parts, self._ranks.size)
        means = operations.grouped_allreduce([tf.cast(each, tf.float16) for each in own] if half else own,
                                             op=operations.Average, name="hpcai_parts",
                                             process_set=self._ranks.process_set(alike), ignore_name_scope=True)
        return [tf.cast(mean, each.dtype) for mean, each in zip(means, own, strict=True)]

    def _clipped(self, shared: list, own: list) -> tuple[list, list]:
        """Shorten the gradient where its norm, that of all parts together, is above the recipe's clip_norm."""
        if not self._clip_norm:
            return shared, own
        squares = self._exchange.total(sum(tf.reduce_sum(tf.square(gradient)) for gradient in own), "norm")
        norm = tf.sqrt(squares + sum(tf.reduce_sum(tf.square(gradient)) for gradient in shared))
        # As Keras does it: a norm that is no number makes all gradients none.
        scale = self._clip_norm * tf.minimum(1 / norm, 1 / self._clip_norm) + (norm - norm)
        return [gradient * scale for gradient in shared], [gradient * scale for gradient in own]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of all copies, in their order, on every rank."""
        if self.parts == 1:
            return self._ranks.gather(rows)
        if self.size == 1:
            return rows
        alike = rank_groups.alike(self._ranks.rank, self.parts, self._ranks.size)
        return self._ranks.operations.allgather(tf.constant(rows), name="hpcai_rows",
                                                process_set=self._ranks.process_set(alike)).numpy()

    def on_any_rank(self, is_so: bool) -> bool:
        """Tell whether something that each rank finds in its own part of the model is so on one of them."""
        return bool(self._ranks.gather(np.array([is_so])).any()) if self._plan else is_so

    def prove(self, variables: list[keras.Variable], *, when: str) -> None:
        """Compare a hash of variables of model and optimizer over all ranks that should hold the same.

        Raises:
            DivergedError: they differ: the ranks train different models.
        """
        prove_in_step(self._ranks, [each for each in variables if id(each) not in self._parts], when=when)
        if self._parts and self.size > 1:
            prove_in_step(self._ranks, [each for each in variables if id(each) in self._parts], when=when,
                          like=lambda rank: rank % self.parts)

    # ---- Checkpoints, which hold the whole model -------------------------------------------------------------------

    def arrays(self, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> dict[str, np.ndarray]:
        """Return all state of model and optimizer as `model.arrays` does, on rank 0, and nothing on the others."""
        if not self._axes:
            return models.arrays(model, optimizer) if self._ranks.rank == 0 else {}
        found = {}
        for name, variable in models.named_variables(model, optimizer).items():
            axis = self._axes.get(name)
            value = None if axis is None else self._whole(variable, axis)
            if self._ranks.rank == 0:
                found[name] = variable.numpy() if axis is None else value
        return found

    def restore(self, values: dict[str, np.ndarray], model: keras.Model,
                optimizer: keras.optimizers.Optimizer | None = None) -> None:
        """Give rank 0 the values that `arrays` returned; the other ranks get theirs by `broadcast`.

        Raises:
            DataError: they belong to another model.
        """
        own = dict(values)
        for name, variable in models.named_variables(model, optimizer).items():
            if name in self._axes and name in values:
                models.check_fits(name, variable, values[name], self._whole_shape(name, variable))
                own[name] = self._exchange.own(values[name], self._axes[name])
                self._restored[name] = values[name]
        models.restore(own, model, optimizer)

    def broadcast(self, model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None) -> None:
        """Give every rank the values of rank 0, or its part of those that rank 0 has restored."""
        named = models.named_variables(model, optimizer)
        self._ranks.broadcast([variable for name, variable in named.items() if name not in self._axes])
        if not self._axes or not self._ranks.broadcast_json(bool(self._restored)):
            return
        for name, axis in self._axes.items():
            if name in named:
                variable = named[name]
                whole = self._restored.pop(name, None)
                if whole is None:
                    whole = np.zeros(self._whole_shape(name, variable), variable.dtype)
                whole = self._ranks.operations.broadcast(tf.constant(whole), root_rank=0, name="hpcai_whole")
                variable.assign(self._exchange.own(whole, axis))

    def _whole(self, variable: keras.Variable, axis: int) -> np.ndarray:
        return self._exchange.joined(tf.convert_to_tensor(variable.value), axis, "whole").numpy()

    def _whole_shape(self, name: str, variable: keras.Variable) -> tuple[int, ...]:
        return tuple(size * self.parts if place == self._axes[name] else size
                     for place, size in enumerate(variable.shape))
