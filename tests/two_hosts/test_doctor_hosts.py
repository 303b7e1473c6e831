"""hpcai doctor over two hosts: they reduce and train together, and each wrong set-up is a finding that says what mends
it."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcai_cli import __version__

pytestmark = pytest.mark.cluster
NETWORK = "10.213.7"
SECONDS = 540
"""For the whole examination on a machine that is busy; the trials of one host alone are the greater part."""


@pytest.fixture
def doctor(two_hosts):
    """Return a function that runs the doctor on host a: its exit code, its findings by name and its document."""
    def run(*words: str) -> tuple[int, dict[str, dict], dict]:
        done = two_hosts.hpcai("a", "doctor", "--json", *words, timeout=SECONDS)
        assert done.stdout, done.stderr
        document = json.loads(done.stdout)
        return done.returncode, {finding["name"]: finding for finding in document["findings"]}, document
    return run


def processes(host: str, two_hosts) -> list[str]:
    """Return what runs on a host, but its ssh server."""
    pids = two_hosts.run("a", "ip", "netns", "pids", two_hosts._namespace(host)).stdout.split()
    found = []
    for pid in pids:
        try:
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        except OSError:
            continue
    return [words for words in found if "sshd" not in words]


def assert_nothing_runs(two_hosts) -> None:
    deadline = time.monotonic() + 30
    while left := [words for host in "ab" for words in processes(host, two_hosts) if "hpcai" in words]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.fixture
def parts(two_hosts):
    """Return a function that runs on host a what of the examination a test is about, and gives its findings by name."""
    def run(call: str, hosts: str, *, launcher: str = "auto", interface: str = "") -> dict[str, dict]:
        done = two_hosts.run("a", sys.executable, "-c", PARTS.format(
            call=call, hosts=hosts, launcher=launcher, interface=interface), timeout=2 * SECONDS)
        return {finding["name"]: finding for finding in json.loads(done.stdout)}
    return run


PARTS = """
import dataclasses, json
from hpcai_cli import hosts, launchers
from hpcai_cli.engine.environment import other_hosts, rank_checks
from hpcai_cli.signals import sigterm_interrupts
ranks = launchers.chosen(None, named=hosts.parse({hosts!r}), launcher={launcher!r}, interface={interface!r})
with sigterm_interrupts():
    print(json.dumps([dataclasses.asdict(each) for each in {call}(ranks)]))
"""


@pytest.mark.timeout(SECONDS + 60)
def test_two_hosts_are_examined_and_reduce_and_train_together(doctor):
    code, found, document = doctor("--hosts", "a:1,b:1", "--interface", "wire")
    assert code == 0, [finding for finding in found.values() if finding["status"] != "ok"]
    assert found["allreduce, hosts"]["status"] == found["training step, hosts"]["status"] == "ok"
    assert "2 ranks over" in found["allreduce, hosts"]["value"]
    metrics = document["metrics"]
    assert 0 < metrics["allreduce_latency_seconds_hosts"] < 10 and metrics["allreduce_bytes_per_second_hosts"] > 1e5
    assert abs(metrics["clock_offset_seconds_b"]) <= 5
    assert found["host b"]["status"] == "ok" and "versions as here" in found["host b"]["value"]
    assert "wire" in found["way to the hosts"]["value"] and "10.213.7.1/24" in found["interfaces"]["value"]


@pytest.mark.parametrize(("launcher", "transport"), [("mpirun", "MPI"), ("horovodrun", "Gloo")])
@pytest.mark.parametrize("places", ["a:1,b:1", "b:2"])
def test_ranks_of_each_launcher_try_it(parts, launcher, transport, places):
    found = parts("rank_checks.across", places, launcher=launcher)
    assert found["allreduce, hosts"]["status"] == found["training step, hosts"]["status"] == "ok", found
    assert f"2 ranks over {transport}" in found["allreduce, hosts"]["value"]


@pytest.mark.parametrize(("places", "interface", "host", "expected", "mend"), [
    ("a:1,gone:1,nobody:1", "", "gone", "cannot be reached", "check that it is up"),
    ("a:1,gone:1,nobody:1", "", "nobody", "has no address", "check its name"),
    ("a:1,b:1", "dead", "b", "is not reached over dead", "name an interface")])
def test_what_leads_nowhere_is_a_finding_of_its_host(parts, places, interface, host, expected, mend):
    found = parts("other_hosts.findings", places, interface=interface)
    finding = found[f"host {host}"]
    assert finding["status"] == "missing" and finding["required"]
    assert expected in finding["value"] and mend in finding["mend"]
    assert "this host" in found["host a"]["value"]


@pytest.mark.timeout(SECONDS + 60)
def test_a_wrong_key_ends_with_exit_code_4_and_without_a_trial(doctor, two_hosts):
    two_hosts.user_key("other_key")
    try:
        code, found, _ = doctor("--hosts", "a:1,b:1")
    finally:
        two_hosts.user_key("user_key")
    assert code == 4
    assert found["host b"]["mend"] == "run `ssh-copy-id b`"
    assert "not tried" in found["allreduce, hosts"]["value"]


@pytest.fixture
def ssh_alone(two_hosts):
    """Let ssh reach the hosts, and their names lead to addresses where nothing answers."""
    names = [Path("/etc/netns", two_hosts._namespace(name), "hosts") for name in "ab"]
    before = names[0].read_text()
    for path in names:
        path.write_text(before.replace(f"{NETWORK}.1 a", "10.213.8.1 a").replace(f"{NETWORK}.2 b", "10.213.8.2 b"))
    with (two_hosts.folder / "ssh_config").open("a") as config:
        config.write(f"Host a\n HostName {NETWORK}.1\nHost b\n HostName {NETWORK}.2\n")
    yield
    for path in names:
        path.write_text(before)
    two_hosts.user_key("user_key")


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize(("launcher", "words"), [
    ("mpirun", "unable to complete a TCP connection"), ("horovodrun", "HTTP request failed")])
def test_hosts_that_ssh_alone_reaches(ssh_alone, parts, two_hosts, launcher, words):
    """They give a sentence, and leave nothing running."""
    finding = parts("rank_checks.across", "a:1,b:1", launcher=launcher)["allreduce, hosts"]
    assert finding["status"] == "missing" and words in finding["value"], finding
    assert "all ports" in finding["mend"] and "--interface" in finding["mend"]
    assert_nothing_runs(two_hosts)


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_running_on_either_host(two_hosts, launcher, number):
    """The ranks' trial alone, so that the signal comes when ranks of both hosts run."""
    code = PARTS.format(call="rank_checks.across", hosts="a:1,b:1", launcher=launcher, interface="")
    process = subprocess.Popen(two_hosts.command("a", sys.executable, "-c", code), cwd=two_hosts.folder, text=True,
                               env=two_hosts.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any("doctor --json" in words for words in processes("b", two_hosts)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)
        time.sleep(0.1)
    process.send_signal(number)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert_nothing_runs(two_hosts)


def test_another_release_and_another_clock_are_told(two_hosts):
    """What host b says is changed on its way."""
    code = ("import dataclasses, json; from hpcai_cli import host_check; "
            "from hpcai_cli.hosts import Host; from hpcai_cli.engine.environment import host_facts, other_hosts; "
            "said = host_facts.facts(); here = host_facts.facts(); said['versions']['Keras'] = '3.12.0'; "
            "said['time'] += 60; answer = host_check.ask(['b'], 'true')['b']; "
            "answer = dataclasses.replace(answer, lines=(json.dumps(said),)); "
            "print(json.dumps(dataclasses.asdict(other_hosts._answered(Host('b', 99), answer, here))))")
    done = two_hosts.run("a", sys.executable, "-c", code)
    finding = json.loads(done.stdout)
    assert finding["status"] == "warning"
    assert re.search(r"(59|60|61) s ahead", finding["value"])
    for words in ("Keras 3.12.0, here 3.15", "fewer cores than ranks"):
        assert words in finding["value"], finding
    assert "-m pip install keras==3.15" in finding["mend"] and "chronyc" in finding["mend"]
    assert f"hpcai {__version__}" not in finding["value"]
