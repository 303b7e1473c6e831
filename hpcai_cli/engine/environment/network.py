"""The network interfaces of this host, and which of them leads to the other hosts."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcai_cli import hosts
from hpcai_cli.engine.environment.finding import Finding, judged
from hpcai_cli.launchers import Ranks

_UP, _LOOPBACK = 0x1, 0x8
"""Bits of the flags, as <net/if.h> has them."""


@dataclass(frozen=True)
class Interface:
    """One network interface."""

    name: str
    addresses: tuple[str, ...]
    """With the length of the network's part, such as 10.0.0.5/24; IPv6 without those of the link alone."""
    is_up: bool
    is_loopback: bool = False
    is_bridge: bool = False
    """Containers or virtual machines hang on it; it leads to no other host."""
    megabits: int = 0
    """A second; 0 where it does not tell."""

    def __str__(self) -> str:
        speed = f"{self.megabits / 1000:g} Gbit/s" if self.megabits else ""
        said = [self.name, *self.addresses, "" if self.is_up else "down", speed,
                "(bridge of containers)" if self.is_bridge else ""]
        return " ".join(word for word in said if word)


def findings() -> list[Finding]:
    """Look at this host's interfaces."""
    found = interfaces()
    loopback = next((each for each in found if each.is_loopback), None)
    shown = [str(each) for each in found if each.is_up]
    down = [each.name for each in found if not each.is_up]
    value = "; ".join([*shown, *([f"down: {', '.join(down)}"] if down else [])]) or "none"
    fabric = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if fabric:
        value += f"; InfiniBand {', '.join(fabric)}"
    # Ranks of one host find each other over it.
    return [judged("interfaces", value, f"ip link set {loopback.name if loopback else 'lo'} up",
                   is_well=loopback is not None and loopback.is_up)]


def way(ranks: Ranks) -> Finding:
    """Say over which interface the hosts reach each other."""
    if not ranks.other_hosts:
        return Finding("way to the hosts", "ok", "all of them are this host")
    interface, network = ranks.way
    if not interface:
        return Finding("way to the hosts", "ok", "over routers or several networks; --interface chooses")
    here = next((each for each in interfaces() if each.name == interface), None)
    return Finding("way to the hosts", "ok", f"{here or interface}, which leads to {', '.join(ranks.other_hosts)}"
                                             f"{f' in {network}' if network != interface else ''}")


def interfaces(folder: Path = Path("/sys/class/net"), version_6: Path = Path("/proc/net/if_inet6")) -> list[Interface]:
    """Return the interfaces that the kernel shows, those that are up first."""
    addresses = {name: [str(address)] for name, address in hosts.interface_addresses().items()}
    for name, found in _version_6(version_6).items():
        addresses.setdefault(name, []).extend(found)
    found = [_interface(path, addresses) for path in sorted(folder.glob("*"))]
    return sorted(found, key=lambda each: (not each.is_up, each.is_loopback, each.name))


def _interface(path: Path, addresses: Mapping[str, list[str]]) -> Interface:
    flags, speed = _text(path / "flags"), _text(path / "speed")
    bits = int(flags, 16) if flags.startswith("0x") else 0
    # A cable that is not plugged in leaves an interface up and its state down; virtual ones know no state.
    is_up = bool(bits & _UP) and _text(path / "operstate") not in ("down", "lowerlayerdown", "notpresent")
    return Interface(path.name, tuple(addresses.get(path.name, ())), is_up, bool(bits & _LOOPBACK),
                     (path / "bridge").is_dir(), int(speed) if speed.isdecimal() else 0)


def _version_6(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in _text(path).splitlines():
        words = line.split()
        # Hexadecimal: address, number, length of the prefix, scope, flags; then the name.
        if len(words) == 6 and words[3] in ("00", "10"):
            address = ipaddress.IPv6Address(int(words[0], 16))
            if not address.is_loopback:
                found.setdefault(words[5], []).append(f"{address}/{int(words[2], 16)}")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        # What is down tells no speed.
        return ""
