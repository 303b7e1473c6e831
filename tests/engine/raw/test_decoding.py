"""Decoding in processes of its own: what they answer, what becomes of a crash, a slow decoder, a kill."""

import multiprocessing
import os
import signal
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcai_cli.engine.raw import decoding, decoding_process
from hpcai_cli.engine.raw.decoding import Task, decode_files
from hpcai_cli.engine.raw.decoding_process import Setting, digest_of
from hpcai_cli.engine.raw.images import read_image
from hpcai_cli.signals import StopRequest

SHAPE = (10, 12, 3)
ROW = 10 * 12 * 3


@pytest.fixture
def photos(tmp_path) -> Path:
    """Return a folder with 80 images of random pixels, and an empty file to write to."""
    for number in range(80):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "part").write_bytes(b"")
    return tmp_path


def decoded(folder: Path, names: list[str], *, processes: int = 2, **setting) -> dict[int, tuple]:
    setting = Setting(folder, folder / "part", SHAPE, setting.pop("min_size", 16), **setting)
    tasks = (Task(number, name, 100 + number * ROW) for number, name in enumerate(names))
    answers = [row for rows in decode_files(tasks, setting, processes=processes, stop=StopRequest()) for row in rows]
    assert sorted(row.number for row in answers) == list(range(len(names)))
    assert not multiprocessing.active_children()
    return {row.number: row for row in answers}


def test_every_file_is_in_its_place(photos):
    names = [f"{number}.png" for number in range(80)]
    rows = decoded(photos, names)
    content = (photos / "part").read_bytes()
    for number, name in enumerate(names):
        pixels = read_image(photos / name, SHAPE)
        assert content[100 + number * ROW:100 + (number + 1) * ROW] == pixels.tobytes()
        assert rows[number].digest == digest_of(pixels.tobytes())
        channels = pixels.reshape(-1, 3).astype(int)
        assert rows[number].sums == (*channels.sum(axis=0), *(channels**2).sum(axis=0))


def test_what_cannot_be_decoded_has_a_reason(photos):
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.jpg").write_text("Dear Sir")
    rows = decoded(photos, ["0.png", "empty.jpg", "text.jpg", "missing.jpg", "1.png"])
    assert [rows[number].reason for number in range(5)] == [
        "", "empty file", "not an image", "cannot be read (No such file or directory)", ""]
    assert decoded(photos, ["0.png"], min_size=31)[0].reason == "40x30 pixels is smaller than 31"


def test_chatter_is_counted_and_not_shown(photos, capfd):
    """libtiff says on the error output what it thinks of a file, and Pillow warns of damaged EXIF."""
    Image.open(photos / "0.png").save(photos / "0.tif", compression="tiff_lzw")
    content = bytearray((photos / "0.tif").read_bytes())
    place = struct.unpack("<I", content[4:8])[0]
    for entry in range(struct.unpack("<H", content[place:place + 2])[0]):
        start = place + 2 + 12 * entry
        if struct.unpack("<H", content[start:start + 2])[0] == 273:
            strip = struct.unpack("<I", content[start + 8:start + 12])[0]
    content[strip + 20:strip + 60] = b"\xff" * 40
    (photos / "0.tif").write_bytes(content)
    exif = Image.Exif()
    exif[0x0112] = 1
    Image.open(photos / "0.png").save(photos / "0.jpg", exif=exif.tobytes()[:-12])
    rows = decoded(photos, ["0.png", "0.tif", "0.jpg", "1.png"], processes=1)
    assert [bool(rows[number].warnings) for number in range(4)] == [False, True, True, False]
    assert "truncated or damaged" in rows[1].reason
    assert capfd.readouterr() == ("", "")


def gray_png(side: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(side * (side + 1)), 1)) + chunk(b"IEND", b""))


def test_a_slow_file_is_rejected(photos):
    (photos / "slow.png").write_bytes(gray_png(7_900))
    rows = decoded(photos, ["0.png", "slow.png", "1.png"], seconds=0.05)
    assert [rows[number].reason for number in range(3)] == ["", "takes longer than 0.05 s to decode", ""]


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGSEGV, "the decoder crashed"),
                                                (signal.SIGPROF, "takes longer than 10 s to decode")])
def test_a_crash_costs_only_the_file_that_causes_it(photos, number, reason):
    """The file is a pipe: whenever a process opens it, that process is killed, as a bug in a decoder would do it."""
    os.mkfifo(photos / "evil.jpg")

    def kill() -> None:
        for _ in range(2):
            with open(photos / "evil.jpg", "wb"):
                for child in multiprocessing.active_children():
                    os.kill(child.pid, number)
                    # Waited for and not joined: who joins takes its exit code away from the one that needs it.
                    while Path(f"/proc/{child.pid}").exists():
                        time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    names = [f"{number}.png" for number in range(80)]
    names.insert(5, "evil.jpg")
    rows = decoded(photos, names, processes=1)
    assert {number: row.reason for number, row in rows.items() if row.reason} == {5: reason}
    killer.join(timeout=60)


def test_a_signal_ends_it_between_two_answers(photos):
    setting = Setting(photos, photos / "part", SHAPE, 16)
    tasks = [Task(number, f"{number % 80}.png", 0) for number in range(10_000)]
    with StopRequest() as stop:
        count = 0
        for rows in decode_files(tasks, setting, processes=1, stop=stop):
            count += len(rows)
            os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == "SIGTERM"
    assert 0 < count <= decoding.CHUNK_FILES
    assert not multiprocessing.active_children()


def test_pixels_that_cannot_be_written_are_an_error(photos):
    (photos / "part").unlink()
    with pytest.raises(OSError, match="No such file"):
        decoded(photos, ["0.png"])
    assert decoding_process.SECONDS == 10
