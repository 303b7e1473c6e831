"""Lengths of time as people write them on a command line."""

import re

from hpcai_cli.errors import UsageError

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_PART = r"(\d{1,9}(?:\.\d{1,3})?)([smhd])"


def seconds(text: str, *, what: str) -> float:
    """Return the seconds of `90s`, `1.5h`, `1h30m` or a bare number of them, above 0.

    Args:
        what: the option, for the error.

    Raises:
        UsageError: it is no length of time.
    """
    words = text.strip().lower()
    if re.fullmatch(r"\d{1,9}(\.\d{1,3})?", words):
        words += "s"
    found = sum(float(number) * _SECONDS[unit] for number, unit in re.findall(_PART, words))
    if not re.fullmatch(f"({_PART})+", words) or not found:
        raise UsageError(f"{what} takes a length of time", expected="such as 90s, 30m, 2h or 1h30m", received=text)
    return found


def words(length: float) -> str:
    """Return a length of time, s, as people say it: `45 s`, `12 min`, `3.5 h`."""
    if length < 90:
        return f"{length:.0f} s"
    return f"{length / 60:.0f} min" if length < 5_400 else f"{length / 3_600:.1f} h"
