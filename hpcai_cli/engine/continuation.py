"""What follows for a run that is resumed with something else than it began with."""

from hpcai_cli.recipe import Recipe

_SAME_BITS = ("world_size", "tensor_parallel", "threads_per_rank", "precision")
"""Facts of the manifest without which the same bits cannot be expected."""
_VERSIONS = ("tensorflow", "keras", "horovod", "numpy")


def what_follows(before: Recipe, after: Recipe, manifest: dict, facts: dict, versions: dict) -> list[str]:
    """Return sentences on what a resumed run does otherwise than the one that began; none where it is all the same.

    Args:
        before, after: the recipe of the run's folder, and the one that it goes on with.
        manifest: of the run's folder.
        facts: of this job, by the manifest's names.
        versions: of the packages now.
    """
    found, sizes = [], (manifest.get("world_size"), facts["world_size"])
    size = sizes[0] if isinstance(sizes[0], int) and sizes[0] > 0 else facts["world_size"]
    one, other = _batch(before) * size, _batch(after) * facts["world_size"]
    rates = before.peak_learning_rate(size), after.peak_learning_rate(facts["world_size"])
    if one != other:
        found.append(f"a step takes {other:,} examples in place of {one:,}, from here on; each of an epoch's is still "
                     "seen once")
    if rates[0] != rates[1]:
        why = f", by learning_rate_scaling={after.learning_rate_scaling}" if sizes[0] != sizes[1] else ""
        found.append(f"the learning rate's peak is {rates[1]:g} in place of {rates[0]:g}{why}")
    elif one != other:
        found.append(f"the learning rate's peak stays {rates[1]:g}")
    if before.epochs != after.epochs and after.schedule != "constant":
        found.append(f"the {after.schedule} schedule ends after {after.epochs} epochs in place of {before.epochs}, and "
                     "the learning rate jumps to where it is there")
    changed = [name for name in _SAME_BITS if name in manifest and name in facts and manifest[name] != facts[name]]
    values = before.to_json(), after.to_json()
    changed += [name for name in values[1] if name not in ("epochs", "precision") and values[0].get(name) !=
                values[1][name]]
    if before.epochs != after.epochs and after.schedule != "constant":
        changed.append("number of epochs")
    known = manifest.get("versions")
    known = known if isinstance(known, dict) else {}
    changed += [name for name in _VERSIONS if name in known and known[name] != versions.get(name)]
    if changed:
        found.append("the weights will not be bit for bit those of a run that was never stopped: another "
                     f"{', '.join(changed)}")
    return found


def _batch(recipe: Recipe) -> int:
    return recipe.batch_size * recipe.accumulation_steps
