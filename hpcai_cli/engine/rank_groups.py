"""Which ranks share a model, which of them hold the same part of it, and what cannot be trained that way."""

import os

from hpcai_cli import launch
from hpcai_cli.errors import UsageError
from hpcai_cli.recipe import Recipe


def sharing(rank: int, parts: int) -> list[int]:
    """Return the ranks that share a model with this one: consecutive ones, which are on one host."""
    first = rank // parts * parts
    return list(range(first, first + parts))


def alike(rank: int, parts: int, size: int) -> list[int]:
    """Return the ranks that hold the same part of the model as this one."""
    return list(range(rank % parts, size, parts))


def groups(parts: int) -> list[list[int]]:
    """Return the groups of ranks, beside that of all, which this job needs for models in so many parts.

    Raises:
        UsageError: it cannot be told how many ranks the job has, and their groups have to be known before they meet.
    """
    place = launch.place()
    if parts == 1:
        return []
    if not place.is_size_known:
        raise UsageError(f"{place.launcher} does not say how many processes it has started",
                         expected="a number, for --tensor-parallel to group them", mend="start them with --np",
                         received=parts)
    if place.size % parts:
        # This is refused with the request's other faults (`check`).
        return []
    found = [sharing(rank, parts) for rank in range(0, place.size, parts)]
    found += [alike(rank, parts, place.size) for rank in range(parts)]
    return [group for group in found if 1 < len(group) < place.size]


def check(recipe: Recipe, *, parts: int, size: int, profiled: bool) -> None:
    """Check that a job of `size` ranks can train the recipe on models in so many parts.

    Raises:
        UsageError: it cannot, or would silently do something else than on whole models.
    """
    if parts == 1:
        return
    if size % parts:
        raise UsageError(f"--tensor-parallel {parts} splits each model over {parts} processes",
                         expected=f"a multiple of {parts} processes", mend=f"start them with `--np {parts}`",
                         received=size)
    problems = []
    if recipe.optimizer == "lamb":
        problems.append("lamb steps by the norm of each whole layer")
    if recipe.precision == "mixed_float16":
        problems.append("mixed_float16 skips a step by the whole gradient, and each process would decide for itself")
    if recipe.gradient_reduction == "adasum":
        problems.append("Adasum combines the gradients of all processes, and not of some")
    if os.environ.get("HOROVOD_AUTOTUNE", "0") != "0":
        problems.append("--autotune tunes what all processes do together, and not what groups of them do")
    if profiled:
        problems.append("--profile does not know what passes between the parts of a model")
    if problems:
        raise UsageError(f"--tensor-parallel cannot be had with this: {'; '.join(problems)}", received=parts,
                         mend="leave it out, or change the recipe with --set")
