"""Whether other hosts can take ranks, asked of all at once by ssh before anything is started there."""

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcai_cli import __version__, console, launch
from hpcai_cli.errors import MissingError, printable
from hpcai_cli.launchers import START_SECONDS, Ranks

CONNECT_SECONDS = 10
_POLL_SECONDS = 0.02

# What the other host found wrong, by the exit code of the words below; ssh's own is 255.
_NO_FOLDER, _NO_FILE, _NO_PROGRAM, _NO_INTERFACE, _SSH = 81, 82, 83, 84, 255
# ssh's own words, and what they mean and want.
_REASONS = (
    ("Permission denied", "does not accept a key of this user's", "run `ssh-copy-id {host}`"),
    ("Host key verification failed", "is not known to ssh, or is not the host that it was",
     "run `ssh {host}` once and compare its key"),
    ("Could not resolve", "has no address", "check its name"),
    ("Connection refused", "runs no ssh server", "start it there, or write its port into ~/.ssh/config"),
    ("Connection timed out|No route to host|Network is unreachable|Operation timed out", "cannot be reached",
     "check that it is up and on this network"),
)


@dataclass(frozen=True)
class Problem:
    """What keeps a host from taking ranks."""

    host: str
    what: str
    """Goes on behind the host's name."""
    mend: str

    def __str__(self) -> str:
        return f"{self.host} {self.what}: {self.mend}"


@dataclass(frozen=True)
class Answer:
    """What a host said to a question."""

    code: int | None
    """The exit code of the words there, 255 where ssh itself failed; None without an answer within START_SECONDS."""
    lines: tuple[str, ...]
    asked: float
    answered: float
    """Unix seconds of this host's clock."""


def check(ranks: Ranks, files: Sequence[Path] = ()) -> None:
    """Ask each other host for this folder, the files, this very program and the network interface.

    Raises:
        MissingError: some lack something, or don't answer within START_SECONDS; it says which and what.
    """
    if found := problems(ranks, files):
        shown = [*map(str, found[:8])] + ([f"{len(found) - 8} more hosts"] if len(found) > 8 else [])
        raise MissingError("; ".join(shown), received=",".join(map(str, ranks.hosts)),
                           expected="on each host a login by ssh without a password, and this folder, data and "
                                    "environment at the same paths")


def problems(ranks: Ranks, files: Sequence[Path] = ()) -> list[Problem]:
    """Return what keeps the other hosts from taking ranks, at most one problem each.

    Raises:
        MissingError: there is no ssh to ask them by.
    """
    if ranks.launcher == "srun" or not (others := ranks.other_hosts):
        return []
    if not shutil.which("ssh"):
        raise MissingError("ranks on other hosts are started by ssh, which is not on PATH", expected="OpenSSH's client",
                           received=others[0])
    if ranks.interface and (cut_off := [host for host in others if not _leads_to(ranks.interface, host)]):
        return [Problem(host, f"is not reached over {ranks.interface}",
                        "name an interface that leads there, or leave --interface out") for host in cut_off]
    # mpirun goes by the network, horovodrun by the name, which has to be the same everywhere.
    interface = ranks.interface or (ranks.way[0] if ranks.launcher == "horovodrun" else "")
    console.note(f"asking {', '.join(others[:5])}{' and others' if len(others) > 5 else ''} for this folder and "
                 "program ...")
    answers = ask(others, _question(files, interface))
    return [problem for host, answer in answers.items() if (problem := _problem(host, answer, files))]


def ask(others: Sequence[str], question: str) -> dict[str, Answer]:
    """Run the words of a shell on all these hosts at once, and return what comes back within START_SECONDS."""
    answers, asked, deadline = {}, time.time(), time.monotonic() + START_SECONDS
    with contextlib.ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="hpcai-")))
        started = {}
        for number, host in enumerate(others):
            said = running.enter_context((folder / str(number)).open("w+", errors="replace"))
            started[host] = said, subprocess.Popen(
                ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", host, question],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
            running.callback(_end, started[host][1])
        while len(answers) < len(started):
            is_late = time.monotonic() > deadline
            for host, (said, process) in started.items():
                if host not in answers and (process.poll() is not None or is_late):
                    said.seek(0)
                    lines = tuple(line.strip() for line in said.read().splitlines() if line.strip())
                    answers[host] = Answer(process.returncode, lines or ("nothing",), asked, time.time())
            time.sleep(_POLL_SECONDS)
    return {host: answers[host] for host in others}


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def _question(files: Sequence[Path], interface: str) -> str:
    """Return what a shell on the other host is to do."""
    program = shlex.quote(str(launch.beside("hpcai")))
    words = [f"cd {shlex.quote(os.getcwd())} 2>/dev/null || exit {_NO_FOLDER}"]
    words += [f"test -e {shlex.quote(str(file))} || exit {_NO_FILE}" for file in files]
    words += [f"test -x {program} || exit {_NO_PROGRAM}"]
    if interface:
        words += [f"test -e /sys/class/net/{shlex.quote(interface)} || exit {_NO_INTERFACE}"]
    return "; ".join([*words, f"{program} --version"])


def _problem(host: str, answer: Answer, files: Sequence[Path]) -> Problem | None:
    if answer.code is None:
        return Problem(host, f"does not answer within {START_SECONDS} s", f"see where `ssh {host}` hangs")
    last = printable(answer.lines[-1])
    if answer.code == _SSH:
        for pattern, meaning, mend in _REASONS:
            if found := [line for line in answer.lines if re.search(pattern, line)]:
                return Problem(host, f"{meaning} ({printable(found[-1])})", mend.format(host=host))
        return Problem(host, f"cannot be asked: ssh fails ({last})", f"mend what `ssh {host}` says")
    reasons = {_NO_FOLDER: (f"does not see this folder, {os.getcwd()}", "mount it there at the same path"),
               _NO_FILE: (f"does not see {' and '.join(map(str, files))}", "mount the folder there at the same path"),
               _NO_PROGRAM: (f"does not have {launch.beside('hpcai')}", "install hpcai there at the same path"),
               _NO_INTERFACE: ("has no network interface of this host's name",
                               "--interface names another, and --launcher mpirun needs no common name")}
    if answer.code in reasons:
        return Problem(host, *reasons[answer.code])
    if answer.code != 0:
        return Problem(host, f"has {launch.beside('hpcai')}, which fails there ({last})",
                       f"mend what `ssh {host} {launch.beside('hpcai')} --version` says")
    version = last.split()[-1]
    if version != __version__:
        return Problem(host, f"has hpcai {version}, and this host {__version__}", "install the same on both")
    return None


def _leads_to(interface: str, host: str) -> bool:
    """Tell whether the host answers over this interface, refusing included; true where that cannot be tried."""
    try:
        family, *_, address = socket.getaddrinfo(host, 22, type=socket.SOCK_STREAM)[0]
    except OSError:
        # A name that ssh alone knows.
        return True
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.settimeout(CONNECT_SECONDS)
        try:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        except OSError:
            return True
        try:
            tried.connect(address)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return True
