"""Memory: training on files of different sizes; resident memory grows with the batch, not with the file."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from hpcai_cli.engine.benchmarks.measure import PROGRAM, Figure, run_json
from hpcai_cli.engine.store_writer import FORMAT, VERSION, write_attributes

SIZES = (256 << 20, 3 << 30)
"""Bytes of the two files."""
SHAPE = (256, 256, 3)
ANONYMOUS_LIMIT = 2 << 30
"""Memory that a training may take for itself, less than the larger file; TensorFlow alone takes several hundred MB."""

RECIPE = '''"""Average colours of large images; the model is next to nothing, so that reading is all there is."""

from hpcai_cli.recipe import Recipe

recipe = Recipe(name="large", summary="for the memory benchmark", input_shape=(256, 256, 3), num_classes=2, epochs=1,
                batch_size=32)


def load(source, recipe):
    return {}


def build_model(recipe):
    import keras

    return keras.Sequential([keras.Input(recipe.input_shape), keras.layers.Rescaling(1 / 255),
                             keras.layers.AveragePooling2D(64), keras.layers.Flatten(), keras.layers.Dense(2)])
'''

# Runs a command under a limit and prints the peak of its resident memory in KiB, as the kernel accounted for it.
RUNNER = """
import resource, subprocess, sys
limit = int(sys.argv[1])
done = subprocess.run(sys.argv[2:], preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
                      stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def measure() -> Iterator[Figure]:
    """Train once on a small and once on a large file, both under the same limit, and compare the peaks."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "large.py"
        recipe.write_text(RECIPE)
        peaks = [_peak(recipe, size) for size in SIZES]
    small, large = (f"{size / 2**30:.2f} GiB" for size in SIZES)
    yield Figure("memory", f"peak resident memory, file of {small}", peaks[0] / 2**20, "MiB")
    yield Figure("memory", f"peak resident memory, file of {large}", peaks[1] / 2**20, "MiB")
    yield Figure("memory", f"peak over the larger file's size, {ANONYMOUS_LIMIT >> 30} GiB allowed",
                 peaks[1] / SIZES[1], "ratio", 0.5, True)


def _peak(recipe: Path, size: int) -> float:
    data = recipe.parent / f"{size}.h5"
    _write_sparse(data, size // int(np.prod(SHAPE)))
    peak = run_json([sys.executable, "-c", RUNNER, str(ANONYMOUS_LIMIT), PROGRAM, "train", str(recipe), "--data",
                     str(data), "--output", str(recipe.parent / f"run-{size}"), "--json"])
    data.unlink()
    return peak * 1024.0


def _write_sparse(path: Path, rows: int) -> None:
    """Write a dataset file of zeros that takes no room on the disk; training reads it like any other."""
    with h5py.File(path, "w") as file:
        for name, shape, dtype in (("images", (rows, *SHAPE), "u1"), ("labels", (rows,), "i8")):
            layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
            links.set_create_intermediate_group(True)
            h5py.h5d.create(file.id, f"train/{name}".encode(), h5py.h5t.py_create(np.dtype(dtype)),
                            h5py.h5s.create_simple(shape), layout, links)
            write_attributes(file[f"train/{name}"], {"valid_rows": rows})
        write_attributes(file, {"format": FORMAT, "version": VERSION, "recipe": "large", "inputs": "images",
                                "fingerprint": "0", "class_names": '["0", "1"]', "source_fingerprint": "",
                                "options": "{}", "statistics": "{}"})
