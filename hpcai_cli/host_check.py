"""Whether other hosts can take ranks, asked of all at once by ssh before anything is started there."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hpcai_cli import __version__, console, launch
from hpcai_cli.errors import MissingError, printable
from hpcai_cli.launchers import START_SECONDS, Ranks

CONNECT_SECONDS = 10

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


def check(ranks: Ranks, files: Sequence[Path] = ()) -> None:
    """Ask each other host for this folder, the files, this very program and the network interface.

    Raises:
        MissingError: some lack something, or don't answer within START_SECONDS; it says which and what.
    """
    if ranks.launcher == "srun" or not (others := ranks.other_hosts):
        return
    if not shutil.which("ssh"):
        raise MissingError("ranks on other hosts are started by ssh, which is not on PATH", expected="OpenSSH's client",
                           received=others[0])
    problems = [f"{host} is not reached over {ranks.interface}" for host in others
                if ranks.interface and not _leads_to(ranks.interface, host)]
    # mpirun goes by the network, horovodrun by the name, which has to be the same everywhere.
    interface = ranks.interface or (ranks.way[0] if ranks.launcher == "horovodrun" else "")
    if not problems:
        console.note(f"asking {', '.join(others[:5])}{' and others' if len(others) > 5 else ''} for this folder and "
                     "program ...")
        problems = [problem for problem in _asked(others, _question(files, interface), files) if problem]
    if problems:
        shown = problems[:8] + ([f"{len(problems) - 8} more hosts"] if len(problems) > 8 else [])
        raise MissingError("; ".join(shown), received=",".join(map(str, ranks.hosts)),
                           expected="on each host a login by ssh without a password, and this folder, data and "
                                    "environment at the same paths")


def _question(files: Sequence[Path], interface: str) -> str:
    """Return what a shell on the other host is to do."""
    program = shlex.quote(str(launch.beside("hpcai")))
    words = [f"cd {shlex.quote(os.getcwd())} 2>/dev/null || exit {_NO_FOLDER}"]
    words += [f"test -e {shlex.quote(str(file))} || exit {_NO_FILE}" for file in files]
    words += [f"test -x {program} || exit {_NO_PROGRAM}"]
    if interface:
        words += [f"test -e /sys/class/net/{shlex.quote(interface)} || exit {_NO_INTERFACE}"]
    return "; ".join([*words, f"{program} --version"])


def _asked(others: Sequence[str], question: str, files: Sequence[Path]) -> list[str]:
    """Return what is wrong with each host, empty where nothing is."""
    deadline = time.monotonic() + START_SECONDS
    with tempfile.TemporaryDirectory(prefix="hpcai-") as folder:
        started = []
        for number, host in enumerate(others):
            said = (Path(folder) / str(number)).open("w+")
            started.append((host, said, subprocess.Popen(
                ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", host, question],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)))
        try:
            return [_problem(host, process, said, deadline, files) for host, said, process in started]
        finally:
            for _, said, process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                said.close()


def _problem(host: str, process: subprocess.Popen, said, deadline: float, files: Sequence[Path]) -> str:
    try:
        code = process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return f"{host} does not answer within {START_SECONDS} s"
    said.seek(0)
    lines = [line.strip() for line in said.read().splitlines() if line.strip()] or ["nothing"]
    if code == _SSH:
        for pattern, meaning, mend in _REASONS:
            if found := [line for line in lines if re.search(pattern, line)]:
                return f"{host} {meaning} ({printable(found[-1])}): {mend.format(host=host)}"
        return f"{host}: ssh fails ({printable(lines[-1])})"
    reasons = {_NO_FOLDER: f"does not see this folder, {os.getcwd()}",
               _NO_FILE: f"does not see {' and '.join(map(str, files))}",
               _NO_PROGRAM: f"does not have {launch.beside('hpcai')}",
               _NO_INTERFACE: "has no network interface of this host's name; --interface names another, and --launcher "
                                "mpirun needs no common name"}
    if code in reasons:
        return f"{host} {reasons[code]}"
    if code != 0:
        return f"{host}: {launch.beside('hpcai')} fails there ({printable(lines[-1])})"
    version = lines[-1].split()[-1]
    return "" if version == __version__ else f"{host} has hpcai {printable(version)}, and this host {__version__}"


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
