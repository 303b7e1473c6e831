"""Horovod's autotuning of its fusion threshold and cycle time: the log of a job, and the best that it tried."""

import atexit
import csv
import os
import shutil
import tempfile
from pathlib import Path

from hpcai_cli import launch

HOROVODS_FUSION_MB, HOROVODS_CYCLE_MS = 128.0, 1.0
"""What Horovod takes where nothing is set."""


def begin() -> Path | None:
    """Have rank 0 log what is tried, where HOROVOD_AUTOTUNE asks for it; to be called before Horovod starts."""
    if os.environ.get("HOROVOD_AUTOTUNE", "0") == "0" or launch.place().rank != 0 or launch.place().size == 1:
        return None
    named = os.environ.get("HOROVOD_AUTOTUNE_LOG")
    if not named:
        handle, named = tempfile.mkstemp(prefix="hpcai-autotune-", suffix=".csv")
        os.close(handle)
        atexit.register(Path(named).unlink, missing_ok=True)
        os.environ["HOROVOD_AUTOTUNE_LOG"] = named
    return Path(named)


def settings() -> dict:
    """Return what Horovod was started with."""
    fusion = os.environ.get("HOROVOD_FUSION_THRESHOLD")
    return {"fusion_mb": int(fusion) / 2**20 if fusion else HOROVODS_FUSION_MB,
            "cycle_ms": float(os.environ.get("HOROVOD_CYCLE_TIME", HOROVODS_CYCLE_MS)),
            "autotune": os.environ.get("HOROVOD_AUTOTUNE", "0") != "0"}


def found(log: Path, kept: Path) -> dict | None:
    """Return the best values that were tried, None where Horovod has tried none: the job was too short.

    Args:
        log: Horovod's, from `begin`.
        kept: where a copy of it goes.

    Returns:
        `fusion_mb`, `cycle_ms`, `score` in bytes a microsecond, and `tried`, how many settings were.
    """
    if not log.is_file():
        # A place of the user's own, where Horovod cannot write; it does not say so.
        return None
    shutil.copyfile(log, kept)
    with log.open() as stream:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)
                if all(row.values())]
    if not rows:
        return None
    best = max(rows, key=lambda row: row["score"])
    return {"fusion_mb": best["tensor_fusion_threshold"], "cycle_ms": best["cycle_time_ms"], "score": best["score"],
            "tried": len(rows)}


def words(best: dict | None) -> str:
    """Return the result for people."""
    if best is None:
        return "autotune: nothing was tried; the job was too short, or HOROVOD_AUTOTUNE_LOG cannot be written"
    return (f"autotune: best of {best['tried']} tried was --fusion-mb {best['fusion_mb']:g} "
            f"--cycle-ms {best['cycle_ms']:g}")
