"""One of two ranks is lost: killed, stopped for good, or away for a while in an elastic job."""

import signal
import time

from faults_lab import Lab, Trial

RESTARTED = 15.0
"""Seconds from the loss of a rank to the next step."""
HEARTBEAT, NOTICED = 5, 10.0
"""Seconds of the heartbeat in these trainings, and those after it in which a rank that hangs is noticed."""
ELASTIC, WHOLE = 2.0, 10.0
"""Seconds to the next step of an elastic job, and from there until it has all of its ranks again."""
EXAMPLES = 960
"""Of an epoch."""


def killed(lab: Lab) -> tuple[str, list[str]]:
    """Kill one of two ranks, each in its turn: the job goes on by itself."""
    found, problems = [], []
    for rank in (1, 0):
        trial = _under_way(lab, f"rank-{rank}-killed")
        moment = trial.signal(signal.SIGKILL, [trial.rank(rank)])
        seconds = _next_step(trial, moment)
        found.append(f"rank {rank} killed: the next step after {seconds:.1f} s")
        if seconds > RESTARTED:
            problems.append(f"{seconds:.1f} s without a step")
        problems += _restarted(trial) + lab.finished_by(trial)
    return ", ".join(found), problems


def stopped(lab: Lab) -> tuple[str, list[str]]:
    """Stop one of two ranks for good: that is noticed, and the job goes on by itself."""
    trial = _under_way(lab, "rank-stopped", "--heartbeat", HEARTBEAT)
    moment = trial.signal(signal.SIGSTOP, [trial.rank(1)])
    trial.wait_until(lambda: trial.events("restart"))
    noticed = time.monotonic() - moment
    seconds = _next_step(trial, moment)
    problems = _restarted(trial) + lab.finished_by(trial)
    if noticed > HEARTBEAT + NOTICED:
        problems.append(f"noticed only after {noticed:.1f} s")
    return f"noticed after {noticed:.1f} s of a heartbeat of {HEARTBEAT}, the next step after {seconds:.1f} s", problems


def elastic(lab: Lab) -> tuple[str, list[str]]:
    """Kill one of the two ranks of an elastic job: the other one goes on, and a new one is taken in."""
    trial = _under_way(lab, "elastic", "--elastic", "--min-np", 1, "--max-np", 2, "--set", "milliseconds=100")
    # Among steps, not in a validation, after which only the next one can come.
    trial.wait_until(lambda: trial.events("epoch"))
    time.sleep(0.5)
    before = len(trial.events("elastic"))
    moment = trial.signal(signal.SIGKILL, [trial.rank(1)])
    seconds = _next_step(trial, moment)
    came = trial.wait_until(lambda: [event["world_size"] for event in trial.events("elastic")[before:]][-1:] == [2])
    whole = time.monotonic() - moment - seconds
    code, problems = trial.wait(), []
    if code:
        problems.append(f"exit code {code}: {trial.said()[-500:]}")
    if seconds > ELASTIC or not came or whole > WHOLE:
        problems.append(f"{seconds:.1f} s without a step, then {whole:.1f} s without all ranks")
    examples = [event["examples"] for event in trial.events("epoch")]
    if examples != [EXAMPLES] * 6:
        problems.append(f"epochs of {examples} examples")
    return f"the next step after {seconds:.1f} s, two ranks again {whole:.1f} s after it", problems


def _under_way(lab: Lab, run: str, *words: object) -> Trial:
    """Start two ranks and return them when there is something to go back to."""
    trial = lab.train(run, *words, np=2)
    if not trial.wait_until(lambda: len(trial.events("checkpoint")) >= 2):
        raise RuntimeError(f"{run} does not get under way: {trial.said()}")
    return trial


def _next_step(trial: Trial, moment: float) -> float:
    """Wait until all ranks that there were at a moment are past it, and return how long it took to the next step."""
    # A rank that is left has begun a step, which will not come to its end.
    time.sleep(0.3)
    begun = {rank: len(trial.marks("step", rank)) for rank in (0, 1)}
    trial.wait_until(lambda: any(len(trial.marks("step", rank)) > begun[rank] for rank in begun))
    after = [mark.moment - moment for rank in begun for mark in trial.marks("step", rank)[begun[rank]:]]
    return min(after, default=float("inf"))


def _restarted(trial: Trial) -> list[str]:
    """Return what is wrong with how the parent has told of it."""
    count = len(trial.events("restart"))
    return [] if count == 1 else [f"{count} restarts are told of"]
