"""A soak of the server: a steady load with reloads, then too much of it, a worker that is killed, and the end.

    python tests/soak.py [--minutes 20]

The server has one half of the cores, the client that sends at constant rates the other. Every answer is compared with
the one that is known for its question and for the version that answers.
"""

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from soak_questions import Questions, Repository, Tally, write_models
from soak_server import START_SECONDS, WORKERS, Sample, Server

from hpcai_cli.engine.benchmarks.load import open_loop
from hpcai_cli.run import write_json

FOLDER = Path("build/soak")
"""Kept where something failed."""
LOAD, LIGHT_LOAD, OVERLOAD = 0.7, 0.4, 3.0
"""Of what the server bears: the steady load; one that a single worker bears; too much."""
CROWD = 600
"""Connections of the overload: none that is due waits for one, so that the server sees all of it."""
DRIFT = 0.02
LONGEST = 2.0
"""Seconds within which 99 % of what is taken under overload are answered; half a second of work may wait there."""
REPLACED = 2.0
"""Seconds from the end of a worker until another one answers in its place."""
STOPPED = 10.0
"""Seconds in which a server ends that has nothing long to finish."""
WARM, WINDOW = 0.2, 0.2
"""Shares of the steady load: what is left out, and what is compared, right after it and at the end."""


SHARE = 0.2
"""Of the connections that each worker has some seconds after one was replaced."""
TAKEN = 0.5
"""Share of what it bears that is answered under overload: to refuse costs little."""
MEASURED, SAMPLED = 5, 0.5
"""Rounds in which it is found what the server bears; seconds between two looks at its processes."""


@dataclass(frozen=True)
class Finding:
    """One condition and whether it holds."""

    what: str
    found: str
    expected: str
    holds: bool


class Soak:
    """A server under load, phase by phase; each phase returns what it found.

    Attributes:
        most: answers per second that the server bears, once they are measured.
    """

    def __init__(self, server: Server, repository: Repository, questions: Questions):
        self._server, self._repository, self._questions = server, repository, questions
        self._pool = ThreadPoolExecutor(1)
        self.most = 0.0

    def measure(self) -> None:
        """Find what the server bears: its answers per second to clients that have always one more to ask."""
        rates = []
        for _ in range(MEASURED):
            load, tally = self._load(1e5, 0.03, connections=32)
            rates.append(load.result().answered)
            if problems := [*tally.problems, *set(tally.statuses) - {200}]:
                sys.exit(f"the server fails before the soak begins: {problems}")
        self.most = statistics.median(rates)

    # ---- Steady load -----------------------------------------------------------------------------------------------

    def steady(self, minutes: float) -> list[Finding]:
        """Load it for minutes and reload now and then."""
        pause = min(60.0, max(10.0, 3 * minutes))
        load, tally = self._load(LOAD * self.most, 60 * minutes)
        samples, longest, asked, done = [], 0.0, 0.0, self._server.reloads()
        reloads, following = 0, time.perf_counter() + pause
        while not load.done() or asked:
            samples.append(self._server.sample())
            if asked and self._server.reloads() > done:
                self._repository.is_loaded()
                longest, asked, done = max(longest, time.perf_counter() - asked), 0.0, done + 1
            elif not asked and time.perf_counter() > following and not load.done():
                following += pause
                reloads += 1
                asked = time.perf_counter()
                self._repository.change()
                self._server.reload()
            elif asked and time.perf_counter() - asked > START_SECONDS:
                break
            time.sleep(SAMPLED)
        outcome = load.result()
        write_json(FOLDER / "samples.json", [asdict(sample) for sample in samples])
        return [_all_right(f"answers, {outcome.offered:.0f} per second for {minutes:g} minutes", tally),
                _equal("requests that were lost", len(tally.unanswered) + tally.untaken, 0),
                Finding("reloads", f"{done}, the longest {longest:.1f} s", f"{reloads}", done == reloads),
                *_resources(samples)]

    # ---- Too much --------------------------------------------------------------------------------------------------

    def overload(self, seconds: float = 10.0) -> list[Finding]:
        """Load it with a multiple of what it bears."""
        load, tally = self._load(OVERLOAD * self.most, seconds, connections=CROWD)
        outcome = load.result()
        offered = (len(tally.sent) - 1) / (max(tally.sent) - min(tally.sent)) / self.most
        taken, p99 = outcome.statuses.get(200, 0), float(np.percentile(tally.seconds or [np.inf], 99))
        return [Finding("overload, times what it bears", f"{offered:.2f}", f"about {OVERLOAD:g}",
                        offered > 0.9 * OVERLOAD),
                Finding("refused with 503 and Retry-After", f"{tally.statuses[503]:,}", "some",
                        tally.statuses[503] > 0),
                Finding("other than 200 and 503", _told(tally), "none",
                        set(tally.statuses) <= {200, 503} and not tally.problems),
                Finding("taken, of what it bears", f"{taken / seconds / self.most:.0%}", f"at least {TAKEN:.0%}",
                        taken / seconds / self.most >= TAKEN),
                Finding("p99 of what was taken", f"{p99:.2f} s", f"at most {LONGEST:g} s", p99 <= LONGEST)]

    # ---- A killed worker -------------------------------------------------------------------------------------------

    def killed(self, seconds: float = 8.0) -> list[Finding]:
        """Kill the worker that holds more connections."""
        load, tally = self._load(LIGHT_LOAD * self.most, seconds)
        time.sleep(seconds / 4)
        before = self._server.workers()
        victim = max(before, key=lambda pid: len(self._server.ports_of(pid)))
        # Stopped first, so that what it holds stays as it is while it is noted.
        os.kill(victim, signal.SIGSTOP)
        held = self._server.ports_of(victim)
        os.kill(victim, signal.SIGKILL)
        since = time.perf_counter()
        replaced = self._answer_of_another(before, since + 5 * REPLACED) - since
        time.sleep(max(0.0, since + seconds / 2 - time.perf_counter()))
        shares = [len(self._server.ports_of(pid)) for pid in self._server.workers()]
        load.result()
        others = [answer for answer in tally.unanswered if answer.port not in held]
        return [Finding("killed: requests that failed", f"{len(tally.unanswered)}",
                        f"at most those on its {len(held)} connections", not others and tally.untaken == 0),
                _all_right("answers meanwhile", tally, besides=0),
                Finding("replaced within", f"{replaced:.2f} s", f"{REPLACED:g} s", replaced <= REPLACED),
                Finding("connections of each worker after it", " and ".join(map(str, shares)),
                        f"at least {SHARE:.0%} of them", min(shares) >= SHARE * sum(shares) > 0)]

    def _answer_of_another(self, before: Sequence[int], until: float) -> float:
        """Return when a worker has answered that was not there before, infinity where none does."""
        while time.perf_counter() < until:
            client = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=5)
            with contextlib.closing(client), contextlib.suppress(OSError, http.client.HTTPException):
                client.request("GET", "/v2/health/ready")
                client.getresponse().read()
                answered, port = time.perf_counter(), client.sock.getsockname()[1]
                if any(port in self._server.ports_of(pid) for pid in set(self._server.workers()) - set(before)):
                    return answered
            time.sleep(0.01)
        return float("inf")

    # ---- The end ---------------------------------------------------------------------------------------------------

    def ended(self, seconds: float = 4.0) -> list[Finding]:
        """End it while it is loaded; its log tells what it has taken."""
        time.sleep(1)
        start = self._server.log_size()
        load, tally = self._load(LOAD * self.most, seconds)
        time.sleep(seconds / 4)
        since = time.perf_counter()
        self._server.process.send_signal(signal.SIGTERM)
        try:
            code = self._server.process.wait(30)
        except subprocess.TimeoutExpired:
            code = None
        took = time.perf_counter() - since
        load.result()
        logged = Counter(json.loads(line)["status"] for line in self._server.logged(start))
        return [Finding("SIGTERM: exit code", f"{code} after {took:.1f} s", f"0 within {STOPPED:g} s",
                        code == 0 and took <= STOPPED),
                Finding("taken by its log, answered", f"{dict(logged)}, {tally.statuses[200]}", "as many, with 200",
                        logged == {200: tally.statuses[200]} and not tally.problems),
                _equal("taken and lost", len(tally.unanswered), 0)]

    def _load(self, rate: float, seconds: float, *, connections: int = 32) -> tuple[Future, Tally]:
        tally = Tally(self._questions, self._repository)
        return self._pool.submit(open_loop.drive, self._server.port, self._questions.requests, rate=rate,
                                 seconds=seconds, connections=connections, heard=tally), tally


def _resources(samples: Sequence[Sample]) -> list[Finding]:
    """Compare medians over windows right after the warm-up and at the end, since each reload opens a model beside."""
    begin, end = samples[0].moment, samples[-1].moment

    def window(start: float) -> list[Sample]:
        low = begin + start * (end - begin)
        return [sample for sample in samples if low <= sample.moment <= low + WINDOW * (end - begin)]

    first, last = window(WARM), window(1 - WINDOW)

    def medians(name: str) -> tuple[float, float]:
        return tuple(statistics.median(getattr(sample, name) for sample in part) for part in (first, last))

    before, after = medians("megabytes")
    drift = after / before - 1
    findings = [Finding("memory, drift of its median", f"{before:.1f} to {after:.1f} MB, {drift:+.1%}",
                        f"at most {DRIFT:.0%}", drift <= DRIFT)]
    for name in ("descriptors", "threads", "processes"):
        before, after = medians(name)
        findings.append(Finding(name, f"{before:g} to {after:g}", "no more", after <= before))
    return findings


def _all_right(what: str, tally: Tally, besides: int = 200) -> Finding:
    return Finding(what, _told(tally), "all 200 and right", set(tally.statuses) <= {200, besides}
                   and not tally.problems)


def _equal(what: str, found: int, expected: int) -> Finding:
    return Finding(what, f"{found:,}", f"{expected:,}", found == expected)


def _told(tally: Tally) -> str:
    counts = ", ".join(f"{count:,} with {status}" for status, count in sorted(tally.statuses.items()))
    return "; ".join([counts, *tally.problems])


def _print(findings: Sequence[Finding]) -> None:
    for finding in findings:
        verdict = "" if finding.holds else "  FAILED"
        print(f"{finding.what:<46}  {finding.found:<38}  {finding.expected}{verdict}", flush=True)


def soak(minutes: float) -> list[Finding]:
    """Go through all phases, print what each finds, and return it."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    os.sched_setaffinity(0, set(cores[half:] or cores))
    write_models(FOLDER / "models")
    questions, repository = Questions(FOLDER / "models"), Repository(FOLDER / "mnist", FOLDER / "models")
    findings = []
    with Server(FOLDER, repository.folder, set(cores[:half])) as server:
        one = Soak(server, repository, questions)
        one.measure()
        print(f"{WORKERS} workers on {half} cores bear {one.most:,.0f} requests per second", flush=True)
        for phase in (lambda: one.steady(minutes), one.overload, one.killed, one.ended):
            found = phase()
            _print(found)
            findings += found
    return findings


def main() -> int:
    """Parse the command line; return 1 where a condition fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of the steady load (%(default)g)")
    findings = soak(parser.parse_args().minutes)
    failed = [finding.what for finding in findings if not finding.holds]
    if failed:
        print(f"failed: {'; '.join(failed)}; see {FOLDER}", file=sys.stderr)
        return 1
    shutil.rmtree(FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
