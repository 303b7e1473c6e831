"""Hosts and how many ranks each takes: as the user names them, from a file, or as a batch system allots them."""

import contextlib
import fcntl
import ipaddress
import os
import re
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcai_cli.errors import DataError, UsageError

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?")
_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B
_MOST_HOSTS = 100_000
"""That a list of nodes may stand for."""


@dataclass(frozen=True)
class Host:
    """One machine."""

    name: str
    slots: int = 1
    """Ranks that it takes."""

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


def parse(text: str, *, where: str = "--hosts") -> tuple[Host, ...]:
    """Read hosts such as `a:4,b:4`; a host without a number takes one rank.

    Args:
        where: what has said so.

    Raises:
        UsageError: it says something else.
    """
    found = []
    for word in text.split(","):
        name, colon, slots = word.strip().partition(":")
        if not _NAME.fullmatch(name) or colon and not re.fullmatch(r"[1-9]\d{0,4}", slots, re.ASCII):
            raise UsageError(f"cannot read {where}", expected="names with numbers of ranks such as a:4,b:4",
                             mend="a port, a user or a key belongs into ~/.ssh/config", received=word)
        found.append(Host(name, int(slots or 1)))
    return _joined(found)


def read_file(path: Path) -> tuple[Host, ...]:
    """Read a file with a host on each line: `a slots=4` as for Open MPI, `a:4` as for MPICH and Horovod, or `a`.

    Raises:
        DataError: it cannot be read, or has other lines.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the hostfile {path}: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        match = re.fullmatch(r"(\S+?)(?::([1-9]\d{0,4})|(?:\s+\w+=\S+)*?\s+slots=([1-9]\d{0,4})(?:\s+\w+=\S+)*)?", text,
                             re.ASCII)
        if text and not (match and _NAME.fullmatch(match[1])):
            raise DataError(f"cannot read line {number} of the hostfile {path}", received=line,
                            expected="`a slots=4`, `a:4` or `a`")
        if text:
            found.append(Host(match[1], int(match[2] or match[3] or 1)))
    if not found:
        raise DataError(f"the hostfile {path} names no host", expected="a host on each line, such as `a slots=4`")
    return _joined(found)


def allotted(environ: Mapping[str, str] = os.environ) -> tuple[Host, ...]:
    """Return the hosts of the Slurm job or the Kubernetes MPIJob in which this process runs; none outside of them."""
    names = nodes(environ.get("SLURM_JOB_NODELIST", ""))
    if names:
        slots = per_node(environ.get("SLURM_TASKS_PER_NODE", "")) or [1] * len(names)
        return tuple(map(Host, names, slots)) if len(slots) == len(names) else ()
    file = environ.get("OMPI_MCA_orte_default_hostfile", "")
    if environ.get("K_MPI_JOB_ROLE") == "launcher" and Path(file).is_file():
        return read_file(Path(file))
    return ()


def nodes(text: str) -> list[str]:
    """Return the names that a list of Slurm stands for: `gpu[01-03,7],login` for five; none where it cannot be read."""
    if not re.fullmatch(r"(?:[\w.-]+|\[[\d,-]+\]|,)+", text):
        return []
    found: list[str] = []
    for part in re.findall(r"(?:[\w.-]|\[[^\]]*\])+", text):
        names = [""]
        for plain, numbers in re.findall(r"([\w.-]+)|\[([^\]]*)\]", part):
            ends = [plain] if plain else [each for one in numbers.split(",") for each in _range(one)]
            names = [name + end for name in names for end in ends]
            if len(names) > _MOST_HOSTS:
                return []
        found += names
    return found


def per_node(text: str) -> list[int]:
    """Return Slurm's numbers for each node: `2(x3),1` for 2, 2, 2 and 1; none where it cannot be read."""
    found: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", word.strip(), re.ASCII)
        if not match:
            return []
        found += [int(match[1])] * int(match[2] or 1)
    return found


def is_here(name: str) -> bool:
    """Tell whether a host is this one: by its name, or since its address can be bound here."""
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        family, *_, address = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as tried:
            tried.bind((address[0], 0))
        return True
    except OSError:
        return False


def common_interface(names: Iterable[str]) -> tuple[str, str]:
    """Return the interface, and its network such as 10.0.0.0/24, through which this host reaches all of these directly.

    Both are empty where there are routers or several networks between them.
    """
    found = set()
    for name in names:
        try:
            other = socket.getaddrinfo(name, 9, family=socket.AF_INET, type=socket.SOCK_DGRAM)[0][4]
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
                # Sends nothing: it asks the routing table which of our addresses would be the sender's.
                asked.connect(other)
                interface, network = _interface_of(asked.getsockname()[0])
        except OSError:
            return "", ""
        if not interface or ipaddress.ip_address(other[0]) not in network:
            return "", ""
        found.add((interface, str(network)))
    return found.pop() if len(found) == 1 else ("", "")


def interface_addresses() -> dict[str, ipaddress.IPv4Interface]:
    """Return the IPv4 address and network of each interface of this host that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, interface in socket.if_nameindex():
            request = struct.pack("256s", interface.encode())
            with contextlib.suppress(OSError):
                own, mask = (socket.inet_ntoa(fcntl.ioctl(asked, code, request)[20:24])
                             for code in (_SIOCGIFADDR, _SIOCGIFNETMASK))
                found[interface] = ipaddress.ip_interface(f"{own}/{mask}")
    return found


def _interface_of(address: str) -> tuple[str, ipaddress.IPv4Network | None]:
    """Return the interface that has this address, and its network."""
    for interface, own in interface_addresses().items():
        if str(own.ip) == address:
            return interface, own.network
    return "", None


def _range(text: str) -> list[str]:
    first, dash, last = text.partition("-")
    if not dash:
        return [first]
    if not (first.isdecimal() and last.isdecimal()) or int(last) - int(first) >= _MOST_HOSTS:
        return []
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _joined(found: Iterable[Host]) -> tuple[Host, ...]:
    """Return each host once, with the ranks of all its mentions."""
    slots: dict[str, int] = {}
    for host in found:
        slots[host.name] = slots.get(host.name, 0) + host.slots
    return tuple(map(Host, slots, slots.values()))
