"""Input: shuffled batches from the dataset file, how near to memcpy, and what accelerator they could feed."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import h5py
import numpy as np

from hpcai_cli.engine import store
from hpcai_cli.engine.benchmarks import accelerator, step_times
from hpcai_cli.engine.benchmarks.measure import Figure, Table, Work, interleaved, median, rate, ratio
from hpcai_cli.engine.pipeline import Block, Pipeline, epoch_order
from hpcai_cli.errors import DataError
from hpcai_cli.recipe import Recipe

ROUNDS = 9
FANCY_BATCHES = 8
"""h5py's fancy indexing is measured on so many batches only; a whole epoch of it would take minutes."""
PHOTOGRAPHS = 10_000
"""Made-up images of 64x64x3 bytes, 123 MB: more than a processor's caches hold."""
SECONDS = 1.0
"""For which an emulated accelerator computes in each round."""
UTILIZATION_ROUNDS = 3
SEARCH_ROUNDS = 6


def measure(data: Path, *, batch_size: int, emulated: tuple[float, ...], cold: bool,
            network: tuple[Recipe, Callable] | None) -> Iterator[Figure | Table]:
    """Read a training split and one of made-up photographs.

    Args:
        emulated: milliseconds of an emulated accelerator's step.
        cold: read the file from its disk too, behind the system's cache.
        network: recipe and build_model of which a step's time here is one more to emulate; None leaves it out.

    Raises:
        DataError: the training split has less than a batch.
    """
    name, count = _described(data)
    if count < batch_size:
        raise DataError("the training split has less than a batch", expected=f"at least {batch_size} examples",
                        received=count)
    if cold:
        # First: what is mapped into memory stays there.
        yield from _cold(name, data, batch_size)
    yield from _rates(name, data, batch_size, memcpy_limit=0.5 if name == "mnist" else None)
    with tempfile.TemporaryDirectory() as folder:
        yield from _rates("64x64x3", _made_up(Path(folder)), batch_size, memcpy_limit=None)
    yield from _fed(name, Pipeline(store.Dataset(data).split("train"), batch_size=batch_size, seed=0), emulated,
                    network)


def _described(data: Path) -> tuple[str, int]:
    """Return name and number of training examples of a dataset."""
    dataset = store.Dataset(data)
    return dataset.recipe, len(dataset.split("train"))


def _made_up(folder: Path) -> Path:
    file, generator = folder / "photographs.h5", np.random.default_rng(0)
    store.write(file, {"train": {"images": generator.integers(0, 256, (PHOTOGRAPHS, 64, 64, 3), np.uint8),
                                 "labels": np.zeros(PHOTOGRAPHS, np.int64)}},
                recipe="photographs", class_names=("0", "1"), source_fingerprint="", options={})
    return file


# ---- Rates ---------------------------------------------------------------------------------------------------------

def _rates(name: str, path: Path, batch_size: int, memcpy_limit: float | None) -> Iterator[Figure | Work]:
    dataset = store.Dataset(path)
    split = dataset.split("train")
    pipeline = Pipeline(split, batch_size=batch_size, seed=0)
    order, epochs = epoch_order(len(split), seed=0, epoch=0), iter(range(10_000))
    whole = len(split) // batch_size * batch_size
    first = next(pipeline.blocks(0))

    def ours() -> int:
        return sum(sum(block.examples) for block in pipeline.blocks(next(epochs)))

    def memcpy() -> int:
        buffer = np.empty((batch_size, *split.inputs.shape[1:]), split.inputs.dtype)
        for start in range(0, whole, batch_size):
            np.copyto(buffer, split.inputs[start:start + batch_size])
        return whole

    def tensors() -> int:
        return accelerator.as_tensors(pipeline.blocks(next(epochs)))

    def constant() -> int:
        return accelerator.as_tensors(first for _ in range(max(1, whole // sum(first.examples))))

    with h5py.File(path, "r", locking=False) as file:
        inputs, labels = (file[f"train/{kind}"] for kind in (dataset.inputs_name, "labels"))

        def fancy() -> int:
            batches = min(FANCY_BATCHES, len(split) // batch_size)
            for number in range(batches):
                rows = np.sort(order[number * batch_size:(number + 1) * batch_size])
                inputs[rows], labels[rows]
            return batches * batch_size

        works = {"ours": ours, "memcpy": memcpy, "fancy": fancy, "tensors": tensors, "constant": constant}
        for warm_up in works.values():
            warm_up()
        rates = interleaved(ROUNDS, **{kind: partial(rate, work) for kind, work in works.items()})
    row = split.inputs.dtype.itemsize * int(np.prod(split.inputs.shape[1:]))
    yield median("input", f"{name}: shuffled batches of {batch_size}", rates["ours"], "samples/s")
    yield rates.work("input", "ours", f"{name}: shuffled batches of {batch_size}", ours())
    yield median("input", f"{name}: bytes of them", [row * each / 1e6 for each in rates["ours"]], "MB/s")
    yield ratio("input", f"{name}: against memcpy of the same bytes", rates["ours"], rates["memcpy"],
                limit=memcpy_limit)
    yield ratio("input", f"{name}: as tensors, against one constant block as tensors", rates["tensors"],
                rates["constant"])
    yield ratio("input", f"{name}: against h5py fancy indexing", rates["ours"], rates["fancy"], limit=25)


# ---- An accelerator that is fed ------------------------------------------------------------------------------------

def _fed(name: str, pipeline: Pipeline, emulated: tuple[float, ...],
         network: tuple[Recipe, Callable] | None) -> Iterator[Figure | Table]:
    steps = {f"{milliseconds:g} ms": (milliseconds, None) for milliseconds in emulated}
    if network:
        own = step_times.step_milliseconds(*network, next(pipeline.blocks(0)))
        steps[f"{own:.3g} ms, a step of {network[0].name} here"] = own, 0.95
    rows = []
    for said, (milliseconds, limit) in steps.items():
        found = [accelerator.utilization(_enough(pipeline, milliseconds), milliseconds / 1000)
                 for _ in range(UTILIZATION_ROUNDS)]
        rows.append((said, 1000 * pipeline.batch_size / milliseconds, statistics.median(found)))
        yield median("input", f"{name}: utilization of an accelerator of {said}", found, "ratio", limit=limit)
    if rows:
        yield Table("input", f"An emulated accelerator, batches of {pipeline.batch_size}",
                    ("step", "samples/s that it asks for", "utilization"), tuple(rows))
    samples, milliseconds = accelerator.most_samples(pipeline, lambda: _endless(pipeline, 200), SEARCH_ROUNDS)
    yield Figure("input", f"{name}: samples that could be fed, a step of {milliseconds:.3g} ms, utilization 0.9",
                 samples, "samples/s")


def _enough(pipeline: Pipeline, milliseconds: float) -> Iterator[Block]:
    return _endless(pipeline, max(4, int(1000 * SECONDS / milliseconds)))


def _endless(pipeline: Pipeline, steps: int) -> Iterator[Block]:
    """Yield blocks of one epoch after the other, so many steps and the first block."""
    blocks = (block for epoch in range(10_000) for block in pipeline.blocks(epoch))
    return islice(blocks, 1 + -(-steps // pipeline.steps_per_block))


# ---- From the disk -------------------------------------------------------------------------------------------------

def _cold(name: str, path: Path, batch_size: int) -> Iterator[Figure]:
    """Read an epoch behind the system's cache, and one out of it."""
    rates: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(UTILIZATION_ROUNDS):
        _forget(path)
        before = _bytes_read()
        rates["cold"].append(_epoch_rate(path, batch_size))
        if before is None or _bytes_read() - before < path.stat().st_size // 2:
            raise DataError(f"{path} does not leave the system's cache, so that nothing can be said of its disk",
                            expected="a file on a local disk that nobody else reads")
        rates["warm"].append(_epoch_rate(path, batch_size))
    yield median("input", f"{name}: an epoch from the disk", rates["cold"], "samples/s")
    yield ratio("input", f"{name}: from the disk against from memory", rates["cold"], rates["warm"])


def _epoch_rate(path: Path, batch_size: int) -> float:
    pipeline = Pipeline(store.Dataset(path).split("train"), batch_size=batch_size, seed=0)
    started = time.perf_counter()
    count = sum(sum(block.examples) for block in pipeline.blocks(0))
    return count / (time.perf_counter() - started)


def _forget(path: Path) -> None:
    """Have the system drop what it keeps of a file in memory."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_read() -> int | None:
    """Return how many bytes this process has had read from disks, None where the system does not tell."""
    try:
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(lines["read_bytes"])
    except (OSError, ValueError, KeyError):
        return None
