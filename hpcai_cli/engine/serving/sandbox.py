"""Runs model files in a process of its own first: what is broken or hostile may crash, hang or eat memory there.

TFLite verifies a file's structure, and yet one in twenty files in which a field was changed (a stride, a dilation, a
number of scales) ended the process with a segmentation fault; other libraries promise no more.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context

import numpy as np

from hpcai_cli.errors import DataError, HpcaiError, MissingError, printable

SECONDS = 120
"""In which a model is opened and has answered."""


def bound_memory() -> None:
    """Bound this process to half of the machine's memory, and have it leave no core file when it crashes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def try_out(open_model: Callable[..., Callable], model: bytes | os.PathLike, input_shape: tuple[int, ...],
            sizes: tuple[int, ...], name: str) -> None:
    """Open a model in another process and have it answer batches of zeros and of ones.

    Args:
        open_model: function of a module, which takes the model and returns its inference, inputs (b, *input_shape)
            uint8 -> outputs.
        model: content, or where it is.
        sizes: of the batches.
        name: of the kind of model, as errors name it.

    Raises:
        DataError: it cannot be opened or does not answer.
        MissingError: its library is not installed.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    # What is tried is to be what will run: TensorFlow has a TFLite of its own.
    process = context.Process(target=_answer, daemon=True,
                              args=(theirs, open_model, input_shape, sizes, "tensorflow" in sys.modules))
    # Ctrl-C reaches the child too, which would answer with a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    try:
        ours.send(model)
        # What comes back may have been written by the model.
        code, said = json.loads(ours.recv_bytes()) if ours.poll(SECONDS) else (DataError.exit_code, "it takes too long")
    except (EOFError, OSError, ValueError, TypeError):
        code, said = DataError.exit_code, "it crashes"
    finally:
        ours.close()
        process.kill()
        process.join()
    if code == MissingError.exit_code:
        raise MissingError(str(said))
    if said:
        raise DataError(f"this {name} model cannot be run: {printable(str(said))}")


def _answer(connection, open_model: Callable, input_shape: tuple, sizes: tuple, with_tensorflow: bool) -> None:
    """Take a model, run it, and say what is wrong with it, or nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if with_tensorflow:
        import tensorflow  # noqa: F401
    bound_memory()
    said = 0, ""
    try:
        forward = open_model(connection.recv())
        for size in sizes:
            forward(np.zeros((size, *input_shape), np.uint8))
            forward(np.ones((size, *input_shape), np.uint8))
    except HpcaiError as error:
        said = error.exit_code, str(error)
    except Exception as error:
        said = DataError.exit_code, (str(error).strip() or type(error).__name__).split("\n")[0]
    connection.send_bytes(json.dumps(said).encode())
