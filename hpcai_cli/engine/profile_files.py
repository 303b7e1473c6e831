"""Reads what a profile has written: TensorFlow's trace of operations, Horovod's timeline of messages."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from hpcai_cli.engine.distributed import GRADIENTS

_CONTAINERS = {"While", "If", "PartitionedCall", "StatefulPartitionedCall"}
"""Operations that hold others, whose time is counted with those."""


def operations(folder: Path) -> dict[str, float]:
    """Return the seconds of each type of operation in TensorFlow's newest trace, the longest first.

    Those that the processor computed: a GPU's are only started there. Empty where there is no trace that this
    TensorFlow can read.
    """
    files = sorted(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    try:
        # Not a public interface of TensorFlow; what it gives is an extra.
        from tensorflow.tsl.profiler.protobuf import xplane_pb2

        space = xplane_pb2.XSpace.FromString(files[-1].read_bytes())
    except Exception:
        return {}
    found = defaultdict(float)
    for plane in space.planes:
        if plane.name.startswith("/host:CPU"):
            # An operation's event is called PATH:TYPE.
            kinds = {number: name.partition(":")[2] for number, name in
                     ((key, each.name) for key, each in plane.event_metadata.items())}
            for line in plane.lines:
                if line.name.startswith("tf_"):
                    for event in line.events:
                        found[kinds[event.metadata_id]] += event.duration_ps * 1e-12
    seconds = {kind: value for kind, value in found.items() if kind.isidentifier() and kind not in _CONTAINERS}
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1]))


@dataclass(frozen=True)
class Messages:
    """What a timeline says of the gradients' way."""

    seconds: float
    """During which any of them was copied or sent, on rank 0."""
    count: int
    """How many messages they travelled in; tensors that are fused travel in one."""


def messages(timeline: Path) -> Messages | None:
    """Return what Horovod's timeline says; None where there is none or it is broken off.

    The format: https://horovod.readthedocs.io/en/stable/timeline_include.html
    """
    try:
        events = json.loads(timeline.read_text())
    except (OSError, ValueError):
        return None
    names = {event["pid"]: event["args"]["name"] for event in events
             if event.get("name") == "process_name" and "name" in event["args"]}
    open_events, sent, active = defaultdict(list), [], []
    for event in events:
        tensor = event.get("pid")
        # Others than the gradients' are ours: barriers, the proof that the ranks are in step.
        if f"{GRADIENTS}." not in names.get(tensor, ""):
            continue
        if event["ph"] == "B":
            open_events[tensor].append(event)
        elif event["ph"] == "E" and open_events[tensor]:
            begun = open_events[tensor].pop()
            span = begun["ts"] * 1e-6, event["ts"] * 1e-6
            if begun["name"] == "ALLREDUCE":
                sent.append(span)
            elif open_events[tensor] and not begun["name"].startswith(("WAIT_FOR", "QUEUE")):
                active.append(span)
    return Messages(sum(end - start for start, end in merged(active)), len(merged(sent)))


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the spans of time that such spans cover together, in order."""
    found = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found
