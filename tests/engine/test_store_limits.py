"""The dataset file where the disk is full or the memory small; each in a process of its own."""

import os
import subprocess
import sys
import textwrap

import numpy as np

from hpcai_cli.engine import store


def run_python(text: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(text), *arguments], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    file = tmp_path / "tiny.h5"
    store.write(file, {"train": {"images": np.ones((3, 4, 4, 1), np.uint8), "labels": np.arange(3)}}, recipe="tiny",
                class_names=("a", "b", "c"), source_fingerprint="", options={})
    before = file.read_bytes()
    said = run_python("""
        import resource, sys
        from pathlib import Path
        import numpy as np
        from hpcai_cli.engine import store
        from hpcai_cli.errors import HpcaiError
        images = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            store.write(Path(sys.argv[1]), {"train": {"images": images, "labels": np.zeros(2000, np.int64)}},
                        recipe="tiny", class_names=("a", "b"), source_fingerprint="", options={})
        except HpcaiError as error:
            print(type(error).__name__, error.exit_code, error)
        """, str(file))
    assert said.startswith("HpcaiError 1 cannot write")
    assert "what was there is unchanged" in said and "free some space" in said
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["tiny.h5"]


def test_resident_memory_stays_bounded_on_a_large_file(tmp_path):
    """96 MiB are read in random order with 8 MiB as the bound.

    The batch is small, since the kernel may map 2 MiB for each row that is touched.
    """
    said = run_python("""
        import re, sys
        from pathlib import Path
        import numpy as np
        from hpcai_cli.engine import store
        store.RESIDENT_BYTES = 8 << 20
        path, count = Path(sys.argv[1]), 1536
        store.write(path, {"train": {"images": np.ones((count, 128, 128, 4), np.uint8),
                                     "labels": np.zeros(count, np.int64)}},
                    recipe="tiny", class_names=("a", "b"), source_fingerprint="", options={})
        split = store.Dataset(path).split("train")
        images, labels = np.empty((4, 128, 128, 4), np.uint8), np.empty(4, np.int64)
        def resident():
            status = Path("/proc/self/status").read_text()
            return sum(int(re.search(rf"{name}:\\s+(\\d+) kB", status)[1]) for name in ("RssFile", "RssAnon")) >> 10
        split.gather(np.arange(4), images, labels)
        start = most = resident()
        order, total = np.random.default_rng(0).permutation(count), 0
        for first in range(0, count, 4):
            rows = order[first:first + 4]
            split.announce(rows)
            split.gather(rows, images, labels)
            total += int(images.sum(dtype=np.int64))
            most = max(most, resident())
        print(most - start, total == count * 128 * 128 * 4)
        """, str(tmp_path / "large.h5"))
    growth, read_all = said.split()
    assert read_all == "True"
    assert int(growth) < 24
