"""What the doctor says of interfaces: those of a network namespace of its own."""

import json
import subprocess
import sys

import pytest

LOOK = ("import dataclasses, json; from hpcai_cli.engine.environment import network; "
        "(found,) = network.findings(); print(json.dumps([found.status, found.value, found.mend]))")


def interfaces(words: str) -> list[str]:
    """Return status, value and mend where a shell has run these words in an empty network."""
    done = subprocess.run(["unshare", "--net", "--mount", "sh", "-c",
                           f'mount -t sysfs none /sys && {words} && exec {sys.executable} -c "$0"', LOOK],
                          capture_output=True, text=True, timeout=60)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr.lower():
        pytest.skip("no namespace can be made here")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_loopback_no_rank_finds_another():
    status, value, mend = interfaces("true")
    assert status == "warning" and "down:" in value and mend == "ip link set lo up"


def test_addresses_of_both_versions_a_bridge_and_what_is_down():
    status, value, mend = interfaces(
        "ip link set lo up && ip link add wire type veth peer name end && ip addr add 10.213.9.1/24 dev wire && "
        "ip addr add fd00:9::1/64 dev wire nodad && ip link set wire up && ip link set end up && "
        "ip link add docker0 type bridge && ip addr add 172.17.0.1/16 dev docker0 && ip link set docker0 up && "
        "ip link add spare type bridge")
    assert status == "ok" and mend == ""
    assert "wire 10.213.9.1/24 fd00:9::1/64" in value and "10 Gbit/s" in value
    assert "docker0 172.17.0.1/16" in value and "(bridge of containers)" in value
    assert "lo 127.0.0.1/8" in value and value.split("down: ")[1].split(";")[0].find("spare") >= 0
