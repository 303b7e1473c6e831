"""The values that a search may give to a recipe's settings, read from `learning_rate=log:1e-4:1e-1`."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpcai_cli.errors import UsageError
from hpcai_cli.recipe import Recipe, nearest

HOW = "NAME=LOW:HIGH, NAME=log:LOW:HIGH or NAME=ONE,TWO,THREE"
MOST_POINTS = 10_000
"""Of a grid."""


@dataclass(frozen=True)
class Parameter:
    """One setting of a recipe, and what it may be: a range, or one of some values."""

    name: str
    text: str
    """As it was given, without the name."""
    kind: str
    """float, int or choice."""
    low: float = 0.0
    """Of a range, both ends included."""
    high: float = 0.0
    log: bool = False
    """Whether its logarithm is drawn evenly."""
    choices: tuple[str, ...] = ()

    @property
    def points(self) -> Sequence[object]:
        """All values, where they can be counted.

        Raises:
            UsageError: it is a range of real numbers, or a long one.
        """
        if self.kind == "choice":
            return self.choices
        if self.kind == "int" and not self.log and self.high - self.low < MOST_POINTS:
            return range(int(self.low), int(self.high) + 1)
        raise UsageError("a grid needs values that can be counted", expected=f"{self.name}=ONE,TWO,THREE",
                         received=f"{self.name}={self.text}")

    def value_of(self, recipe: Recipe) -> object | None:
        """Return what a recipe has set; None where it is not among the values that are searched."""
        settings = _settings(recipe)
        if self.name not in settings:
            return None
        value = settings[self.name]
        if self.kind == "choice":
            return next((choice for choice in self.choices
                         if _settings(recipe.override({self.name: choice}))[self.name] == value), None)
        return value if isinstance(value, (int, float)) and self.low <= value <= self.high else None


def parse(pairs: Mapping[str, str], recipe: Recipe) -> tuple[Parameter, ...]:
    """Read what is to be searched, in the order of the names; the recipe's own types and limits hold.

    Raises:
        UsageError: all that is wrong, at once.
    """
    known, found, problems = _settings(recipe), [], []
    for name, text in sorted((name.replace("-", "_"), text) for name, text in pairs.items()):
        try:
            if name not in known:
                raise UsageError(f"recipe {recipe.name} has no field {name[:60]!r}{nearest(name, list(known))}",
                                 mend=f"run `hpcai recipes show {recipe.name}` for all of them", received=name)
            parameter = _parameter(name, text.strip(), known[name])
            for value in parameter.choices or (parameter.low, parameter.high):
                recipe.override({name: as_text(int(value) if parameter.kind == "int" else value)})
            found.append(parameter)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("; and ".join(problems[:8]))
    return tuple(found)


def grid(parameters: Sequence[Parameter]) -> list[dict[str, object]]:
    """Return every combination of values.

    Raises:
        UsageError: they cannot be counted, or are more than anybody would train.
    """
    axes = [parameter.points for parameter in parameters]
    count = math.prod(map(len, axes))
    if count > MOST_POINTS:
        raise UsageError(f"the grid has {count:,} points", expected=f"at most {MOST_POINTS:,}")
    names = [parameter.name for parameter in parameters]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*axes)]


def as_text(value: object) -> str:
    """Return a value as `--set` takes it."""
    return repr(value) if isinstance(value, float) else str(value)


def _settings(recipe: Recipe) -> dict[str, object]:
    """Return what can be set, with its value."""
    values = recipe.to_json()
    for fixed in ("name", "summary", "presets", "search"):
        values.pop(fixed, None)
    return values | values.pop("options")


def _parameter(name: str, text: str, default: object) -> Parameter:
    given = f"{name}={text}"
    words = text.split(":")
    log = words[0] == "log"
    bounds = words[1:] if log else words
    if len(bounds) == 1 and not log:
        choices = tuple(word.strip() for word in text.split(","))
        if "" in choices or len(set(choices)) < len(choices):
            raise UsageError("cannot read --search", expected="different values, with commas between", received=given)
        return Parameter(name, text, "choice", choices=choices)
    kind = type(default).__name__
    if kind not in ("int", "float"):
        raise UsageError(f"{name} has no range", expected=f"{name}=ONE,TWO", received=given)
    try:
        low, high = ((int if kind == "int" else float)(word.replace("_", "")) for word in bounds)
    except ValueError:
        raise UsageError("cannot read --search", expected=HOW, received=given) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or log and low <= 0:
        raise UsageError("cannot read --search", received=given,
                         expected="LOW below HIGH" + (", both above 0 where they are logarithmic" if log else ""))
    return Parameter(name, text, kind, low, high, log)
