"""What happens around a training: its parent killed, its disk full, its files damaged or replaced, its clock wrong."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from faults_lab import EVERY, Lab, Trial

from hpcai_cli.errors import EXIT_STOPPED, DataError, UsageError

ORPHANS = 30
"""Seconds after which nothing goes on of a job whose parent was killed; under mpirun a rank takes some to see it."""
DISK = "24m"
"""Of the disk that is filled: some checkpoints of 2 MB and the model."""
LEFT_FREE = 256 << 10
"""Bytes that are left on it: too few for a checkpoint, enough to tell of it."""
BACK = 5 * 3600
"""Seconds by which the clock is set back."""


# ---- The parent ----------------------------------------------------------------------------------------------------

def driver(lab: Lab) -> tuple[str, list[str]]:
    """Kill the parent of two ranks: they end, and the run can be taken up at once."""
    found, problems = [], []
    for launcher in ("mpirun", "horovodrun"):
        trial = _under_way(lab, f"driver-{launcher}", "--launcher", launcher, np=2)
        moment = trial.signal(signal.SIGKILL, [trial.process.pid])
        trial.process.wait()
        while (left := trial.processes()) and time.monotonic() < moment + ORPHANS:
            time.sleep(0.05)
        found.append(f"ranks of {launcher} ended {time.monotonic() - moment:.1f} s after their parent")
        if left:
            problems.append(f"{len(left)} processes of {launcher} go on without their parent")
            trial.kill()
        problems += lab.finished(trial.run, np=2)
    return ", ".join(found), problems


# ---- The disk ------------------------------------------------------------------------------------------------------

def disk_full(lab: Lab) -> tuple[str, list[str]]:
    """Fill the disk under a training, and free it again; stop another one while it is full."""
    if os.geteuid():
        return "left out: only root can mount a small disk", []
    with _mounted(lab.folder / "disk", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs"):
        trial = _under_way(lab, "disk/run")
        with _filled(lab.folder / "disk", leaving=LEFT_FREE):
            trial.wait_until(lambda: len(trial.events("checkpoint_failed")) >= 2)
        failed = trial.events("checkpoint_failed")
        problems = lab.finished_by(trial)
        later = [event["step"] for event in trial.events("checkpoint") if failed and event["step"] > failed[-1]["step"]]
        if len(failed) < 2 or not later:
            problems.append(f"{len(failed)} checkpoints failed, {len(later)} were written later")
        shutil.rmtree(lab.folder / "disk" / "run")

        trial = _under_way(lab, "disk/stopped")
        with _filled(lab.folder / "disk", leaving=0):
            time.sleep(1)
            trial.signal(signal.SIGTERM, [trial.process.pid])
            if (code := trial.wait()) != EXIT_STOPPED:
                problems.append(f"stopped on a full disk: exit code {code}: {trial.said()[-300:]}")
        problems += lab.left("disk/stopped").broken()
        problems += lab.finished("disk/stopped")
    return (f"{len(failed)} checkpoints failed while the disk was full, {len(later)} were written afterwards; stopped "
            f"while it was full: exit code {code}"), problems


def read_only(lab: Lab) -> tuple[str, list[str]]:
    """Let a training find that its checkpoints cannot be written at all."""
    if os.geteuid():
        return "left out: only root can mount a folder read-only", []
    folder = lab.folder / "read-only" / "checkpoints"
    trial = lab.train("read-only")
    trial.wait_until(lambda: trial.events("started"))
    with _mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        code = trial.wait()
    failed = trial.events("checkpoint_failed")
    problems = [] if code == 0 else [f"exit code {code}: {trial.said()[-300:]}"]
    if not failed or trial.events("checkpoint"):
        problems.append(f"{len(failed)} checkpoints failed, {len(trial.events('checkpoint'))} were written")
    return f"{len(failed)} checkpoints failed", problems + lab.left("read-only").differences_of_result(lab.whole())


def flipped(lab: Lab) -> tuple[str, list[str]]:
    """Flip a byte in each file of a killed training's newest checkpoint: it is passed over and named."""
    problems = []
    for file in ("arrays.npz", "state.json", "manifest.json"):
        trial = _under_way(lab, f"flipped-{file.partition('.')[0]}")
        trial.wait_until(lambda trial=trial: len(trial.events("checkpoint")) > 3)
        trial.kill(trial.processes())
        newest = max((lab.folder / trial.run / "checkpoints").glob("step-*"))
        content = bytearray((newest / file).read_bytes())
        content[lab.random.randrange(len(content))] ^= 1 << lab.random.randrange(8)
        (newest / file).write_bytes(content)
        trial = lab.train(trial.run)
        problems += lab.finished_by(trial)
        if f"passed over: checkpoint {newest.name} does not verify" not in trial.said():
            problems.append(f"{newest.name} with a damaged {file} is not named")
    return "a byte of arrays, state and manifest: each passed over and named", problems


# ---- The clock -----------------------------------------------------------------------------------------------------

def clock(lab: Lab) -> tuple[str, list[str]]:
    """Set the clock of a training back by some hours, and forward again; all other clocks go on."""
    if not shutil.which("gcc"):
        return "left out: no gcc, which builds the wrong clock", []
    library, jump = lab.folder / "clock.so", lab.folder / "clock-is-back"
    subprocess.run(["gcc", "-shared", "-fPIC", f"-DBACK={BACK}", "-o", library,
                    Path(__file__).with_name("faults_clock.c"), "-ldl"], check=True)
    trial = lab.train("clock", "--checkpoint-every", "1s", "--max-time", "1h",
                      environment={"LD_PRELOAD": str(library), "FAULTS_CLOCK": str(jump)})
    trial.wait_until(lambda: len(trial.events("checkpoint")) >= 2)
    jump.touch()
    trial.wait_until(lambda: len(trial.events("epoch")) >= 4)
    jump.unlink()
    problems = lab.finished_by(trial)
    times = [event["time"] for event in trial.events()]
    steps = [after - before for before, after in zip(times, times[1:], strict=False)]
    if not min(steps) < -BACK / 2 < BACK / 2 < max(steps):
        problems.append("the clock did not jump")
    return f"{BACK // 3600} hours back and forward again, {len(trial.events('checkpoint'))} checkpoints", problems


# ---- Its files -----------------------------------------------------------------------------------------------------

def data_replaced(lab: Lab) -> tuple[str, list[str]]:
    """Replace the dataset file under a training that goes on, and under one that is taken up again."""
    lab.hpcai("preprocess", "./faults.py", "--source", "sample", "--output", "other.h5", "--set",
              "validation_fraction=0.3")
    for name in ("going-on.h5", "taken-up.h5"):
        shutil.copy(lab.folder / "data.h5", lab.folder / name)

    def replace(name: str, other: str) -> None:
        shutil.copy(lab.folder / other, lab.folder / "new.h5")
        os.replace(lab.folder / "new.h5", lab.folder / name)

    trial = _under_way(lab, "going-on", data="going-on.h5")
    replace("going-on.h5", "other.h5")
    problems = lab.finished_by(trial)
    trial = _under_way(lab, "taken-up", data="taken-up.h5")
    trial.kill(trial.processes())
    replace("taken-up.h5", "other.h5")
    refused = lab.train("taken-up")
    if refused.wait() != DataError.exit_code or "fingerprint" not in refused.said():
        problems.append(f"other data: exit code {refused.process.returncode}: {refused.said()[-300:]}")
    replace("taken-up.h5", "data.h5")
    return "a training keeps its file; on another one it is refused", problems + lab.finished("taken-up")


def two_trainings(lab: Lab) -> tuple[str, list[str]]:
    """Start a second training on a run: it is refused, and names the first, which goes on."""
    trial, problems = _under_way(lab, "twice"), []
    # Or it might be done before the others have loaded their libraries.
    trial.signal(signal.SIGSTOP)
    for np in (1, 2):
        second = lab.train("twice", np=np)
        if second.wait() != UsageError.exit_code or f"is being trained by process {trial.process.pid} on " not in (
                second.said()):
            problems.append(f"a second one of {np}: exit code {second.process.returncode}: {second.said()[-300:]}")
    trial.signal(signal.SIGCONT)
    return "the second is refused, alone and as two ranks, and names the first", problems + lab.finished_by(trial)


def stale_lock(lab: Lab) -> tuple[str, list[str]]:
    """Leave locks of processes that are gone, in a run and in a folder that is not yet one."""
    problems = []
    trial = _under_way(lab, "stale")
    trial.kill(trial.processes())
    for content in (json.dumps({"process": 1, "host": "elsewhere", "since": 0, "command": "hpcai"}), "{", ""):
        (lab.folder / "stale" / ".lock").write_text(content)
        going_on = lab.train("stale")
        going_on.wait_until(lambda going_on=going_on: going_on.events("first_step"))
        if not going_on.events("resumed"):
            problems.append(f"a lock that holds {content!r}: {going_on.said()[-300:]}")
        going_on.kill(going_on.processes())
    problems += lab.finished("stale")
    # What a kill leaves that comes between the lock and the description of the run.
    (lab.folder / "begun").mkdir()
    (lab.folder / "begun" / ".lock").touch()
    return "locks of others and broken ones hinder nobody", problems + lab.finished("begun")


# ---- What they need ------------------------------------------------------------------------------------------------

def _under_way(lab: Lab, run: str, *words: object, **how) -> Trial:
    """Start a training and return it when it has written some checkpoints."""
    trial = lab.train(run, *words, **how)
    if not trial.wait_until(lambda: len(trial.events("checkpoint")) >= 2):
        raise RuntimeError(f"{run} does not come to {2 * EVERY} steps: {trial.said()}")
    return trial


@contextlib.contextmanager
def _mounted(folder: Path, *words: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", *words, str(folder)], check=True)
    try:
        yield
    finally:
        # Also while a process that fails to end works in it.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def _filled(folder: Path, *, leaving: int) -> Iterator[None]:
    """Keep a disk full: what a checkpoint that fails gives back is taken again."""
    filler, done = folder / "filler", threading.Event()

    def fill() -> None:
        while not done.wait(0.002):
            free = shutil.disk_usage(folder).free - leaving
            if free > 0:
                with contextlib.suppress(OSError), filler.open("ab", buffering=0) as stream:
                    stream.write(bytes(free))

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        filler.unlink()
