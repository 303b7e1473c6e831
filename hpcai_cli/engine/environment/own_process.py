"""What may break or hang is tried in a process of its own, which ends with the trial."""

import json
import signal
import subprocess
from collections.abc import Mapping, Sequence

from hpcai_cli.engine.environment.long_process import end_group
from hpcai_cli.rank_processes import TAG


def run(command: Sequence[object], *, seconds: float, environ: Mapping[str, str]) -> tuple[int, str, str]:
    """Run a command to its end and return exit code, stdout and stderr; what it started has ended too."""
    # A `random.py` in the working folder must not be taken for Python's own.
    environ = {"PYTHONSAFEPATH": "1", "TF_CPP_MIN_LOG_LEVEL": "3", **environ}
    try:
        process = subprocess.Popen([*map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, errors="replace",
                                   env={**environ, "PYTHONWARNINGS": "ignore"}, start_new_session=True)
    except OSError as error:
        return 127, "", f"{command[0]}: {error.strerror}"
    try:
        output, errors = process.communicate(timeout=seconds)
        return process.returncode, output, errors
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {seconds:.0f} s"
    finally:
        end_group(process)
        process.stdout.close()
        process.stderr.close()


def ending(code: int, errors: str) -> str:
    """Say how a process ended: its last words, or the signal that ended it."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"


def json_lines(output: str) -> list[dict]:
    """Return the objects that lines of JSON hold, before which and into which launchers write `[1,0]<stdout>:`."""
    found = []
    for line in TAG.sub("", output).splitlines():
        try:
            found.append(json.loads(line[line.index("{"):]))
        except ValueError:
            continue
    return found
