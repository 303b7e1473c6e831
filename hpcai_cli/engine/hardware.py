"""What this machine is good at: threads per rank, one GPU per local rank, the precision and the reason for it."""

import os

import keras
import tensorflow as tf

from hpcai_cli import console, launch
from hpcai_cli.engine import machine
from hpcai_cli.errors import MissingError


def share_cores(*, local_rank: int, local_size: int) -> int:
    """Give this rank its share of the host's cores, and return how many they are.

    TensorFlow's threads starve Horovod's own, so the ranks of a host share its cores, and each stays on its own: ranks
    that wander between cores lose their caches at every step. A launcher that has bound each rank already (mpirun,
    srun) has done the sharing.
    """
    cores = sorted(os.sched_getaffinity(0))
    share = machine.share(local_size)
    # horovodrun binds nobody, and --np asks mpirun not to: fewer cores than the machine has are then the whole job's.
    unbound = launch.place().launcher == "horovodrun" or launch.STARTED_VARIABLE in os.environ
    bound = len(cores) < (os.cpu_count() or 1) and not unbound
    if local_size == 1 or bound:
        return machine.cores()
    if share * local_size <= len(cores):
        # Only this thread and those that it will start: Horovod's, which is running, may go wherever there is room.
        os.sched_setaffinity(0, cores[local_rank * share:(local_rank + 1) * share])
    return share


def set_up(*, local_rank: int, local_size: int) -> int:
    """Give this rank its threads and its GPU, and return the number of threads.

    Raises:
        MissingError: the host has GPUs, but fewer than local ranks.
    """
    threads = share_cores(local_rank=local_rank, local_size=local_size)
    gpus = tf.config.list_physical_devices("GPU")
    # A scheduler that gives each task a GPU of its own shows each task one, by the number 0.
    mine = 0 if len(gpus) == 1 and "SLURM_GPUS_PER_TASK" in os.environ else local_rank
    if gpus and mine >= len(gpus):
        raise MissingError(f"{local_size} ranks on this host share {len(gpus)} GPUs", expected="one GPU per local rank",
                           mend="start fewer ranks here, or hide the GPUs with CUDA_VISIBLE_DEVICES=-1")
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        # One operation at a time: of two that share the threads, oneDNN splits the work otherwise, sums come out in
        # another order, and a resumed training differs in its last bits. It was no slower on two cores.
        tf.config.threading.set_inter_op_parallelism_threads(threads if gpus else 1)
        if gpus:
            tf.config.set_visible_devices(gpus[mine], "GPU")
            # Without memory growth TensorFlow takes the whole card, and a server beside the training finds none.
            tf.config.experimental.set_memory_growth(gpus[mine], True)
    except RuntimeError:
        # TensorFlow runs already, as when one Python process trains twice: its threads stay as they are.
        console.note("TensorFlow is running already; its threads and devices stay as they are")
    return threads


def choose_precision(asked: str) -> tuple[str, str]:
    """Return the Keras dtype policy and the reason for it."""
    if asked != "auto":
        return asked, "asked for"
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        version = ".".join(map(str, capability))
        if capability >= (8, 0):
            return "mixed_bfloat16", f"this GPU (compute capability {version}) computes in bfloat16"
        if capability >= (7, 0):
            return "mixed_float16", f"this GPU (compute capability {version}) has float16 tensor cores"
        return "float32", f"this GPU (compute capability {version}) has no tensor cores"
    if "amx_bf16" in machine.instruction_sets():
        return "mixed_bfloat16", "this CPU has AMX"
    return "float32", "this CPU has no AMX"


def set_precision(policy: str) -> None:
    """Make the policy the default of the layers built from now on."""
    keras.config.set_dtype_policy(policy)

