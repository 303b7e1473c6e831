"""The ranks of a job: the only module that imports horovod, and a serial twin with the same interface."""

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from hpcai_cli import errors, launch
from hpcai_cli.errors import DivergedError, HpcaiError, MissingError, UsageError

GRADIENTS = "gradients"
"""What the operations that average them are called, in Horovod's timeline too."""


class Serial:
    """One process: every collective operation is the identity."""

    rank, size, local_rank, local_size = 0, 1, 0, 1
    parts = 1
    operations = None
    is_elastic = False

    def size_in_step(self) -> int:
        """Return the number of ranks, for a step that is being compiled."""
        return 1

    def reduce(self, gradients, averages, sums, *, half: bool = False, adasum: bool = False):
        """Return the mean over the ranks of the gradients and of `averages`, and the sum of the vector `sums`."""
        return gradients, averages, sums

    def broadcast(self, variables) -> None:
        """Give every rank the values of rank 0."""

    def broadcast_json(self, value, root: int = 0):
        """Return that rank's value, anything that JSON can say."""
        return value

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of all ranks, in the order of the ranks, on every rank."""
        return rows

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def require_adasum(self) -> None:
        """Check that Adasum can combine the gradients: there is one."""

    def stop(self) -> None:
        """End the communication."""


class Horovod:
    """Several processes under Horovod, by Gloo, MPI or NCCL.

    Upstream's own Keras integration averages gradients in hooks that Keras 3 never calls
    (https://github.com/horovod/horovod/issues/4290), so this class uses the bare operations only.

    Args:
        groups: the ranks of each process set that is needed beside that of all, in the same order on all ranks.

    Attributes:
        operations: these bare operations, `horovod.tensorflow`, for what measures them or needs them in a group.
        parts: ranks that share a model, as of `replicas.Replicas`, which can take the place of ranks.
        is_elastic: whether rank and size change when the ranks meet again.
    """

    parts = 1

    def __init__(self, groups: Sequence[Sequence[int]] = ()):
        import horovod.tensorflow as hvd

        self._hvd = self.operations = hvd
        self.is_elastic = launch.is_elastic()
        if os.environ.get("HOROVOD_CONTROLLER", "mpi").lower() == "mpi":
            # A rank that waits in MPI spins, on the very core that computes what the others wait for; yielding leaves
            # it to them. Looking for work then costs next to nothing, so that it may be done twice as often as by
            # default (`hpcai benchmark scaling` measures what comes of it).
            os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
            if os.environ.get("HOROVOD_AUTOTUNE", "0") == "0":
                # What is set is not tuned.
                os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.5")
        # Sets that are added later would cost all operations a round of questions (HOROVOD_DYNAMIC_PROCESS_SETS).
        self._process_sets = {tuple(group): hvd.ProcessSet(list(group)) for group in groups}
        hvd.init(process_sets=list(self._process_sets.values()))
        self._take_place()

    def _take_place(self) -> None:
        self.rank, self.size = self._hvd.rank(), self._hvd.size()
        self.local_rank, self.local_size = self._hvd.local_rank(), self._hvd.local_size()
        if self.is_elastic:
            # What the launcher left there was true when this process was started.
            os.environ |= {"HOROVOD_RANK": str(self.rank), "HOROVOD_SIZE": str(self.size),
                           "HOROVOD_LOCAL_RANK": str(self.local_rank), "HOROVOD_LOCAL_SIZE": str(self.local_size),
                           "HOROVOD_CROSS_SIZE": str(self._hvd.cross_size())}
            here = launch.place()
            self.local_rank, self.local_size = here.local_rank, here.local_size

    def rejoin(self) -> None:
        """Meet the ranks that there are now; rank and size may be others than before.

        Raises:
            ValueError: they don't find each other in time.
        """
        self._hvd.shutdown()
        self._hvd.init()
        self._take_place()

    @staticmethod
    def why_not_joined() -> str:
        """Return what has kept Horovod from starting, empty where it was built without that."""
        # Set by Horovod itself, of which Python's own copy of the variables knows nothing.
        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_char_p
        return (getenv(b"HPCAI_HOROVOD_FAILURE") or b"").decode(errors="replace")

    def tell_of_hosts(self, changed: Callable[[], None]) -> None:
        """Call the function, in a thread of its own, when other ranks are to take part; rank 0 alone learns it."""
        from horovod.common.elastic import notification_manager

        notification_manager.init()
        notification_manager.register_listener(_Listener(changed))

    def size_in_step(self) -> int | tf.Tensor:
        """Return the number of ranks, for a step that is being compiled; a tensor where it is not always the same."""
        return self._hvd.size_op() if self.is_elastic else self.size

    def process_set(self, members: Sequence[int]):
        """Return the process set of these ranks, for the bare operations: of all, or of one of the groups."""
        if len(members) == self.size:
            return self._hvd.global_process_set
        return self._process_sets[tuple(members)]

    def reduce(self, gradients, averages, sums, *, half: bool = False, adasum: bool = False):
        """Average gradients and statistics and sum a small vector, in one fused operation.

        Separate small tensors cost 1 to 3 ms each; here the vector, which carries the loss and the wish to stop,
        travels with the gradients for nothing.

        Args:
            gradients: list of float32 or float64 tensors.
            averages: list of such tensors.
            sums: float32 (k,).
            half: gradients travel as float16, half the bytes: 11 bits of each number, and none beyond 65,504 summed
                over the ranks.
            adasum: gradients are combined by Adasum (arXiv 2006.02924) in place of their mean.
        """
        tensors = [tf.convert_to_tensor(gradient) for gradient in gradients]
        sent = [tf.cast(tensor, tf.float16) for tensor in tensors] if half else tensors
        if adasum:
            # One by one, since upstream's grouped form fails for it; Horovod fuses them all the same.
            reduced = [self._hvd.allreduce(each, op=self._hvd.Adasum, name=f"{GRADIENTS}.{number}")
                       for number, each in enumerate(sent)]
            reduced += self._averaged([*averages, sums])
        else:
            reduced = self._averaged([*sent, *averages, sums])
        split = len(tensors)
        received = [tf.cast(each, tensor.dtype) for each, tensor in zip(reduced[:split], tensors, strict=True)]
        return received, reduced[split:-1], reduced[-1] * tf.cast(self.size_in_step(), reduced[-1].dtype)

    def require_adasum(self) -> None:
        """Check that Adasum can combine these ranks' gradients.

        Raises:
            MissingError: they talk over Gloo, which has no Adasum.
            UsageError: their number is no power of two.
        """
        if self.size & (self.size - 1):
            error = UsageError("Adasum combines the gradients of a power of two of processes", received=self.size,
                               mend="start 2, 4, 8 ..., or set gradient_reduction=average")
        elif not self._hvd.mpi_enabled():
            error = MissingError("Adasum needs MPI, and these processes talk over Gloo", received="Gloo",
                                 expected="Horovod built with MPI, and ranks that mpirun or srun starts",
                                 mend="use --launcher mpirun, or set gradient_reduction=average")
        else:
            return
        error.collective = True
        raise error

    def _averaged(self, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return the means over the ranks; one operation for all tensors of a type, since a group has one type."""
        found = list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
            # Named by us: Horovod would take the names of the layers, whose numbers differ on a rank that has built
            # another model before, and the ranks would wait for each other for ever.
            means = self._hvd.grouped_allreduce([tensors[place] for place in places], op=self._hvd.Average,
                                                name=f"{GRADIENTS}.{dtype.name}")
            for place, mean in zip(places, means, strict=True):
                found[place] = mean
        return found

    def stacked(self, values: tf.Tensor, *, name: str) -> tf.Tensor:
        """Return the tensors of all ranks, (n, ...), within a compiled step; gradients flow back to each rank's own.

        Args:
            values: of the same shape, (...), on every rank.
            name: of this operation, another for each within the step.
        """
        @tf.custom_gradient
        def gathered(own):
            rows = tf.ensure_shape(self._hvd.allgather(own[None], name=name),
                                   (None if self.is_elastic else self.size, *own.shape))

            def gradient(upstream):
                # Each rank's loss depends on all rows; the mean over the ranks is taken with the weights' gradients.
                total = self._hvd.allreduce(upstream, op=self._hvd.Sum, name=f"{name}.gradient")
                return total[self._hvd.rank_op() if self.is_elastic else self.rank]

            return rows, gradient

        return gathered(values)

    def broadcast(self, variables) -> None:
        """Give every rank the values of rank 0."""
        self._hvd.broadcast_variables([variable.value for variable in variables], root_rank=0)

    def broadcast_json(self, value, root: int = 0):
        """Return that rank's value, anything that JSON can say."""
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        # Only that rank's bytes count, but the shapes must agree before the bytes travel.
        length = int(self._hvd.broadcast(tf.constant(len(text)), root_rank=root))
        return json.loads(self.broadcast_bytes(text if self.rank == root else None, length, root).tobytes())

    def broadcast_bytes(self, content: np.ndarray | None, length: int, root: int) -> np.ndarray:
        """Return that rank's bytes, uint8 (length,); the others give None."""
        content = np.zeros(length, np.uint8) if content is None else content
        return self._hvd.broadcast(tf.constant(content), root_rank=root).numpy()

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of all ranks, in the order of the ranks, on every rank."""
        return self._hvd.allgather(tf.constant(rows)).numpy()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._hvd.allreduce(tf.constant(0.0), name="barrier")

    def stop(self) -> None:
        """End the communication; rank 0's last words are out before another rank's exit ends the job."""
        self.barrier()
        self._hvd.shutdown()


class _Listener:
    """What Horovod's notifications call."""

    def __init__(self, changed: Callable[[], None]):
        self._changed = changed

    def on_hosts_updated(self, timestamp: int, result: int) -> None:
        """Pass it on."""
        self._changed()


def start(groups: Sequence[Sequence[int]] = ()) -> Serial | Horovod:
    """Join the job that this process was started in.

    Args:
        groups: as of `Horovod`.

    Raises:
        MissingError: a launcher started several processes, but Horovod is missing or cannot see them. Training on
            would mean n separate models.
    """
    place = launch.place()
    if place.size == 1 and not launch.is_elastic():
        return Serial()
    if place.launcher == "srun" and not any(name.startswith(("PMIX_", "PMI_")) for name in os.environ):
        # MPI would end the process, with words that nobody sees.
        raise MissingError(f"srun started {place.size} processes without a means to find each other",
                           expected="PMIx, through which Open MPI does", mend="start them by `srun --mpi=pmix`",
                           received=os.environ.get("SLURM_MPI_TYPE", "none"))
    try:
        ranks = Horovod(groups)
    except (ImportError, AttributeError, OSError) as error:
        raise MissingError(f"{place.launcher} started {place.size} processes, but Horovod cannot be loaded",
                           expected="Horovod built for the installed TensorFlow",
                           mend="run `hpcai doctor --build-horovod`", received=str(error)) from None
    except ValueError as error:
        if reason := Horovod.why_not_joined():
            raise MissingError(f"{place.launcher} started {place.size} processes, which do not find each other",
                               expected="hosts that reach each other's ports", received=reason,
                               mend="run `hpcai doctor --hosts ...`") from None
        # So Horovod says that it does not see the ranks of a group.
        raise MissingError(f"{place.launcher} started {place.size} processes, but Horovod does not see all of them",
                           expected="Horovod built with MPI, or the job started by horovodrun",
                           mend="run `hpcai doctor --build-horovod --with-mpi`", received=str(error)) from None
    if ranks.size != place.size and (place.is_size_known or ranks.size == 1) and not ranks.is_elastic:
        raise MissingError(f"{place.launcher} started {place.size} processes, but Horovod sees {ranks.size}",
                           expected="Horovod built with MPI, or the job started by horovodrun",
                           mend="run `hpcai doctor --build-horovod --with-mpi`", received=ranks.size)
    return ranks


def built_transports() -> list[str]:
    """Return which of Gloo, MPI and NCCL Horovod was built with.

    Raises:
        MissingError: it cannot be loaded.
    """
    try:
        import horovod.tensorflow as hvd
    except (ImportError, AttributeError, OSError) as error:
        raise MissingError("Horovod cannot be loaded", expected="Horovod built for the installed TensorFlow",
                           mend="run `hpcai doctor --build-horovod`", received=str(error)) from None
    built = {"Gloo": hvd.gloo_built(), "MPI": hvd.mpi_built(), "NCCL": hvd.nccl_built()}
    return [name for name, is_built in built.items() if is_built]


def on_rank_zero(ranks: Serial | Horovod, function: Callable):
    """Call the function on rank 0 and return its value, anything that JSON can say, on every rank.

    Raises:
        HpcaiError: rank 0's failure, on every rank: a rank that waited for ever would hide it.
    """
    if ranks.size == 1:
        return function()
    outcome = {}
    if ranks.rank == 0:
        try:
            outcome = {"value": function()}
        except HpcaiError as error:
            outcome = {"kind": type(error).__name__, "message": str(error)}
        except OSError as error:
            outcome = {"kind": "HpcaiError", "message": f"cannot write: {error}"}
    outcome = ranks.broadcast_json(outcome)
    if "kind" in outcome:
        error = getattr(errors, outcome["kind"])(outcome["message"])
        error.collective = True
        raise error
    return outcome["value"]


def prove_in_step(ranks: Serial | Horovod, variables, *, when: str,
                  like: Callable[[int], int] = lambda rank: 0) -> str:
    """Compare a hash of the variables over all ranks and return it.

    Args:
        like: returns the first rank that should hold the same as a rank; rank 0 for all by default.

    Raises:
        DivergedError: they differ: the ranks train different models.
    """
    digest = hashlib.sha256()
    for variable in variables:
        digest.update(np.ascontiguousarray(variable.numpy()))
    gathered = ranks.gather(np.frombuffer(digest.digest(), np.uint8).reshape(1, -1))
    apart = [rank for rank, other in enumerate(gathered) if bytes(other) != bytes(gathered[like(rank)])]
    if apart:
        raise DivergedError(f"the weights of ranks {apart} differ from rank 0's {when}",
                            expected="the same weights on every rank", received=digest.hexdigest()[:12])
    return digest.hexdigest()
