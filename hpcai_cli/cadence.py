"""How often a training writes a checkpoint, and how many stay."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hpcai_cli import durations
from hpcai_cli.errors import UsageError

USUAL_SECONDS = 600.0
"""A long epoch has a checkpoint in so many seconds: what a job that is killed loses at most."""


@dataclass(frozen=True)
class Cadence:
    """When a checkpoint is due: whatever comes first."""

    epochs: int = 1
    """At the end of every so many epochs; also after one that is the best so far, and after the last."""
    steps: int = 0
    """After so many steps; 0 for never."""
    seconds: float = USUAL_SECONDS
    """After so many seconds; 0 for never."""
    keep: int = 2
    """Newest checkpoints that stay, besides the best."""

    @classmethod
    def of(cls, every: Sequence[str], keep: int) -> "Cadence":
        """Read `500steps`, `30s`, `10m` or `2epochs`.

        Raises:
            UsageError: it is none of them, or the same twice.
        """
        found: dict[str, float] = {}
        for text in every:
            match = re.fullmatch(r"([1-9]\d{0,8}) ?(step|epoch)s?", text.strip().lower())
            kind, number = (f"{match[2]}s", int(match[1])) if match else ("seconds", _seconds(text))
            if kind in found:
                raise UsageError(f"--checkpoint-every is given twice in {kind}", received=text, expected="each once")
            found[kind] = number
        # Who says steps or seconds means these; the ends of the epochs stay.
        return cls(keep=keep, **({"seconds": 0.0} if found.keys() - {"epochs"} else {}) | found)

    def words(self) -> list[str]:
        """Return what `of` reads."""
        found = {"epochs": self.epochs, "steps": self.steps, "s": self.seconds}
        return [f"{value:g}{unit}" for unit, value in found.items() if value]


def _seconds(text: str) -> float:
    try:
        return durations.seconds(text, what="--checkpoint-every")
    except UsageError:
        raise UsageError("--checkpoint-every takes steps, seconds or epochs",
                         expected="such as 500steps, 30s, 10m or 2epochs", received=text) from None
