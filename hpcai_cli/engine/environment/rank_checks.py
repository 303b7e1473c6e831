"""Starts ranks that reduce and train a step for `hpcai doctor`, by the command lines that training uses."""

import os
import re
from collections.abc import Mapping, Sequence

from hpcai_cli import console, launch, launchers
from hpcai_cli.engine.environment.finding import REBUILD, Finding
from hpcai_cli.engine.environment.own_process import ending, json_lines, run
from hpcai_cli.errors import printable
from hpcai_cli.launchers import Ranks

SECONDS = 180
"""Within which a job has ended: its ranks give up before that, with words of their own."""
_OWN_WORDS = (re.compile(r"\berror: .*"), re.compile(r"(?<=what\(\):  ).*"), re.compile(r"\w+Error: .*"))
"""A rank's: ours, an exception's of C++, one of Python."""


def here(probed: Mapping[str, dict]) -> list[Finding]:
    """Let two processes of this host try each transport that Horovod was built with.

    Args:
        probed: what `software.probe` has found.
    """
    if "error" in probed["horovod"]:
        return [Finding("allreduce", "missing", "not tried: Horovod cannot be imported", REBUILD, required=True)]
    built, jobs = probed["horovod"]["value"], {}
    if built["Gloo"]:
        jobs["Gloo"] = Ranks(2, "horovodrun")
    if built["MPI"]:
        jobs["MPI"] = Ranks(2, "mpirun")
    found = {}
    for transport, ranks in jobs.items():
        console.note(f"an allreduce and a training step of two processes over {transport} ...")
        # Of MPICH's mpirun only what the standard names is known.
        words = ranks.words() if transport == "Gloo" or launchers.has_open_mpi() else ["mpirun", "-np", "2"]
        environ = {**launch.without_launcher(), **ranks.environment()}
        if probed["cuda"].get("value", {}).get("gpus") == 1:
            # A rank takes a whole GPU.
            environ["CUDA_VISIBLE_DEVICES"] = "-1"
        mend = REBUILD if transport == "Gloo" else f"{REBUILD} --with-mpi"
        found[transport] = _tried(words, environ, transport.lower(), mend)
    return [*(finding for findings in found.values() for finding in findings), *_faster(found)]


def across(ranks: Ranks) -> list[Finding]:
    """Let ranks on all hosts try it, started as `train --hosts` starts them."""
    console.note(f"an allreduce and a training step of {ranks.np} processes by {ranks.launcher} ...")
    other = "horovodrun" if ranks.launcher != "horovodrun" else "mpirun"
    return _tried(ranks.words(), {**os.environ, **ranks.environment()}, "hosts",
                  "let the hosts reach all ports of each other, or name the interface that leads to them with "
                  f"--interface, or try --launcher {other}")


def _tried(words: Sequence[str], environ: Mapping[str, str], label: str, mend: str) -> list[Finding]:
    """Run `hpcai doctor` as ranks, and return rank 0's findings under this label, or why there are none."""
    code, output, errors = run([*words, launch.beside("hpcai"), "doctor", "--json"], seconds=SECONDS, environ=environ)
    document = next((each for each in json_lines(output) if "findings" in each), None)
    if document is None:
        why = _reason(code, output, errors)
        return [Finding(f"allreduce, {label}", "missing", f"fails: {printable(why)}", mend, required=True)]
    metrics = {f"{name}_{label}": value for name, value in document["metrics"].items()}
    return [Finding(f"{each['name']}, {label}", each["status"], each["value"], each["mend"] and mend,
                    # Each with its own: those of the allreduce and of the step begin with their names.
                    {name: value for name, value in metrics.items() if name.startswith(each["name"].replace(" ", "_"))},
                    required=True) for each in document["findings"]]


def _reason(code: int, output: str, errors: str) -> str:
    """Return why there is no result: a rank's own words, after which launchers have much to say, or the launcher's."""
    lines = [line.strip() for line in f"{output}\n{errors}".splitlines() if re.search(r"\w", line)]
    for pattern in _OWN_WORDS:
        if own := next((match for match in map(pattern.search, lines) if match), None):
            return own[0]
    # A launcher begins with what happened, over some lines, and goes on with what may be the cause.
    return " ".join(lines[:4]) if lines and code >= 0 else ending(code, errors)


def _faster(found: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Say which of two transports to use, where both work."""
    speeds = {transport: (findings[0].metrics[f"allreduce_bytes_per_second_{transport.lower()}"],
                          findings[0].metrics[f"allreduce_latency_seconds_{transport.lower()}"])
              for transport, findings in found.items() if findings[0].status == "ok"}
    if len(speeds) < 2:
        return []
    # Gradients of a model are a few fused megabytes, so that the bandwidth decides.
    best, other = sorted(speeds, key=lambda transport: -speeds[transport][0])
    launcher = {"Gloo": "horovodrun", "MPI": "mpirun"}[best]
    usual = launchers.local(2).launcher
    value = (f"{best} is faster for gradients: {speeds[best][0] / 1e9:.2f} GB/s against {speeds[other][0] / 1e9:.2f} "
             f"by {other}; small messages take {1e6 * speeds[best][1]:,.0f} us against {1e6 * speeds[other][1]:,.0f}")
    return [Finding("transport", "ok", f"{value}; --np uses it" if launcher == usual else value,
                    "" if launcher == usual else f"--launcher {launcher} with --np")]
