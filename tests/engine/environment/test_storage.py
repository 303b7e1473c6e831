"""What the doctor says of folders: real locks, maps and mounts, and file systems from the texts of a kernel."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from hpcai_cli.engine.environment import storage
from hpcai_cli.engine.environment.storage import Tried

MOUNTS = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
31 27 0:44 / /home rw,relatime - nfs4 server:/home rw,vers=4.2
32 27 0:45 / /data\040sets rw - lustre 10.0.0.1@tcp:/fs rw
33 31 0:46 / /home/fast rw - tmpfs none rw
34 33 0:47 / /home/fast rw - fuse.sshfs a:/ rw
no mount
"""


def found_by_name() -> dict:
    return {finding.name: finding for finding in storage.findings()}


@pytest.mark.parametrize(("folder", "kind"), [
    ("/home/me", "nfs4"), ("/homes", "ext4"), ("/data sets/a", "lustre"), ("/home/fast/x", "fuse.sshfs"), ("/", "ext4"),
    ("/proc/self", "proc")])
def test_the_file_system_of_a_folder(folder, kind):
    assert storage.file_system_of(folder, MOUNTS) == kind


def test_the_folders_of_this_machine_lock_map_and_say_how_much_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = found_by_name()
    assert found["file locking"].status == "ok" and "works in" in found["file locking"].value
    assert str(tmp_path) in found["current folder"].value and "GB free" in found["current folder"].value
    assert found["current folder"].metrics["current_folder_free_bytes"] > 0
    assert not list(tmp_path.iterdir())


def test_each_step_of_a_trial_is_really_taken(tmp_path):
    (tried,) = storage._tried([tmp_path])
    assert list(tried.steps) == list(storage.folder_trial.STEPS)
    assert not tried.locks and tried.file_system


def test_a_cache_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HPCAI_CACHE", str(tmp_path / "file/below"))
    finding = found_by_name()["cache folder"]
    assert finding.status == "warning" and "Not a directory" in finding.value
    assert finding.mend == "export HPCAI_CACHE=FOLDER"


def test_a_folder_of_temporary_files_that_is_not_there_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    finding = found_by_name()["temporary files"]
    assert finding.status == "warning" and "No such file" in finding.value and finding.mend == "export TMPDIR=FOLDER"
    assert not (tmp_path / "none").exists()


def test_a_small_and_a_read_only_file_system(tmp_path):
    """Mounts of a namespace of its own."""
    code = ("from hpcai_cli.engine.environment import storage\n"
            "for each in storage.findings(): print(each.status, each.name, each.value, each.mend, sep='|')")
    script = (f"mount -t tmpfs -o size=2m none {tmp_path} && mkdir {tmp_path}/read && "
              f"mount -t tmpfs -o ro none {tmp_path}/read && cd {tmp_path} && "
              f"TMPDIR={tmp_path}/read exec {sys.executable} -c \"$0\"")
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script, code], capture_output=True, text=True, timeout=120)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr.lower():
        pytest.skip("no namespace can be made here")
    found = {line.split("|")[1]: line.split("|") for line in done.stdout.splitlines()}
    assert found["current folder"][0] == "warning" and "tmpfs, 0.0 GB free" in found["current folder"][2]
    assert found["temporary files"][0] == "warning" and "Read-only file system" in found["temporary files"][2]
    assert found["temporary files"][3] == "export TMPDIR=FOLDER"
    assert found["file locking"][0] == "ok"


def test_a_folder_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    # Python itself takes longer to start.
    monkeypatch.setattr(storage, "_SECONDS", 0)
    (tried,) = storage._tried([tmp_path])
    assert tried.failed("folder") == "no answer within 0 s" and tried.failed("flock") == "not tried"


def test_a_lock_that_another_process_holds_is_no_fault(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Path("data.h5").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert found_by_name()["file locking"].status == "ok"


NFS = Tried(Path("/home/me"), "nfs4", {"folder": "/home/me", "free": 9 * 10**9, "write": None, "map": None,
                                       "flock": "error: No locks available", "lockf": None})
HANGS = Tried(Path("/home/me"), "nfs4", {"folder": "/home/me", "free": 9 * 10**9, "write": None, "map": None})


@pytest.mark.parametrize(("tried", "setting", "status", "words"), [
    (NFS, None, "warning", "in /home/me: No locks available"), (HANGS, None, "warning", "no answer within 10 s"),
    (NFS, "TRUE", "warning", "HDF5_USE_FILE_LOCKING=TRUE"), (NFS, "BEST_EFFORT", "warning", "BEST_EFFORT"),
    (NFS, "FALSE", "ok", "HDF5_USE_FILE_LOCKING=FALSE"), (NFS, "0", "ok", "No locks available"),
    (NFS, "no", "warning", "does not understand HDF5_USE_FILE_LOCKING=no")])
def test_a_file_system_without_locks_and_what_hdf5_is_told(monkeypatch, tried, setting, status, words):
    monkeypatch.delenv("HDF5_USE_FILE_LOCKING", raising=False)
    if setting:
        monkeypatch.setenv("HDF5_USE_FILE_LOCKING", setting)
    finding = storage._locking([tried])
    assert finding.status == status and words in finding.value
    if status == "warning":
        assert finding.mend == ("unset HDF5_USE_FILE_LOCKING" if setting == "no" else
                                "export HDF5_USE_FILE_LOCKING=FALSE")


def test_temporary_files_on_a_network_file_system():
    finding = storage._temporary(NFS)
    assert finding.status == "warning" and "nfs4 over a network" in finding.value and "TMPDIR" in finding.mend


def test_a_folder_that_cannot_be_mapped():
    finding = storage._folder("current folder", Tried(Path("/x"), "9p", {
        "folder": "/x", "free": 9 * 10**9, "write": None, "map": "error: No such device"}), 1, "")
    assert finding.status == "warning" and "cannot be mapped: No such device" in finding.value
    assert finding.mend == "keep dataset files in another folder"
