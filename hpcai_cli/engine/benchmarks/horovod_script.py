"""Horovod: whole trainings in ranks against a plain Horovod script with the same network, batches and launcher."""

import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hpcai_cli.engine.benchmarks import peer_horovod, rank_job
from hpcai_cli.engine.benchmarks.measure import PROGRAM, Figure, interleaved, median, ratio
from hpcai_cli.errors import HpcaiError
from hpcai_cli.launchers import Ranks

ROUNDS = 3
EPOCHS = 2
"""The first holds the compilation; the other is measured."""
BATCH_SIZE = 64


def measure(data: Path, ranks: Ranks) -> Iterator[Figure]:
    """Train in turn.

    Args:
        data: MNIST's dataset file.
        ranks: on this host.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainings = _Trainings(data, ranks, Path(folder))
        found = interleaved(ROUNDS, ours=trainings.ours, script=trainings.script)
    name = f"mnist, {ranks.np} ranks, {ranks.launcher}"
    rates = {side: [rate for _, rate in each] for side, each in found.items()}
    starts = {side: [seconds for seconds, _ in each] for side, each in found.items()}
    yield median("horovod", f"{name}: hpcai train", rates["ours"], "images/s")
    yield median("horovod", f"{name}: Horovod script", rates["script"], "images/s")
    yield ratio("horovod", f"{name}: against the script", rates["ours"], rates["script"], limit=0.98)
    yield median("horovod", f"{name}: hpcai train, start to first step", starts["ours"], "s")
    yield median("horovod", f"{name}: Horovod script, start to first step", starts["script"], "s")
    later = [ours - script for ours, script in zip(starts["ours"], starts["script"], strict=True)]
    yield median("horovod", f"{name}: first step later than the script's", later, "s", limit=0.5, at_most=True)


class _Trainings:
    """Starts trainings, and returns when the first step was done, in seconds from the start, and images/s after."""

    def __init__(self, data: Path, ranks: Ranks, folder: Path):
        self._data, self._ranks, self._folder, self._number = data, ranks, folder, 0

    def ours(self) -> tuple[float, float]:
        """One command, which starts the ranks itself."""
        folder = self._new_folder()
        started = time.time()
        self._run([PROGRAM, "train", "mnist", "--data", str(self._data), "--batch-size", str(BATCH_SIZE), "--epochs",
                   str(EPOCHS), "--np", str(self._ranks.np), "--launcher",
                   self._ranks.launcher, "--output", str(folder / "run")], folder)
        events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
        first = next(event["time"] for event in events if event["event"] == "first_step")
        rates = [event["images_per_second"] for event in events if event["event"] == "epoch"]
        return first - started, _later(rates)

    def script(self) -> tuple[float, float]:
        """The script, started by the launcher alone."""
        folder = self._new_folder()
        started = time.time()
        self._run([*self._ranks.words(), sys.executable, peer_horovod.__file__, str(self._data),
                   str(BATCH_SIZE), str(EPOCHS)], folder)
        match = re.search(r"\{\"first_step.*\}", (folder / "said").read_text())
        if not match:
            raise HpcaiError("the Horovod script said nothing", mend="run `hpcai doctor`")
        found = json.loads(match[0])
        return found["first_step"] - started, _later(found["images_per_second"])

    def _run(self, words: list[str], folder: Path) -> None:
        # The same variables for both: the script's ranks would announce themselves for nothing.
        environment = self._ranks.environment() | {"TF_CPP_MIN_LOG_LEVEL": "3"}
        with rank_job.started(words, "a training", folder, environment=environment) as process:
            process.wait()

    def _new_folder(self) -> Path:
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        return folder


def _later(rates: list[float]) -> float:
    """Return the mean rate of the epochs after the first."""
    return len(rates[1:]) / sum(1 / rate for rate in rates[1:])
