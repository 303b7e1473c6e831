"""What this process may use of its machine: memory, shared memory, files, processes, cores, threads."""

import os
import resource
from pathlib import Path

from hpcai_cli.engine.cgroup import Groups
from hpcai_cli.engine.environment.finding import Finding, judged
from hpcai_cli.engine.machine import cores, gpus, instruction_sets, memory_bytes, share

_LEAST_MEMORY = 2e9
"""Bytes: TensorFlow alone takes 0.4 GB of each of two processes."""
_LEAST_SHARED_MEMORY = 256e6
"""Bytes: Open MPI and NCCL keep there what ranks of a host send each other; docker gives 64 MB."""
_SHARED_MEMORY = Path("/dev/shm")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS",
                     "TF_NUM_INTEROP_THREADS")


def findings() -> list[Finding]:
    """Look at all limits."""
    return [Finding("CPU", "ok", instruction_sets()), _cores(), _threads(), _gpus(), _memory(), _shared_memory(),
            _open_files(), _processes(), _address_space(), _locked_memory()]


# ---- Cores ---------------------------------------------------------------------------------------------------------

def _cores() -> Finding:
    quota, count = Groups().cores(), os.cpu_count() or 1
    value = f"{cores()} for this process of {count} here"
    if quota is not None and quota < count:
        value += f"; a container or a batch system gives it {quota:g}"
    return Finding("cores", "ok", value, metrics={"cores": cores()})


def _threads() -> Finding:
    odd = [name for name in _THREAD_VARIABLES if name in os.environ and not _is_usual(os.environ[name])]
    each = share(2)
    value = f"{each} for each of 2 processes"
    if odd:
        value += "; " + ", ".join(f"{name}={os.environ[name]}" for name in odd) + f" does not suit {cores()} cores"
    return judged("threads", value, f"unset {' '.join(odd)}", is_well=not odd, metrics={"threads_of_2_processes": each})


def _is_usual(text: str) -> bool:
    # OpenMP takes a number for each level of nested loops; TensorFlow chooses by itself at 0.
    return all(word.isdecimal() and int(word) <= cores() for word in text.split(","))


def _gpus() -> Finding:
    names = gpus()
    return Finding("GPUs", "ok", f"{len(names)}: {', '.join(sorted(set(names)))}" if names else "none",
                   metrics={"gpus": len(names)})


# ---- Memory --------------------------------------------------------------------------------------------------------

def _memory() -> Finding:
    total, available = memory_bytes()
    value = f"{total / 1e9:.1f} GB, {available / 1e9:.1f} GB of it free"
    limits = Groups().memory()
    is_limited = limits is not None and limits[0] <= total
    if is_limited:
        value += "; a container or a batch system sets this limit"
    mend = "end what else runs here"
    if is_limited:
        mend = "sbatch --mem=16G" if "SLURM_JOB_ID" in os.environ else "docker run --memory=16g"
    return judged("memory", value, mend, is_well=available >= _LEAST_MEMORY,
                  metrics={"memory_bytes": total, "memory_free_bytes": available})


def _shared_memory() -> Finding:
    mend = "docker run --shm-size=1g"
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except OSError as error:
        return Finding("shared memory", "warning", f"{_SHARED_MEMORY} cannot be used: {error.strerror}", mend)
    total, free = found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail
    value = f"{_SHARED_MEMORY} has {_size(total)}, {_size(free)} of it free"
    if total >= _LEAST_SHARED_MEMORY > free:
        mend = f"remove what ended programs have left in {_SHARED_MEMORY}"
    return judged("shared memory", value, mend, is_well=free >= _LEAST_SHARED_MEMORY,
                  metrics={"shared_memory_bytes": total})


def _address_space() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    # TensorFlow and CUDA reserve far more addresses than they take memory.
    return judged("address space", _said(soft, _size), _raised("v", "unlimited", hard, resource.RLIM_INFINITY),
                  is_well=soft == resource.RLIM_INFINITY)


def _locked_memory() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    has_infiniband = Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())
    value = f"{_said(soft, _size)}{'' if has_infiniband else '; no InfiniBand here, which wants it unlimited'}"
    if soft == resource.RLIM_INFINITY:
        value = "unlimited"
    return judged("locked memory", value, _raised("l", "unlimited", hard, resource.RLIM_INFINITY, "memlock=-1"),
                  is_well=soft == resource.RLIM_INFINITY or not has_infiniband)


# ---- Files and processes -------------------------------------------------------------------------------------------

def _open_files(least: int = 1024) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return judged("open files", _said(soft), _raised("n", 4096, hard, 4096, "nofile=65536"),
                  is_well=soft == resource.RLIM_INFINITY or soft >= least)


def _processes(least: int = 1024) -> Finding:
    """Judge how many processes and threads there may be, of which a TensorFlow with Horovod starts tens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    left = Groups().processes()
    if left is not None and left < least:
        return Finding("processes", "warning", f"a container or a batch system allows {left:,} more",
                       "docker run --pids-limit=-1")
    return judged("processes", _said(soft), _raised("u", 4096, hard, 4096, "nproc=65536"),
                  is_well=soft == resource.RLIM_INFINITY or soft >= least)


def _raised(flag: str, wanted: object, hard: int, least: int, of_docker: str = "") -> str:
    """Return the line that raises a limit: the shell's up to the hard limit, above it the container's or the host's."""
    if hard == resource.RLIM_INFINITY or least != resource.RLIM_INFINITY and hard >= least:
        return f"ulimit -{flag} {wanted}"
    return f"{f'docker run --ulimit {of_docker}, or ' if of_docker else ''}/etc/security/limits.conf"


def _said(limit: int, text=lambda number: f"{number:,}") -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"at most {text(limit)}"


def _size(count: float) -> str:
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= least:
            return f"{count / least:.1f} {unit}"
    return f"{count:.0f} B"
