"""Gives the project's readers thousands of damaged files: each must be read or refused in one sentence.

    python tests/fuzz.py [--count 10000] [--seed 0] [--format NAME]... [--jobs N]
    python tests/fuzz.py --replay build/fuzz/FORMAT-SEED-NUMBER.bin

A finding is any other exception, a process that dies, more than 10 seconds of work, or more than a gigabyte of memory.
"""

import argparse
import collections
import faulthandler
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import wait
from pathlib import Path

from fuzz_formats import FORMATS, Format

FOUND = Path("build/fuzz")
HANG_SECONDS, HANG_WALL_SECONDS = 10, 60
"""Of the worker's own processor time, since the machine may be busy; and in all, for one that waits."""
MEMORY_BYTES = 1 << 30
"""What reading one file may take beyond what the worker had when it began."""
PART = 2500
"""Cases that one worker handles before another takes over."""
MOST_FINDINGS = 20
"""Findings of one format after which the rest of it is left."""

SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where the files are written that the readers read."""

_DIED = "the process died"
_INTEGERS = [0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 32_767, 32_768, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 1,
             2**32, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_LETTERS = [b"0", b"1", b"9", b"a", b"e", b" ", b".", b"-", b"_", b",", b'"']
_TEXTS = [b"\0", b"\xff", b'"', b"'", b",", b";", b"\n", b"\r", b"[", b"{", b"}", b"]" b":", b"=", b"NaN", b"-Infinity",
          b"1e999", b"-1", b"9" * 400, b"\xef\xbb\xbf", b"\xed\xa0\x80", b"null", b"true", b"[" * 3000, b'{"a":' * 3000,
          b"<html>", b"\\u0000", b"../", b"/etc/passwd"]


def mutated(source: random.Random, good: list[bytes], *, is_text: bool = False) -> bytes:
    """Return one of the files with one to four random changes."""
    content = bytearray(source.choice(good))
    mutations = _TEXT_MUTATIONS if is_text and source.random() < 0.5 else _MUTATIONS
    for _ in range(source.choice((1, 1, 1, 2, 2, 3, 4))):
        source.choice(mutations)(source, content, good)
    return bytes(content)


def _place(source: random.Random, content: bytes) -> int:
    """Choose a place, more often one near the start or the end, where most formats keep their structure."""
    size = max(1, len(content))
    near = source.randrange(min(size, source.choice((16, 64, 512))))
    return source.choice((near, size - 1 - near, source.randrange(size), source.randrange(size)))


def _flip(source, content, good) -> None:
    for _ in range(source.randint(1, 8)):
        if content:
            content[_place(source, content)] ^= 1 << source.randrange(8)


def _overwrite(source, content, good) -> None:
    place, count = _place(source, content), source.choice((1, 2, 4, 16, 200))
    run = source.choice((bytes(count), b"\xff" * count, source.randbytes(count), source.choice(_LETTERS) * count))
    content[place:place + count] = run


def _cut(source, content, good) -> None:
    place = _place(source, content)
    del content[place:source.choice((len(content), place + 1, place + source.randint(1, 64)))]


def _duplicate(source, content, good) -> None:
    place, target = _place(source, content), _place(source, content)
    piece = content[place:place + source.choice((1, 4, 32, 512))]
    content[target:target] = piece * source.choice((1, 1, 2, 50))


def _integer(source, content, good) -> None:
    place, size = _place(source, content), source.choice((1, 2, 4, 8))
    value = source.choice(_INTEGERS) % 256**size
    content[place:place + size] = value.to_bytes(size, source.choice(("big", "little")))


def _text(source, content, good) -> None:
    place, text = _place(source, content), source.choice(_TEXTS)
    content[place:place + source.choice((0, 0, len(text)))] = text


def _letter(source, content, good) -> None:
    place = _place(source, content)
    content[place:place + source.choice((0, 1, 1, 3))] = source.choice(_LETTERS) * source.choice((1, 1, 1, 20))


def _splice(source, content, good) -> None:
    other = source.choice(good)
    content[_place(source, content):] = other[_place(source, other):]


_MUTATIONS = (_flip, _flip, _overwrite, _cut, _duplicate, _integer, _integer, _text, _splice)
_TEXT_MUTATIONS = (_letter, _letter, _letter, _text, _cut, _duplicate)


def case(name: str, seed: int, number: int, good: list[bytes]) -> bytes:
    """Return the content of one case, a function of its name, seed, number and the good files alone."""
    source, kind = random.Random(f"{name}/{seed}/{number}"), FORMATS[name]
    if kind.repair and source.random() < 0.5:
        return kind.repair(mutated(source, [kind.unpacked(file) for file in good] if kind.unpacked else good))
    return mutated(source, good, is_text=kind.is_text)


def _verdict(kind: Format, folder: Path, content: bytes) -> tuple[str, str]:
    """Read one content and return `accepted`, `refused` or `finding`, and what happened."""
    from hpcai_cli.errors import HpcaiError

    try:
        folder.mkdir(exist_ok=True)
        kind.read(folder, content)
        return "accepted", ""
    except HpcaiError as error:
        cause = error
        while cause is not None:
            if isinstance(cause, MemoryError):
                return "finding", f"out of memory, told as: {error}\n{traceback.format_exc()}"
            cause = cause.__cause__ or cause.__context__
        text = str(error)
        if "\n" in text or not text.isprintable() or len(text) > 2000:
            return "finding", f"its message is not one readable line: {text[:3000]!r}"
        return "refused", text
    except (Exception, SystemExit):
        return "finding", traceback.format_exc()


def _prepare(folder: Path, *, quiet: bool) -> None:
    """Give the readers an empty place to work in, and silence what they and their libraries write."""
    os.environ["HPCAI_CACHE"], os.environ["TF_CPP_MIN_LOG_LEVEL"] = str(folder / "cache"), "3"
    warnings.simplefilter("ignore")
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def _make_good(name: str, folder: Path) -> None:
    """Make the good files of a format, in a process of its own, after a proof that they are good."""
    _prepare(folder, quiet=True)
    try:
        good = FORMATS[name].good()
        verdicts = [_verdict(FORMATS[name], folder / "case", content) for content in good]
        problem = next((text for verdict, text in verdicts if verdict != "accepted"), "")
    except Exception:
        good, problem = [], traceback.format_exc()
    (folder / "good").write_bytes(pickle.dumps((good, problem)))


def _work(name: str, seed: int, numbers: range, good: list[bytes], folder: Path, current, results) -> None:
    """Read cases until one is a finding; send how many were accepted and refused, and the finding."""
    _prepare(folder, quiet=True)
    with open(folder / "crash", "w") as crash:
        faulthandler.enable(crash)
        for content in good:
            _verdict(FORMATS[name], folder / "case", content)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, resource.RLIM_INFINITY))
        counts = collections.Counter()
        for number in numbers:
            current.value = number
            verdict, text = _verdict(FORMATS[name], folder / "case", case(name, seed, number, good))
            counts[verdict] += 1
            if verdict == "finding":
                results.send((counts, text))
                return
        results.send((counts, ""))


class Worker:
    """A process that handles a range of cases, and how it is watched."""

    def __init__(self, name: str, seed: int, numbers: range, good: list[bytes]):
        self.name, self.seed, self.numbers, self.good = name, seed, numbers, good
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=SCRATCH))
        self.current = multiprocessing.Value("q", -1, lock=False)
        self.results, theirs = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.Process(
            target=_work, args=(name, seed, numbers, good, self.folder, self.current, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._started = time.monotonic()
        self._seen, self._since, self._spent = -1, self._started, 0.0

    def hangs(self) -> bool:
        """Tell whether the case at hand takes too long; nothing is said of the time before the first."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        spent = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        if self.current.value != self._seen:
            self._seen, self._since, self._spent = self.current.value, time.monotonic(), spent
        return self._seen >= 0 and (spent - self._spent > HANG_SECONDS
                                    or time.monotonic() - self._since > HANG_WALL_SECONDS)

    def finish(self, counts: collections.Counter, *, hung: bool) -> str:
        """End the process, add what it counted, and return what it found, if anything."""
        if hung:
            self.process.kill()
        try:
            counted, text = self.results.recv()
        except EOFError:
            text = f"no end after {HANG_SECONDS} seconds" if hung else _DIED
            counted = collections.Counter(finding=1, uncounted=max(0, self.current.value - self.numbers.start))
        self.process.join()
        text += f"\n{(self.folder / 'crash').read_text()[:2000]}" if text == _DIED else ""
        shutil.rmtree(self.folder, ignore_errors=True)
        counts.update(counted)
        counts["milliseconds"] += int(1000 * (time.monotonic() - self._started))
        return text


def fuzz(names: list[str], count: int, seed: int, jobs: int) -> int:
    """Run all cases, print what was found, and return the number of findings."""
    good = {name: _good(name) for name in names}
    waiting = collections.deque((name, range(start, min(start + PART, count)))
                                for name in names for start in range(0, count, PART))
    workers, counts = [], {name: collections.Counter() for name in names}
    untold = list(names)
    while untold:
        while waiting and len(workers) < jobs:
            name, numbers = waiting.popleft()
            if counts[name]["finding"] < MOST_FINDINGS:
                workers.append(Worker(name, seed, numbers, good[name]))
        ready = wait([worker.results for worker in workers], timeout=0.5) if workers else []
        for worker in list(workers):
            hung = worker.hangs()
            if worker.results not in ready and not hung:
                continue
            workers.remove(worker)
            text = worker.finish(counts[worker.name], hung=hung)
            if text:
                number = max(worker.current.value, worker.numbers.start)
                _report(worker.name, seed, number, good[worker.name], text)
                if number + 1 < worker.numbers.stop:
                    waiting.appendleft((worker.name, range(number + 1, worker.numbers.stop)))
        under_way = {name for name, _ in waiting} | {worker.name for worker in workers}
        for name in [name for name in untold if name not in under_way]:
            untold.remove(name)
            _summary(name, counts[name])
    return sum(counted["finding"] for counted in counts.values())


def _good(name: str) -> list[bytes]:
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=SCRATCH) as folder:
        process = multiprocessing.Process(target=_make_good, args=(name, Path(folder)))
        process.start()
        process.join()
        made = Path(folder, "good")
        good, problem = pickle.loads(made.read_bytes()) if made.exists() else ([], f"it died ({process.exitcode})")
    if problem:
        sys.exit(f"{name}: a good file is not accepted: {problem}")
    return good


def _report(name: str, seed: int, number: int, good: list[bytes], text: str) -> None:
    FOUND.mkdir(parents=True, exist_ok=True)
    path = FOUND / f"{name}-{seed}-{number}.bin"
    path.write_bytes(case(name, seed, max(0, number), good))
    lines = text.strip().splitlines()
    # Where a process died, faulthandler tells the innermost call first; a traceback tells it last.
    telling = lines[:6] if lines[0] == _DIED else lines[-3:]
    what = " | ".join(line.strip()[:300] for line in telling)
    print(f"{name}, seed {seed}, number {number}: {what}\n    python tests/fuzz.py --replay {path}", flush=True)


def _summary(name: str, counts: collections.Counter) -> None:
    seconds = counts["milliseconds"] / 1000
    cases = counts.total() - counts["milliseconds"]
    print(f"{name}: {cases:,} cases, {counts['accepted']:,} accepted, {counts['refused']:,} refused, "
          f"{counts['finding']:,} findings, {seconds:,.0f} s", flush=True)


def _replay(path: Path) -> int:
    name = path.name.rsplit("-", 2)[0]
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=SCRATCH) as folder:
        _prepare(Path(folder), quiet=False)
        verdict, text = _verdict(FORMATS[name], Path(folder) / "case", path.read_bytes())
    print(f"{verdict} {text}")
    return verdict == "finding"


def main() -> int:
    """Parse the command line; return 1 where there are findings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="cases of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", action="append", choices=[*FORMATS], help="only this one; may be given again")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--replay", type=Path, help="read one saved file again, in this process")
    chosen = parser.parse_args()
    if chosen.replay:
        return _replay(chosen.replay)
    multiprocessing.set_start_method("fork")
    return 1 if fuzz(chosen.format or [*FORMATS], chosen.count, chosen.seed, chosen.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
