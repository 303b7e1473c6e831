"""The shell script of a job that `hpcai launch` starts: it saves itself when asked, and goes on when started again."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcai_cli.errors import UsageError
from hpcai_cli.launch import STAGED_VARIABLE, beside

CONTAINER = "apptainer"
TASK = "{task}"
"""Stands for the index of a task of a job array in the command's words."""
_IN_RANKS = ("train", "evaluate", "compress")
"""Commands that take --np."""


@dataclass(frozen=True)
class Command:
    """A command of hpcai, as it stands behind `--`."""

    words: tuple[str, ...]
    """Without hpcai itself."""
    tasks: int = 1
    """Ranks."""
    launcher: str = "auto"
    program: tuple[str, ...] = ()
    """Words that start the ranks themselves, as in a container; hpcai does when empty."""

    def check(self) -> None:
        """Raise a UsageError where no such job can be."""
        if not self.words or self.words[0].startswith("-"):
            raise UsageError("launch needs a command of hpcai", expected="it behind --, as in `hpcai launch slurm -- "
                             "train mnist --data data/mnist.h5`", received=" ".join(self.words) or "nothing")
        for option in ("--np", "--hosts", "--hostfile", "--launcher"):
            if any(word == option or word.startswith(f"{option}=") for word in self.words):
                raise UsageError(f"{option} behind -- is the job's to decide", received=" ".join(self.words),
                                 expected="--nodes, --tasks-per-node and --launcher before --")
        if self.tasks > 1 and self.words[0] not in _IN_RANKS:
            raise UsageError(f"{self.words[0]} runs in one process", expected="one task", received=self.tasks)

    @property
    def name(self) -> str:
        """What the job is called: the command and what it is about."""
        about = next((Path(word).stem for word in self.words[1:] if not word.startswith("-")), "")
        return "-".join(filter(None, (self.words[0], "".join(sign if sign.isalnum() or sign in "-_." else "-"
                                                             for sign in about).strip("-."))))

    def option(self, name: str) -> str | None:
        """Return the value of an option of the command, None where it is not given."""
        for place, word in enumerate(self.words):
            if word == name and place + 1 < len(self.words):
                return self.words[place + 1]
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
        return None

    def without(self, *names: str) -> tuple[str, ...]:
        """Return the words without these options and their values."""
        kept, skip = [], False
        for word in self.words:
            if not skip and word.partition("=")[0] not in names:
                kept.append(word)
            skip = not skip and word in names
        return tuple(kept)


def text(command: Command, folder: Path, *, here: Path | None = None, hpcai: str | None = None,
         header: Sequence[str] = (), before: Sequence[str] = (), stage: str = "", requeue: bool = False) -> str:
    """Return the script.

    Args:
        folder: the job's own; the script leaves the exit code there, in `ended`.
        here: where the command runs; by default in this folder.
        hpcai: the program; by default this one.
        header: lines right behind the first one.
        before: lines of shell that come before the command.
        stage: a folder on each node's disk, to which the dataset file goes first.
        requeue: whether a job that was asked to stop before its limit is queued again.
    """
    here = here or Path.cwd()
    lines = ["#!/bin/bash", *header, f"# Written by `hpcai launch`: hpcai {shlex.join(command.words)}", "set -u",
             f"cd {shlex.quote(str(here))} || exit 4", f"folder={shlex.quote(str(folder))}",
             'task="${SLURM_ARRAY_TASK_ID:-}"', 'ended="$folder/ended${task:+-$task}"', 'rm -f "$ended"', *before]
    words = command.without("--output", "--resume") if command.words[0] == "train" else command.words
    data = command.option("--data")
    if data is None and command.words[0] == "train" and len(words) > 1:
        usual = Path("data") / f"{Path(words[1]).stem}.h5"
        data = str(usual) if usual.is_file() else None
    if stage and data:
        words = Command(words).without("--data")
        lines += _staging(stage, data)
    program = [*command.program, hpcai or ("hpcai" if command.program else str(beside("hpcai")))]
    lines.append(f"command=({' '.join(_quoted(word) for word in (*program, *words))})")
    if stage and data:
        lines += [f"export {STAGED_VARIABLE}={shlex.quote(str(Path(data).absolute()))}",
                  'command+=(--data "$staged")']
    if command.words[0] == "train":
        run = command.option("--resume") or command.option("--output") or f"runs/{folder.name}"
        lines += [f'run={_quoted(run)}{"" if TASK in run else chr(34) + "${task:+-$task}" + chr(34)}',
                  'if [ -d "$run/checkpoints" ]; then command+=(--resume "$run"); else',
                  "    # What a job that ended before its first checkpoint has left is kept aside.",
                  '    if [ -n "$(ls -A "$run" 2> /dev/null)" ]; then mv "$run" "$run.before-$(date +%s)"; fi',
                  '    command+=(--output "$run")', "fi"]
    if command.tasks > 1 and not command.program:
        lines.append(f'command+=(--np "${{SLURM_NTASKS:-{command.tasks}}}"'
                     f'{"" if command.launcher == "auto" else f" --launcher {command.launcher}"})')
    return "\n".join([*lines, _RUN, *([_REQUEUE] if requeue else []), _END])


def _staging(stage: str, data: str) -> list[str]:
    source = shlex.quote(str(Path(data).absolute()))
    return [f"staged={shlex.quote(stage)}/hpcai-$SLURM_JOB_ID/$(basename {source})",
            'each=(srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)',
            """"${each[@]}" sh -c 'mkdir -p "$(dirname "$1")" && cp "$0" "$1.part" && mv "$1.part" "$1"' """
            f'{source} "$staged" || {{ echo 4 > "$ended"; exit 4; }}',
            """trap '"${each[@]}" rm -rf "$(dirname "$staged")"' EXIT"""]


def _quoted(word: str) -> str:
    """Quote a word for the shell; the index of the job array's task is put in."""
    return '"${task}"'.join(shlex.quote(part) if part else "" for part in word.split(TASK)) or "''"


_RUN = '''\
asked=
"${command[@]}" &
process=$!
trap 'asked=limit; kill -USR1 "$process"' USR1
trap 'asked=stop; kill -TERM "$process"' TERM INT
while kill -0 "$process" 2> /dev/null; do wait "$process"; done
wait "$process"
code=$?'''
_REQUEUE = '''\
# 75 is saved, also by who has read the limit from Slurm; 130 and 138 are asked before there was anything to save.
if [ "$asked" != stop ] && [[ "$code" = 75 || "$asked:$code" =~ ^limit:(130|138)$ ]]; then
    echo "stopped before the limit; queued again to go on" >&2
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${task:+_$task}" && exit 75
fi'''
_END = '''\
echo "$code" > "$ended"
exit "$code"
'''
