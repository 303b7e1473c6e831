"""Two hosts on one machine: network namespaces that a cable joins, each with a name and an ssh server of its own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

HPCAI = str(Path(sys.executable).parent / "hpcai")
NETWORK = "10.213.7"
SSHD = "/usr/sbin/sshd"


class Hosts:
    """Hosts `a` and `b`, which see the same folders and each other through one network interface each, `wire`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._prefix = f"hpcai{os.getpid()}"
        self._servers: list[subprocess.Popen] = []

    def __enter__(self) -> "Hosts":
        try:
            self._join()
            self._keys()
            for name in "ab":
                self._servers.append(subprocess.Popen(
                    self.command(name, SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")),
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            for name in "ab":
                self._wait(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        for server in self._servers:
            server.terminate()
            server.wait(timeout=10)
        for name in "ab":
            left = subprocess.run(["ip", "netns", "pids", self._namespace(name)], capture_output=True, text=True)
            for process in left.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", self._namespace(name)], capture_output=True)
            shutil.rmtree(Path("/etc/netns", self._namespace(name)), ignore_errors=True)

    def command(self, host: str, *words: str) -> list[str]:
        """Return the command line that runs another one on a host."""
        return ["ip", "netns", "exec", self._namespace(host), "unshare", "--uts", "sh", "-c",
                'hostname "$0" && exec "$@"', host, *words]

    def environment(self) -> dict[str, str]:
        """Return the variables of a user whose ssh knows the keys of both hosts."""
        return {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "HPCAI_CACHE": str(self.folder / "cache")}

    def run(self, host: str, *words: object, timeout: float = 180) -> subprocess.CompletedProcess:
        """Run a command on a host to its end."""
        return subprocess.run(self.command(host, *map(str, words)), capture_output=True, text=True, timeout=timeout,
                              cwd=self.folder, env=self.environment())

    def hpcai(self, host: str, *words: object, timeout: float = 180) -> subprocess.CompletedProcess:
        """Run hpcai on a host to its end."""
        return self.run(host, HPCAI, *words, timeout=timeout)

    @contextmanager
    def started(self, host: str, *words: object) -> Iterator[subprocess.Popen]:
        """Run hpcai on a host while the block lasts."""
        process = subprocess.Popen(self.command(host, HPCAI, *map(str, words)), cwd=self.folder, text=True,
                                   env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=60)

    def rank_of(self, host: str) -> int:
        """Return the process id of a rank that works on a host.

        Raises:
            StopIteration: there is none.
        """
        listed = subprocess.run(["ip", "netns", "pids", self._namespace(host)], capture_output=True, text=True).stdout
        for process in map(int, listed.split()):
            with suppress(OSError):
                variables = Path(f"/proc/{process}/environ").read_bytes()
                words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                if HPCAI.encode() in words[:2] and any(each in variables for each in (
                        b"HOROVOD_RANK=", b"OMPI_COMM_WORLD_RANK=")):
                    return process
        raise StopIteration

    def _namespace(self, host: str) -> str:
        return f"{self._prefix}{host}"

    def _join(self) -> None:
        for name in "ab":
            _do("ip", "netns", "add", self._namespace(name))
            names = Path("/etc/netns", self._namespace(name))
            names.mkdir(parents=True)
            (names / "hosts").write_text(f"127.0.0.1 localhost\n{NETWORK}.1 a\n{NETWORK}.2 b\n{NETWORK}.99 gone\n")
        _do("ip", "-n", self._namespace("a"), "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns",
            self._namespace("b"))
        for number, name in enumerate("ab", 1):
            _do("ip", "-n", self._namespace(name), "addr", "add", f"{NETWORK}.{number}/24", "dev", "wire")
            for interface in ("lo", "wire"):
                _do("ip", "-n", self._namespace(name), "link", "set", interface, "up")
            # An interface that leads nowhere.
            _do("ip", "-n", self._namespace(name), "link", "add", "dead", "type", "veth", "peer", "name", "end")
            _do("ip", "-n", self._namespace(name), "addr", "add", f"10.213.8.{number}/24", "dev", "dead")
            _do("ip", "-n", self._namespace(name), "link", "set", "dead", "up")

    def _keys(self) -> None:
        folder = self.folder
        for name in ("host_key", "user_key", "other_key"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
        (folder / "known_hosts").write_text(f"a,b,{NETWORK}.1,{NETWORK}.2 {host_key}\n")
        (folder / "nobody_known").touch()
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        (folder / "sshd_config").write_text(
            f"Port 22\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "StrictModes no\nUsePAM no\n")
        self.user_key("user_key")
        (folder / "bin").mkdir()
        ssh = folder / "bin" / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)

    def user_key(self, name: str, known_hosts: str = "known_hosts") -> None:
        """Let the user's ssh log in with this key, and believe these hosts."""
        (self.folder / "ssh_config").write_text(
            f"IdentityFile {self.folder}/{name}\nIdentitiesOnly yes\nUserKnownHostsFile {self.folder}/{known_hosts}\n"
            "GlobalKnownHostsFile none\nStrictHostKeyChecking yes\nLogLevel ERROR\n")

    def _wait(self, host: str) -> None:
        deadline = time.monotonic() + 20
        while self.run(host, "ssh", host, "true").returncode != 0:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the ssh server of {host} does not answer")
            time.sleep(0.1)


def _do(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory, tiny_recipe) -> Iterator[Hosts]:
    """Two hosts that see a folder with a recipe and its data file."""
    missing = [name for name in ("ip", "unshare", "ssh", "ssh-keygen", SSHD) if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.fail(f"two hosts on one machine take root, and {', '.join(missing) or 'nothing else'}")
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "tiny.py").write_text(tiny_recipe)
    with Hosts(folder) as hosts:
        written = hosts.hpcai("a", "preprocess", "./tiny.py", "--source", "sample", "--output", "tiny.h5")
        assert written.returncode == 0, written.stderr
        yield hosts
