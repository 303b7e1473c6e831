"""Preprocess: a folder of photographs to a dataset file, against a Pillow loop and against nothing but decoding."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageOps

from hpcai_cli.engine.benchmarks.measure import PROGRAM, Figure, interleaved, median, rate, ratio
from hpcai_cli.engine.benchmarks.photographs.sample_photographs import copy_photographs, photograph_folder
from hpcai_cli.engine.raw import images, preprocessing
from hpcai_cli.engine.raw.image_files import find_image_files
from hpcai_cli.recipe import Recipe

COUNT = 8_000
"""Photographs of a round; the small job that memory is compared with has a third of them."""
PROCESSES = 2
ROUNDS = 3
CHUNK_FILES = 32
MEMORY_LIMIT = 600
"""MB of all processes together."""
GROWTH_LIMIT = 1.1
"""Memory of three times as many photographs; what stays of one is its name, its place and its checksum."""
SAMPLE_SECONDS = 0.02


def measure(recipe: Recipe, own: Path | None) -> Iterator[Figure]:
    """Preprocess the same photographs three ways, then weigh whole processes."""
    with (photograph_folder(own, recipe, COUNT) as photographs, tempfile.TemporaryDirectory() as name):
        found = find_image_files(photographs, shape=recipe.input_shape, class_names=recipe.class_names)["train"]
        files = [(photographs / file, label) for file, label in zip(found.names, found.labels.tolist(), strict=True)]
        yield from _speed(recipe, photographs, [path for path, _ in files], Path(name))
        copy_photographs(files[::3], Path(name) / "third", recipe.class_names)
        peaks = [_peak(folder, Path(name)) / 1e6 for folder in (Path(name) / "third", photographs)]
    yield Figure("preprocess", f"peak memory of all processes, {len(files[::3]):,} photographs", peaks[0], "MB")
    yield Figure("preprocess", f"peak memory of all processes, {len(files):,} photographs", peaks[1], "MB",
                 MEMORY_LIMIT, True)
    yield Figure("preprocess", "memory of three times as many photographs", peaks[1] / peaks[0], "ratio",
                 GROWTH_LIMIT, True)


def _speed(recipe: Recipe, photographs: Path, files: list[Path], folder: Path) -> list[Figure]:
    """Time whole preprocessings, with the start of their processes, against peers that are running already."""
    def ours() -> int:
        report = preprocessing.preprocess(
            recipe, load=lambda source, recipe: find_image_files(source, shape=recipe.input_shape,
                                                                 class_names=recipe.class_names),
            sample=None, downloads=None, source=str(photographs), output=folder / "ours.h5",
            wishes=preprocessing.Wishes(force=True, processes=PROCESSES))
        return sum(count for name, count in report["metrics"].items() if name.endswith("_examples"))

    def pillow() -> int:
        return _pillow_loop(files, folder / "pillow.h5", recipe.input_shape)

    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        def decoding() -> int:
            chunks = [files[start:start + CHUNK_FILES] for start in range(0, len(files), CHUNK_FILES)]
            return sum(pool.map(partial(_decode, shape=recipe.input_shape), chunks))

        # Starts the processes, and brings the files into the system's memory for all three.
        decoding()
        rates = interleaved(ROUNDS, ours=lambda: rate(ours), pillow=lambda: rate(pillow),
                            decoding=lambda: rate(decoding))
    what = f"{len(files):,} photographs to {'x'.join(map(str, recipe.input_shape))}, {PROCESSES} processes"
    return [median("preprocess", what, rates["ours"], "images/s"),
            median("preprocess", "a Pillow loop, 1 process", rates["pillow"], "images/s"),
            ratio("preprocess", "against the Pillow loop", rates["ours"], rates["pillow"], limit=3),
            ratio("preprocess", f"against decoding and resizing alone, {PROCESSES} processes", rates["ours"],
                  rates["decoding"], limit=0.9)]


def _decode(files: list[Path], shape: tuple[int, int, int]) -> int:
    for path in files:
        images.decode(images.read_bytes(path), shape)
    return len(files)


def _pillow_loop(files: list[Path], output: Path, shape: tuple[int, int, int]) -> int:
    """Do what scripts do: upright, in RGB, resized the same way, one photograph after the other into an HDF5 file."""
    height, width, _ = shape
    with h5py.File(output, "w") as file:
        rows = file.create_dataset("images", (len(files), *shape), np.uint8)
        file["labels"] = np.array([path.parent.name == "dog" for path in files], np.int64)
        for number, path in enumerate(files):
            with Image.open(path) as image:
                picture = ImageOps.exif_transpose(image).convert("RGB")
            rows[number] = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    return len(files)


def _peak(photographs: Path, folder: Path) -> float:
    """Return the peaks of resident memory of all processes of `hpcai preprocess`, added up, in bytes.

    An upper bound: the peaks need not be at the same time, and what processes share counts for each of them.
    """
    process = subprocess.Popen(
        [PROGRAM, "preprocess", "dogs-vs-cats", "--source", str(photographs), "--output", str(folder / "weighed.h5"),
         "--processes", str(PROCESSES), "--force"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peaks = {}
    while process.poll() is None:
        for number in _family(process.pid):
            # The last answer counts: the kernel keeps the peak, but a process that has ended has none, and one that
            # has only been forked still has its parent's.
            peaks[number] = _peak_of(number) or peaks.get(number, 0)
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return float(sum(peaks.values()))


def _family(process: int) -> Iterator[int]:
    """Yield a process and all below it."""
    yield process
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            for child in Path(f"/proc/{process}/task/{thread}/children").read_text().split():
                yield from _family(int(child))
    except OSError:
        return  # it has ended


def _peak_of(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
