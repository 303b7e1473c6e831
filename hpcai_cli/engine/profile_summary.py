"""Says in words where the time of some training steps went, and what to change."""

import statistics
from dataclasses import dataclass

KINDS = ("input", "compute", "communication", "python")
"""Where a step's time goes: gathering a batch and handing it to TensorFlow; arithmetic, and what TensorFlow does around
it; waiting for other ranks and for what they send; and what Python does between two calls."""
LARGE = 0.15
"""Share of a step from which on something is worth changing."""
DISTURBED = 1.2
"""By how much longer a step may take with a trace than without."""
IDLE = 0.6
"""Share of a process' threads that should be busy at the least."""
STARVED = 0.1
"""Cores that a rank may wait for before the machine counts as busy with other work."""
SCHEDULING = 0.3
"""Share of compute that may pass between operations."""
SHOWN = 6
"""Types of operations that are shown."""
TIMELINE = "horovod_timeline.json"
FUSION_BYTES = 128 << 20
"""Horovod's own limit for what travels in one message."""


@dataclass(frozen=True)
class Job:
    """What the advice depends on beside what was measured."""

    size: int
    local_size: int
    cores: int
    """The host's."""
    threads: int
    """Of each process."""
    gpus: int
    batch_size: int
    accumulation_steps: int
    precision: str
    instruction_sets: str
    launcher: str


def complete(measured: dict, job: Job) -> dict:
    """Add shares and advice to what was measured.

    Args:
        measured: `ranks_ms`, for each rank milliseconds a step of each of KINDS; `step_ms` and, without a trace,
            `step_ms_before`; `transfer_ms` and `messages` a step, by the timeline, None without one;
            `gradient_bytes`; `operations_ms` a step, by type; `per_call`, steps in a block; `busy_cores` and
            `starved_cores`, on how many cores a rank ran and for how many more it waited.
    """
    if job.gpus and measured["transfer_ms"] is not None:
        # TensorFlow only starts a GPU's work: what passes until the gradients are there is not all waiting for others.
        measured["ranks_ms"] = [_by_timeline(row, measured["transfer_ms"]) for row in measured["ranks_ms"]]
    means = [statistics.fmean(column) for column in zip(*measured["ranks_ms"], strict=True)]
    shares = {kind: value / max(sum(means), 1e-9) for kind, value in zip(KINDS, means, strict=True)}
    measured = measured | {"shares": shares}
    return measured | {"advice": advice(measured, job)}


def _by_timeline(row: list[float], transfer: float) -> list[float]:
    input, compute, communication, python = row
    transfer = min(transfer, compute + communication)
    return [input, compute + communication - transfer, transfer, python]


# ---- What to change ------------------------------------------------------------------------------------------------

def advice(measured: dict, job: Job) -> list[str]:
    """Return what would help, each with the reason, the largest share first; only what the figures say."""
    rules = {"communication": _communication, "input": _input, "python": _python, "compute": _compute}
    found = []
    for kind, share in sorted(measured["shares"].items(), key=lambda pair: -pair[1]):
        if share >= LARGE:
            found += rules[kind](measured, job)
    return found or ["Nothing stands out that a setting would change: the time goes into the model's own arithmetic."]


def _communication(measured: dict, job: Job) -> list[str]:
    waited = statistics.fmean(row[2] for row in measured["ranks_ms"])
    found = []
    if job.local_size * job.threads > job.cores and not job.gpus:
        found.append(f"{job.local_size} processes share {job.cores} cores of this host, and one that waits for its "
                     "core lets all others wait: start fewer with `--np`.")
    elif measured["transfer_ms"] is not None and waited > 2 * measured["transfer_ms"]:
        found.append(f"The ranks wait for each other longer than for data: {_late(measured['ranks_ms'], waited)}.")
    found.append(f"Gradients ({measured['gradient_bytes'] / 1e6:.2f} MB) travel once a step. With twice as many "
                 f"examples a step they travel half as often: `--batch-size {2 * job.batch_size}`, or "
                 f"`--set accumulation_steps={2 * job.accumulation_steps}` where memory is short.")
    if measured["gradient_bytes"] > FUSION_BYTES and (measured["messages"] or 0) > 1:
        found.append(f"They travel in {measured['messages']:.1f} messages a step; HOROVOD_FUSION_THRESHOLD="
                     f"{measured['gradient_bytes']} lets them travel in one.")
    if job.launcher == "horovodrun" and job.local_size == job.size and not job.gpus:
        found.append("Open MPI sends through shared memory on one host, which Gloo does not: `hpcai doctor "
                     "--build-horovod --with-mpi`, then `hpcai train --np`.")
    return found


def _late(ranks_ms: list[list[float]], waited: float) -> str:
    """Say which rank the others wait for: one is late in all steps, or all of them in turn."""
    own = [sum(row) - row[KINDS.index("communication")] for row in ranks_ms]
    slowest = max(range(len(own)), key=own.__getitem__)
    if own[slowest] - statistics.median(own) < waited / 4:
        return "they are late in turns, as when something else takes their cores now and then"
    return (f"rank {slowest} needs {own[slowest]:.2f} ms for its own part of a step, the fastest {min(own):.2f} ms; "
            "look for what else runs on its cores, or for a slower machine")


def _input(measured: dict, job: Job) -> list[str]:
    return ["Batches are gathered and copied while nothing computes. `hpcai benchmark input` tells whether the file or "
            "the memory is the limit: a file on a network or a slow disk belongs on a local one, and smaller examples "
            "(`hpcai preprocess --set`) take less to copy."]


def _python(measured: dict, job: Job) -> list[str]:
    return [f"Python's part comes once a call, for {measured['per_call']:.0f} steps here: more examples a step need "
            f"fewer calls, `--batch-size {2 * job.batch_size}`."]


def _compute(measured: dict, job: Job) -> list[str]:
    found = []
    between = 1 - sum(measured["operations_ms"].values()) / max(_mean(measured, "compute"), 1e-9)
    if job.precision == "float32" and (job.gpus or "amx_bf16" in job.instruction_sets):
        found.append("This processor computes faster in bfloat16 than in float32: `--precision mixed_bfloat16`.")
    if job.gpus > job.local_size:
        found.append(f"{job.local_size} of {job.gpus} GPUs of this host work: `--np {job.gpus}`.")
    if job.size == 1 and not job.gpus and job.threads > 1 and (
            measured["busy_cores"] + measured["starved_cores"] < IDLE * job.threads):
        found.append(f"Of {job.threads} cores {measured['busy_cores']:.1f} are busy on average: `--np {job.threads}` "
                     "gives each a process of its own.")
    if measured["operations_ms"] and not job.gpus and between > SCHEDULING:
        found.append(f"TensorFlow spends {between:.0%} of compute between operations, of which each is small: "
                     f"`--batch-size {2 * job.batch_size}` makes them larger.")
    return found


def _mean(measured: dict, kind: str) -> float:
    return statistics.fmean(row[KINDS.index(kind)] for row in measured["ranks_ms"])


# ---- In words ------------------------------------------------------------------------------------------------------

def text(measured: dict) -> str:
    """Return the summary for people, in Markdown."""
    (first, last), (begun, ended) = measured["asked"], measured["steps"]
    whole = "" if (first, last) == (begun, ended) else f" (asked for: {first} to {last}; steps are compiled in blocks)"
    lines = [f"# Where the time goes, steps {begun} to {ended}", "",
             f"{ended - begun + 1} steps in {_plural(measured['blocks'], 'block')}{whole}; a step took "
             f"{measured['step_ms']:.2f} ms, the mean over {_plural(len(measured['ranks_ms']), 'rank')}.", "",
             "| part of a step | share | ms |", "|---|---:|---:|"]
    lines += [f"| {kind} | {share:.1%} | {_mean(measured, kind):.3f} |" for kind, share in measured["shares"].items()]
    lines += ["", *_details(measured), "", "## What to change", "", *(f"- {words}" for words in measured["advice"]), "",
              "## To look closer", "",
              f"- `tensorboard --logdir {measured['folder']}` (`pip install tensorboard xprof`), the page Profile"]
    if measured["transfer_ms"] is not None:
        lines.append(f"- `{measured['folder']}/{TIMELINE}` on https://ui.perfetto.dev or chrome://tracing: when each "
                     "gradient was negotiated and sent")
    return "\n".join(lines) + "\n"


def _details(measured: dict) -> list[str]:
    """Return what lies behind the shares, a sentence a line."""
    found = []
    if measured["transfer_ms"] is not None:
        found.append(f"Communication: {_mean(measured, 'communication'):.3f} ms a step, of which copying and sending "
                     f"take {measured['transfer_ms']:.3f} ms on rank 0, and the rest is waiting and agreement; "
                     f"{measured['gradient_bytes'] / 1e6:.2f} MB in {measured['messages']:.1f} messages.")
    compute = _mean(measured, "compute")
    largest = list(measured["operations_ms"].items())[:SHOWN]
    if largest:
        found.append("Compute, by operation: " + ", ".join(
            f"{name} {milliseconds / max(compute, 1e-9):.0%}" for name, milliseconds in largest) + ".")
    before = measured["step_ms_before"]
    if before and measured["step_ms"] > DISTURBED * before:
        found.append(f"Before the trace a step took {before:.2f} ms: tracing made it "
                     f"{measured['step_ms'] / before - 1:.0%} longer, and small operations look larger than they are.")
    elif before:
        found.append(f"Before the trace a step took {before:.2f} ms.")
    if measured["starved_cores"] > STARVED:
        found.append("The machine was busy with other work: a rank's threads waited for a core for "
                     f"{measured['starved_cores']:.0%} of the time, summed over them. Measure again when it is quiet.")
    return found


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
