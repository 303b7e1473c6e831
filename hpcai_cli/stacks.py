"""The stacks of all threads of a rank, written into a file of the run's folder by faulthandler when a job hangs."""

import contextlib
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_HEADER = "--- "
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (\S+)', re.MULTILINE)
_LIBRARIES = re.compile(r"^<|/(?:site|dist)-packages/|/lib/python\d|/bin/[^/]*$")
_GENERATED = "__autograph_generated_file"
_WAIT_SECONDS = 5.0


def opened(folder: Path, rank: int):
    """Return the rank's file, to be appended to: what an earlier attempt has left stays."""
    folder.mkdir(exist_ok=True)
    return _file(folder, rank).open("a")


def clear(folder: Path) -> None:
    """Remove the files in which nothing stands, and the folder when it is empty."""
    # Another rank may do the same.
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if not path.stat().st_size:
                path.unlink(missing_ok=True)
        folder.rmdir()


def collect(folder: Path, ranks: Iterable[int], cause: str, ask: Callable[[], None]) -> None:
    """Let the ranks write their stacks, and wait until they have, or for five seconds.

    Args:
        cause: a line above them.
        ask: sends them the signal.
    """
    sizes = {}
    for path in (_file(folder, rank) for rank in ranks):
        # A rank that has no file yet would end by the signal without a word.
        with contextlib.suppress(OSError):
            if path.exists():
                with path.open("a") as stream:
                    stream.write(f"{_HEADER}{time.strftime('%Y-%m-%d %H:%M:%S')} {cause}\n")
                sizes[path] = path.stat().st_size
    ask()
    end = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < end and not all(_is_written(path, size) for path, size in sizes.items()):
        time.sleep(0.05)


def recipe_lines(folder: Path, ranks: Iterable[int]) -> dict[int, str]:
    """Return where each rank is in code that is neither ours nor a library's, by what it wrote last.

    Only ranks that are in such code have an entry; the others wait for them, as a rule.
    """
    found = {}
    for rank in ranks:
        with contextlib.suppress(OSError):
            newest = _file(folder, rank).read_text(errors="replace").rpartition(f"\n{_HEADER}")[2]
            places = [place for thread in newest.split("\nThread ") if (place := _place(thread))]
            if places:
                found[rank] = places[0]
    return found


def _place(thread: str) -> str:
    """Return the innermost place of a thread that is neither ours nor a library's, empty where there is none."""
    frames = [frame for frame in _FRAME.findall(thread) if not _is_library(frame[0])]
    for path, line, name in frames:
        if _GENERATED not in path:
            return f"{name} of {Path(path).name}, line {line}"
    # AutoGraph has written the function anew, and calls functions of its own within.
    return frames[-1][2].removeprefix("tf__") if frames else ""


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.txt"


def _is_written(path: Path, before: int) -> bool:
    with contextlib.suppress(OSError):
        # The last thread's innermost call is told last, and its outermost ends the file.
        return path.stat().st_size > before and time.time() - path.stat().st_mtime > 0.1
    return True


def _is_library(path: str) -> bool:
    here = Path(__file__).parent
    return bool(_LIBRARIES.search(path)) or any(Path(path).is_relative_to(own) for own in (
        here, here.parent / "commands"))
