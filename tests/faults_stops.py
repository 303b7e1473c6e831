"""Trainings that are killed and stopped at any moment, again and again, until they are done."""

import signal
import time
from collections.abc import Callable

from faults_lab import EVERY, Lab, Trial

from hpcai_cli.errors import EXIT_STOPPED

STRETCH = 2.5
"""Seconds behind the first step in which a kill or a signal comes."""
WRITING = 0.3
"""Share of the kills that wait for a checkpoint that is being written."""
STARTING = 0.1
"""Share of the kills that come while a training starts."""
BLOCK = 8
"""Steps of the recipe that are taken together: a checkpoint that is due waits for their end."""
PHASES = ("start", "first step", "step", "step", "validation", "write", "epoch", "test")
EPOCHS = 6
LATE, NOTICED = 1, 0.1
"""Steps that may begin after a signal that came so many seconds before: on a machine that is busy with other things,
threads wait for their turn."""
SLOWLY = ("--set", "milliseconds=40")
"""Of a training that gets signals, so that a step that is one too many takes longer than that."""
BEFORE_IT_BEGAN = (-signal.SIGTERM, 128 + signal.SIGTERM, 130)
"""Exit codes of what has nothing to save yet: as the system ends it, or as Ctrl-C does."""


def kills(lab: Lab, count: int, np: int) -> tuple[str, list[str]]:
    """Kill trainings of so many processes; return what was found and what is wrong."""
    problems, done, runs, inside, again = [], 0, 0, 0, [0]
    while done < count and not problems:
        runs += 1
        run = f"killed-{np}-{runs}"
        while done < count:
            trial = lab.train(run, np=np)
            if not _to_the_kill(lab, trial):
                problems += _ended(trial)
                break
            trial.kill(trial.processes())
            done, inside = done + 1, inside + trial.is_writing()
            problems += lab.left(run).broken()
            again.append(_lost(lab, trial))
        problems += lab.finished(run, np=np)
    if max(again) > EVERY + 2 * BLOCK:
        problems.append(f"a kill has cost {max(again)} steps")
    return (f"{done} kills of {runs} trainings, {inside} while a checkpoint was written, at most {max(again)} steps "
            "done again"), problems


def _to_the_kill(lab: Lab, trial: Trial) -> bool:
    """Wait for the moment of the kill; return whether there is still something to kill."""
    kind = lab.random.random()
    if kind < STARTING:
        return not trial.wait_until(lambda: False, lab.random.uniform(0, 8)) and trial.process.poll() is None
    if not trial.wait_until(lambda: trial.events("first_step")):
        return False
    trial.wait_until(lambda: False, lab.random.uniform(0, STRETCH))
    if kind < STARTING + WRITING:
        trial.wait_until(trial.is_writing, pause=0.0005)
        time.sleep(lab.random.uniform(0, 0.01))
    return trial.process.poll() is None


def _lost(lab: Lab, trial: Trial) -> int:
    """Return how many steps a kill has cost: begun and in no checkpoint."""
    state = lab.left(trial.run).newest()
    return max(0, trial.reached(0) - (state.step if state else 0))


# ---- Signals -------------------------------------------------------------------------------------------------------

def terms(lab: Lab, count: int, np: int) -> tuple[str, list[str]]:
    """Stop trainings of so many processes by SIGTERM in every phase; return what was found and what is wrong."""
    problems, runs, late, seconds, longest = [], 0, [0], [0.0], 0.0
    phases, met = _phases(lab, count), []
    while phases and not problems:
        runs += 1
        run = f"stopped-{np}-{runs}"
        while phases:
            trial = lab.train(run, *SLOWLY, np=np)
            if not _to_the_signal(lab, trial, phases[0]):
                problems += _ended(trial)
                # What this training is past of comes in the next one.
                break
            met.append(phases.pop(0))
            moment = trial.signal(signal.SIGTERM, [trial.process.pid])
            code = trial.wait()
            seconds.append(time.monotonic() - moment)
            found = _stopped(lab, trial, code)
            begun = [mark.moment - moment for rank in range(np) for mark in trial.marks("step", rank)]
            late.append(sum(each > NOTICED for each in begun) // np)
            longest = max([longest, *begun])
            if late[-1] > LATE:
                found.append(f"{late[-1]} steps began later than {NOTICED:g} s after the signal")
            problems += [f"in the {met[-1]}: {each}" for each in found]
            if code == 0:
                break
        problems += lab.finished(run, "--set", "milliseconds=10", np=np)
    return (f"{len(met)} signals to {runs} trainings, in {_counted(met)}; the last step began {longest:.2f} s after "
            f"one, {max(late)} more than {NOTICED:g} s after it; at most {max(seconds):.1f} s to the end"), problems


def _phases(lab: Lab, count: int) -> list[str]:
    """Return where the signals are to come, every phase as often, in an order that is left to chance."""
    found = [PHASES[number % len(PHASES)] for number in range(count)]
    lab.random.shuffle(found)
    return found


def _counted(phases: list[str]) -> str:
    return ", ".join(f"{phase} {phases.count(phase)}" for phase in dict.fromkeys(sorted(phases)))


def _to_the_signal(lab: Lab, trial: Trial, phase: str) -> bool:
    """Wait for a moment of the phase; return whether it came."""
    if phase == "start":
        return not trial.wait_until(lambda: False, lab.random.uniform(0, 6)) and trial.process.poll() is None
    if phase == "first step":
        came = trial.wait_until(lambda: trial.events("started") or trial.events("resumed"))
        time.sleep(lab.random.uniform(0, 0.5))
        return came and trial.process.poll() is None
    if not trial.wait_until(lambda: trial.events("first_step")):
        return False
    if phase == "test":
        # Epochs come to their end behind their validation.
        trial.wait_until(lambda: EPOCHS in [event["epoch"] for event in trial.events() if "epoch" in event])
    else:
        time.sleep(lab.random.uniform(0, STRETCH))
    epochs, batches = len(trial.events("epoch")), len(trial.marks("evaluation"))
    conditions: dict[str, Callable[[], object]] = {
        "step": lambda: True, "write": trial.is_writing, "epoch": lambda: len(trial.events("epoch")) > epochs,
        "validation": lambda: len(trial.marks("evaluation")) > batches,
        "test": lambda: len(trial.marks("evaluation")) > batches}
    return trial.wait_until(conditions[phase], pause=0.001) and trial.process.poll() is None


def _stopped(lab: Lab, trial: Trial, code: int | None) -> list[str]:
    """Return what is wrong with how a training has ended after the signal."""
    folder = lab.folder / trial.run
    problems = lab.left(trial.run).broken()
    if (folder / "failure.json").exists():
        problems.append(f"failure.json: {(folder / 'failure.json').read_text()}")
    if code == 0 and not (folder / "result.json").exists():
        problems.append("exit code 0 without a result")
    if code == EXIT_STOPPED and (state := lab.left(trial.run).newest()) is None:
        problems.append(f"no checkpoint: {trial.said()[-300:]}")
    elif code == EXIT_STOPPED and state.step != trial.reached(state.step):
        problems.append(f"the checkpoint is of step {state.step}, and {trial.reached(0)} were begun")
    if code not in (0, EXIT_STOPPED) and (trial.events() or code not in BEFORE_IT_BEGAN):
        problems.append(f"exit code {code}: {trial.said()[-300:]}")
    return problems


def _ended(trial: Trial) -> list[str]:
    """Return what is wrong with a training that has ended by itself."""
    code = trial.wait()
    return [] if code == 0 else [f"{trial.run} ended by itself with exit code {code}: {trial.said()[-500:]}"]
