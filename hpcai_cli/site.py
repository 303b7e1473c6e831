"""A site's own defaults for `hpcai launch`, in a small TOML file."""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from hpcai_cli.errors import DataError
from hpcai_cli.recipe import nearest, parse_toml

VARIABLE = "HPCAI_SITE"
PLACES = (Path("~/.config/hpcai/site.toml"), Path("/etc/hpcai/site.toml"))


def defaults(section: str, kind: type, environ: Mapping[str, str] = os.environ) -> dict:
    """Return what the site says about one way of launching: values by name, none where there is no file.

    Args:
        section: of the file, such as `slurm`.
        kind: a dataclass, whose fields are the names and types that are known.

    Raises:
        DataError: the file cannot be read, or says what is not known.
    """
    named = environ.get(VARIABLE)
    path = Path(named) if named else next((path for place in PLACES if (path := place.expanduser()).is_file()), None)
    if path is None:
        return {}
    try:
        found = parse_toml(path.read_text()).get(section, {})
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the site's defaults in {path}: {error}", expected="a TOML file") from None
    known = {field.name: type(field.default) for field in fields(kind)}
    if not isinstance(found, dict):
        raise DataError(f"{section} in {path} is no section", expected=f"[{section}]")
    for name, value in found.items():
        if name not in known:
            raise DataError(f"{path} sets what is not known{nearest(name, list(known))}", received=name,
                            expected=", ".join(known))
        wanted = list if known[name] is tuple else known[name]
        if type(value) is not wanted or wanted is list and not all(isinstance(each, str) for each in value):
            kinds = {str: "a string", int: "a whole number", bool: "true or false", list: "a list of strings"}
            raise DataError(f"{name} in {path} is of another kind", expected=kinds[wanted], received=value)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
