"""A dataset file while its rows come in: allocated at once, written by many processes, gone on with after a kill.

Beside the output NAME stand `.NAME.part`, the HDF5 file with a place for each candidate row, and `.NAME.journal`, whose
lines say which rows are done and what their content was. Everything that is done to the rows at the end can be done
again, and all that HDF5 itself wrote is written anew at each start, so that no moment is a bad one for a kill.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np

from hpcai_cli.engine import store_writer
from hpcai_cli.engine.raw.decoding_process import DIGEST_BYTES, Row, digest_of
from hpcai_cli.errors import UsageError


class PartialFile:
    """The file in the making.

    Attributes:
        path: where the rows are written to.
        done: which candidates are done, bool (n,).
        digests: of the pixels of those that were not rejected, uint8 (n, 16).
        reasons: why a candidate was rejected, by its number.
        warnings: lines that the decoders had to say so far.
    """

    def __init__(self, output: Path, counts: Mapping[str, int], shape: tuple[int, int, int], key: str):
        """Take the file for this process alone.

        Args:
            counts: candidates by split, in the order of the file.
            key: says what the rows are made from; what was left behind under another key is made anew.

        Raises:
            UsageError: another process is writing the same output.
            OSError: the folder cannot be written.
        """
        self.output = output
        self.path, self._journal_path = (output.with_name(f".{output.name}.{kind}") for kind in ("part", "journal"))
        self.counts, self.shape = dict(counts), shape
        self.row_bytes = int(np.prod(shape))
        total = sum(counts.values())
        self.done, self.digests = np.zeros(total, bool), np.zeros((total, DIGEST_BYTES), np.uint8)
        self._sums = np.zeros((total, 2 * shape[2]), np.int64)
        self.reasons: dict[int, str] = {}
        self.warnings = 0
        self._first = {name: sum(list(counts.values())[:place]) for place, name in enumerate(counts)}
        self._journal = None
        store_writer.check_space(output, 0)
        self._file = _locked(self.path)
        try:
            lines = self._left_behind(key)
            if lines is None:
                store_writer.check_space(output, self.row_bytes * total)
            self._allocate(anew=lines is None)
            self._start_journal(key, lines or [])
        except BaseException:
            self.close()
            raise

    def place(self, number: int) -> int:
        """Return the offset in the file of a candidate's pixels."""
        split = next(name for name in reversed(self._first) if number >= self._first[name])
        return self._offsets[split] + (number - self._first[split]) * self.row_bytes

    def numbers(self, split: str) -> range:
        """Return the candidates of a split."""
        return range(self._first[split], self._first[split] + self.counts[split])

    def note(self, rows: Iterable[Row]) -> None:
        """Note what became of some candidates, whose pixels are in the file."""
        for row in rows:
            self.done[row.number] = True
            self.warnings += row.warnings
            if row.reason:
                self.reasons[row.number] = row.reason
            else:
                self.digests[row.number] = np.frombuffer(bytes.fromhex(row.digest), np.uint8)
                self._sums[row.number] = row.sums
        self._journal.write(json.dumps(list(rows), separators=(",", ":")) + "\n")
        self._journal.flush()

    def close(self) -> None:
        """Let go of the file; what is there stays for the next time."""
        if self._journal is not None:
            self._journal.close()
        os.close(self._file)

    def discard(self) -> None:
        """Remove what is there."""
        for path in (self._journal_path, self.path):
            path.unlink(missing_ok=True)

    def publish(self, labels: Mapping[int, int], about: Mapping) -> None:
        """Make it a finished dataset file.

        Args:
            labels: by candidate, of those that are kept.
            about: what `store_writer.write_description` takes.
        """
        chosen = {split: self._packed(split, labels) for split in self.counts}
        statistics = _statistics(self._sums[chosen["train"]].sum(axis=0), len(chosen["train"]), self.shape)
        with ThreadPoolExecutor() as pool:
            # The disk is at work while the processor computes.
            pool.submit(os.fsync, self._file)
            checksums = pool.map(self._checksum, chosen, map(len, chosen.values()))
            digests = {f"{split}/images": checksum for split, checksum in zip(chosen, checksums, strict=True)}
        with h5py.File(self.path, "r+", libver=store_writer.LIBRARY_VERSIONS, locking=False) as file:
            for split, numbers in chosen.items():
                values = np.array([labels[number] for number in numbers], np.int64)
                file[f"{split}/labels"][:len(values)] = values
                digests[f"{split}/labels"] = hashlib.sha256(values).hexdigest()
                for kind in ("images", "labels"):
                    store_writer.write_attributes(file[f"{split}/{kind}"], {
                        "sha256": digests[f"{split}/{kind}"], "valid_rows": len(values)})
            store_writer.write_description(file, digests, inputs="images", statistics=statistics, **about)
        store_writer.publish(self.path, self.output)
        self._journal_path.unlink(missing_ok=True)

    def _left_behind(self, key: str) -> list[list[Row]] | None:
        """Return the lines of a journal under the same key, None where there is none or no file to it."""
        try:
            with self._journal_path.open(encoding="ascii") as journal:
                if json.loads(next(journal, "null")) != {"key": key} or not os.fstat(self._file).st_size:
                    return None
                # The last line may be torn.
                lines = [[Row(*values) for values in json.loads(text)] for text in journal if text.endswith("\n")]
        except (OSError, ValueError, TypeError):
            return None
        numbers = [row.number for line in lines for row in line]
        return lines if all(type(number) is int and 0 <= number < len(self.done) for number in numbers) else None

    def _allocate(self, *, anew: bool) -> None:
        """Give each dataset its place: in a new file, or around the rows of one that was left behind."""
        model = self.output.with_name(f".{self.output.name}.model")
        with h5py.File(model, "w", libver=store_writer.LIBRARY_VERSIONS, locking=False) as file:
            places = {}
            for split, count in self.counts.items():
                images = store_writer.create_dataset(file, f"{split}/images", (count, *self.shape), np.dtype(np.uint8))
                store_writer.create_dataset(file, f"{split}/labels", (count,), np.dtype(np.int64))
                places[split] = images.id.get_offset()
        self._offsets = places
        if anew:
            # A new file rather than an emptied one: a dying process of another job may still write into the old one.
            file = _locked(model)
            os.replace(model, self.path)
            os.close(self._file)
            self._file = file
            return
        try:
            size, start = model.stat().st_size, 0
            with model.open("rb") as source:
                for split, offset in [*sorted(places.items(), key=lambda item: item[1]), ("", size)]:
                    _copy_range(source.fileno(), self._file, start, offset)
                    start = offset + self.counts.get(split, 0) * self.row_bytes
            os.ftruncate(self._file, size)
        finally:
            model.unlink()

    def _start_journal(self, key: str, lines: list[list[Row]]) -> None:
        """Write the journal anew with the rows that the file still holds, and open it for the next ones."""
        temporary = self._journal_path.with_name(f"{self._journal_path.name}.new")
        with temporary.open("w", encoding="ascii") as self._journal:
            self._journal.write(json.dumps({"key": key}) + "\n")
            for rows in lines:
                self.note([row for row in rows if row.reason or self._holds(row)])
        os.replace(temporary, self._journal_path)
        self._journal = self._journal_path.open("a", encoding="ascii")

    def _holds(self, row: Row) -> bool:
        return digest_of(os.pread(self._file, self.row_bytes, self.place(row.number))) == row.digest

    def _packed(self, split: str, labels: Mapping[int, int]) -> list[int]:
        """Fill the places of candidates that are left out by the last ones that are kept; return who is where.

        No row that is kept is written over before the zeros at the end, so that a kill in between loses nothing.
        """
        numbers = self.numbers(split)
        kept = [number for number in numbers if number in labels]
        end = numbers.start + len(kept)
        holes = [number for number in range(numbers.start, end) if number not in labels]
        movers = [number for number in kept if number >= end][::-1]
        content = {number: number for number in range(numbers.start, end)}
        for hole, mover in zip(holes, movers, strict=True):
            os.pwrite(self._file, os.pread(self._file, self.row_bytes, self.place(mover)), self.place(hole))
            content[hole] = mover
        zeros = bytes(self.row_bytes)
        for number in range(end, numbers.stop):
            os.pwrite(self._file, zeros, self.place(number))
        return list(content.values())

    def _checksum(self, split: str, count: int) -> str:
        digest, rows = hashlib.sha256(), max(1, store_writer.CHUNK_BYTES // self.row_bytes)
        for start in range(0, count, rows):
            length = min(rows, count - start) * self.row_bytes
            digest.update(os.pread(self._file, length, self._offsets[split] + start * self.row_bytes))
        return digest.hexdigest()


def _locked(path: Path) -> int:
    """Open a file, made where there is none, that no other process has open this way; return its descriptor."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, the one who had it may have given it its final name.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(file).st_ino:
                    return file
        except BlockingIOError:
            os.close(file)
            raise UsageError("another process is writing the same output", mend="wait for it, or give another --output",
                             received=str(path)) from None
        except OSError as error:
            # Some network file systems know no locks.
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                return file
            os.close(file)
            raise
        os.close(file)


def _copy_range(source: int, target: int, start: int, stop: int) -> None:
    for place in range(start, stop, store_writer.CHUNK_BYTES):
        content = os.pread(source, min(store_writer.CHUNK_BYTES, stop - place), place)
        os.pwrite(target, content, place)


def _statistics(sums: np.ndarray, count: int, shape: tuple[int, int, int]) -> dict:
    """Return mean and standard deviation per channel; the sums are whole numbers, so that their order is no matter."""
    pixels = count * shape[0] * shape[1]
    mean, squares = (np.array([int(total) for total in part]) / pixels for part in np.split(sums, 2))
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(squares - mean**2, 0)).tolist()}


@contextlib.contextmanager
def partial_file(output: Path, counts: Mapping[str, int], shape: tuple[int, int, int], key: str) -> Iterator[
        PartialFile]:
    """Open a file in the making; a failure to write becomes one sentence, and what was done stays."""
    with store_writer.telling_failures(output):
        part = PartialFile(output, counts, shape, key)
        try:
            yield part
        finally:
            part.close()


