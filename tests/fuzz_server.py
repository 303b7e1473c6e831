"""Sends a running server thousands of requests that are wrong somewhere, with questions in between.

    python tests/fuzz_server.py [--count 10000] [--seed 0] [--clients 24] [--schemathesis PATH]
    python tests/fuzz_server.py --replay build/fuzz/server-SEED-NUMBER.bin

A finding is a status that the protocol does not foresee, a refusal that is not one sentence of JSON, a connection that
hangs, a worker that ends, a question without its own right answer, and memory or descriptors that are not given back.
Schemathesis (its command line, installed in an environment of its own) then asks by the server's OpenAPI document.
"""

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuzz import FOUND
from fuzz_requests import case, question

FORESEEN = {100, 200, 400, 404, 405, 408, 411, 413, 415, 431, 503, 504}
HANG_SECONDS = 30
"""Longer than the server waits for a head (10), a body (--timeout) and a client that goes on sending (5) together."""
QUIET_SECONDS = 0.5
"""After which a connection that was answered and is kept has nothing more to say."""
MOST_FINDINGS = 20
MEMORY_BYTES = 200 << 20
"""By which a worker may have grown."""
TOKEN = "a-long-token"
_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n((?:[^\r\n]+\r\n)*)\r\n")


def answers(content: bytes, sent: bytes) -> tuple[list[tuple[int, dict, bytes]], bytes]:
    """Return status, headers and body of each answer in what came, and what is left over."""
    found = []
    while match := _HEAD.match(content):
        lines = (line.partition(b": ") for line in match[2].splitlines())
        headers = {name.decode().lower(): value.decode("latin-1") for name, _, value in lines}
        length, rest = int(headers.get("content-length", 0)), content[match.end():]
        if b"HEAD" in sent and (not rest or rest.startswith(b"HTTP/1.1 ")):
            length = 0
        if len(rest) < length:
            break
        found.append((int(match[1]), headers, rest[:length]))
        content = rest[length:]
    return found, content


def received(port: int, pieces: tuple[bytes, ...], *, leaves: bool = False) -> tuple[bytes, str]:
    """Send pieces and return all that comes, and what is wrong with the connection."""
    sent, content = b"".join(pieces), b""
    with socket.create_connection(("127.0.0.1", port), timeout=HANG_SECONDS) as client:
        # The server may have refused and closed by then; what it said can still be read.
        with contextlib.suppress(ConnectionError):
            for place, piece in enumerate(pieces):
                time.sleep(0.02 if place else 0)
                client.sendall(piece)
        if leaves:
            return b"", ""
        client.settimeout(QUIET_SECONDS)
        until = time.monotonic() + HANG_SECONDS
        while time.monotonic() < until:
            try:
                if not (piece := client.recv(1 << 16)):
                    return content, "" if content else "closed without an answer"
                content += piece
            except TimeoutError:
                found, rest = answers(content, sent)
                if found and found[-1][0] != 100 and not rest:
                    return content, ""
            except ConnectionError:
                return content, "" if content else "reset without an answer"
    return content, "no end"


def judged(content: bytes, sent: bytes, counts: collections.Counter) -> str:
    """Count the statuses of all answers and return what is wrong with one."""
    found, rest = answers(content, sent)
    if rest:
        return f"it ends in {rest[:200]!r}"
    for status, headers, body in found:
        counts[status] += 1
        if status not in FORESEEN:
            return f"{status}: {body[:300]!r}"
        if status >= 400 and body:
            said = json.loads(body)
            text = said.get("error", "") if list(said) == ["error"] else ""
            if not text or not text.isprintable() or len(text) > 2000 or headers["content-type"] != "application/json":
                return f"a refusal that is none: {status} {headers} {body[:300]!r}"
    return ""


def asked(port: int, source, kit) -> str:
    """Ask one to three questions on one connection and return what is wrong with an answer."""
    questions = [question(source, kit) for _ in range(source.choice((1, 1, 1, 3)))]
    sent = b"".join(one.content for one in questions)
    content, problem = received(port, (sent,))
    found, rest = answers(content, sent)
    if problem or rest or len(found) != len(questions):
        return f"{len(questions)} questions, {len(found)} answers: {problem} {content[:300]!r}"
    for one, (status, headers, body) in zip(questions, found, strict=True):
        wrong = one.judge(headers, body) if status == 200 else f"{status}: {body[:300]!r}"
        if wrong:
            return f"a question: {wrong}"
    return ""


class Fuzzing:
    """A run against one server."""

    def __init__(self, served, kit, seed: int):
        self._served, self._kit, self._seed = served, kit, seed
        self.counts, self.findings = collections.Counter(), 0

    def one(self, number: int) -> None:
        if self.findings >= MOST_FINDINGS:
            return
        made = case(self._seed, number, self._kit)
        sent = b"".join(made.pieces)
        self.counts["sent"] += 1
        try:
            content, problem = received(self._served.port, made.pieces, leaves=made.leaves)
            self.report(problem or judged(content, sent, self.counts), number, sent)
            if number % 3 == 0:
                self.counts["questions"] += 1
                source = random.Random(f"question/{self._seed}/{number}")
                self.report(asked(self._served.port, source, self._kit), number, sent)
        except Exception as error:
            self.report(f"{type(error).__name__}: {error}", number, sent)

    def report(self, problem: str, number: int, sent: bytes) -> None:
        if problem:
            self.findings += 1
            FOUND.mkdir(parents=True, exist_ok=True)
            path = FOUND / f"server-{self._seed}-{number}.bin"
            path.write_bytes(sent)
            print(f"number {number}: {problem}\n    python tests/fuzz_server.py --replay {path}", flush=True)


def resources(served) -> dict[int, tuple[int, int]]:
    """Return of each worker its memory in bytes and its open descriptors."""
    return {pid: (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
                  len(os.listdir(f"/proc/{pid}/fd"))) for pid in served.workers()}


def fuzz(served, kit, chosen: argparse.Namespace) -> int:
    """Send all cases, print what was found and return the number of findings."""
    run, started = Fuzzing(served, kit, chosen.seed), time.monotonic()
    with ThreadPoolExecutor(chosen.clients) as pool:
        list(pool.map(run.one, range(min(200, chosen.count))))
        time.sleep(1)
        before = resources(served)
        list(pool.map(run.one, range(200, chosen.count)))
    time.sleep(12)
    for pid, (memory, files) in resources(served).items():
        grown, more = memory - before.get(pid, (0, 0))[0], files - before.get(pid, (0, 0))[1]
        print(f"process {pid}: {grown / 1e6:+.1f} MB, {more:+d} descriptors")
        if pid not in before or grown > MEMORY_BYTES or more > 8:
            run.report(f"process {pid} was not there before, or has kept what it took", -1, b"")
    events = [line for line in served.said().splitlines()
              if any(word in line for word in ("ended:", '"event"', "Traceback"))]
    if events:
        run.report("the server says: " + " | ".join(events[:5])[:2000], -2, b"")
    statuses = ", ".join(f"{count:,} {status}" for status, count in sorted(run.counts.items(), key=str))
    print(f"{statuses}; {run.findings:,} findings, {time.monotonic() - started:,.0f} s", flush=True)
    return run.findings


def schemathesis(served, folder: Path, chosen: argparse.Namespace) -> int:
    """Run schemathesis over the server's OpenAPI document and return its exit code."""
    # 413 is how the server refuses what is well-formed and too much. The document cannot say that data are as long as
    # their shape, or that bytes are an image, so that valid data by the document may be refused.
    (folder / "schemathesis.toml").write_text(
        "[checks]\nnegative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 408, 411, 413, 415]\n")
    words = ["--config-file", "schemathesis.toml", "run", f"http://127.0.0.1:{served.port}/openapi.json",
             "-H", f"Authorization: Bearer {TOKEN}", "--checks", "all", "--exclude-checks", "positive_data_acceptance",
             "--max-examples", "50", "--seed", str(chosen.seed), "--continue-on-failure", "--warnings", "off"]
    return subprocess.run([os.path.abspath(chosen.schemathesis), *words], cwd=folder, check=False).returncode


def main() -> int:
    """Parse the command line; return 1 where there are findings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--schemathesis", metavar="PATH", help="its program; it is left out without one")
    parser.add_argument("--replay", type=Path, help="send one saved file again and show what comes")
    chosen = parser.parse_args()
    replayed = chosen.replay.read_bytes() if chosen.replay else b""
    spec = importlib.util.spec_from_file_location("kit", Path(__file__).parent / "engine" / "serving" / "conftest.py")
    kit = sys.modules["kit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kit)
    exports = kit.Exports({"tiny": kit.tiny(1), "shop": kit.table()})
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        exports.write(models / "tiny")
        exports.write(models / "shop", "shop")
        exports.write(models / "plain", "shop", encoding=None)
        words = (models, "--workers", 2, "--timeout", 2, "--body-limit", 1 << 20)
        with kit.server(Path(folder), *words) as served:
            if chosen.replay:
                print(*received(served.port, (replayed,)), served.said(), sep="\n")
                return 0
            findings = fuzz(served, kit, chosen)
        if not chosen.schemathesis:
            print("schemathesis is left out: name its program with --schemathesis PATH")
            return 1 if findings else 0
        token = Path(folder) / "token"
        token.write_text(TOKEN)
        with kit.server(Path(folder), *words, "--token-file", token) as served:
            return schemathesis(served, Path(folder), chosen) or (1 if findings else 0)


if __name__ == "__main__":
    sys.exit(main())
