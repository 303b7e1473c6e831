"""Jobs that outlive their ranks: between how few and how many, on which hosts, in horovodrun's words."""

import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcai_cli import hosts
from hpcai_cli.errors import DataError, UsageError
from hpcai_cli.hosts import Host

NAMES_VARIABLE = "HPCAI_ELASTIC_NAMES"
"""The names that this host has for its ranks, one for each, with commas between them."""
TIMEOUT = 600
"""Seconds to wait for the fewest ranks, by default."""
# horovodrun leaves out a host that has lost a rank: at first for two to three seconds, then each time for twice as
# long, so that one that loses every rank doesn't stop the others all the time.
_LEFT_OUT_SECONDS = (1, 300)
_DISCOVERY_SECONDS = 30
# So long the ranks wait for one that is just starting, and for an answer of a host that has lost its power.
_MEETING_SECONDS = 60


@dataclass(frozen=True)
class Elastic:
    """What a job does when ranks are lost or can be had."""

    min_np: int = 1
    """The fewest to go on with."""
    max_np: int | None = None
    discovery: Path | None = None
    """A program that prints the hosts that can be had now, a line `HOST:N` for each; horovodrun asks it each second."""
    timeout: int = TIMEOUT
    """Seconds to wait for the fewest."""

    def words(self, np: int, named: tuple[Host, ...]) -> list[object]:
        """Return horovodrun's words for it."""
        found = ["--min-np", self.min_np, "--elastic-timeout", self.timeout, "--blacklist-cooldown-range",
                 *_LEFT_OUT_SECONDS]
        if self.max_np:
            found += ["--max-np", self.max_np]
        if self.discovery:
            # A shell gets to read it.
            return [*found, "--host-discovery-script", shlex.quote(os.path.abspath(self.discovery)),
                    "--slots-per-host", 1]
        return [*found, "-H", ",".join(map(str, named or [Host(name) for name in names_here(np)]))]

    def environment(self, np: int, named: tuple[Host, ...]) -> dict[str, str]:
        """Return the variables that the ranks get for it."""
        # Horovod calls the loss of a rank an error, in words of its own source; ours are for people.
        wanted = {"HOROVOD_LOG_LEVEL": "fatal", "HOROVOD_GLOO_TIMEOUT_SECONDS": str(_MEETING_SECONDS)}
        found = {name: value for name, value in wanted.items() if name not in os.environ}
        return found if named or self.discovery else found | {NAMES_VARIABLE: ",".join(names_here(np))}


def names_here(count: int) -> list[str]:
    """Return so many names of this host: 127.0.0.1, 127.0.0.01 and so on, which are octal and all the same address.

    horovodrun leaves out the whole host of a rank that was lost, and with it every other rank there. Under a name of
    its own each rank is the only one on its host.
    """
    return [f"127.0.0.{'0' * number}1" for number in range(count)]


def local_place(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the number of this rank's place on its host, and how many places that has, where they are names."""
    names = environ.get(NAMES_VARIABLE, "").split(",")
    own = environ.get("HOROVOD_HOSTNAME", "")
    return (names.index(own), len(names)) if own and own in names else None


def discovered(program: Path) -> tuple[Host, ...]:
    """Ask the program which hosts can be had now.

    Raises:
        UsageError: it cannot be run.
        DataError: it fails, or prints something else than hosts.
    """
    if not os.access(program, os.X_OK) or program.is_dir():
        raise UsageError("--discovery takes a program that prints hosts", expected="an executable file",
                         mend="run `chmod +x` on it", received=str(program))
    try:
        done = subprocess.run([os.path.abspath(program)], capture_output=True, text=True, errors="replace",
                              timeout=_DISCOVERY_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"cannot run {program}: {error}", expected=f"hosts within {_DISCOVERY_SECONDS} s") from None
    if done.returncode:
        raise DataError(f"{program} ends with {done.returncode}", expected="0, and a line such as `a:4` for each host",
                        received=done.stderr.strip())
    # None may be there yet: the job waits for them.
    return hosts.parse(",".join(done.stdout.split()), where=str(program)) if done.stdout.split() else ()
