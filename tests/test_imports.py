"""Who may import whom, read from the source."""

import ast
import configparser
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRONT_DOOR = {path.stem for path in (ROOT / "hpcai_cli").glob("*.py")} - {"__init__", "main"}
FRAMEWORKS = {"tensorflow", "keras", "horovod", "h5py", "numpy", "sklearn", "matplotlib", "PIL"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return what a file imports, with full names, and whether that stands inside a function."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((name.name, inside) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path.name}, line {child.lineno}: imports are absolute"
                found.extend((f"{child.module}.{name.name}", inside) for name in child.names)
            visit(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text()), False)
    return found


def room(name: str) -> str:
    """Return the room of our house that a full name belongs to, the top-level package's name for others'."""
    top, *rest = name.split(".")
    if top != "hpcai_cli":
        return top
    below = rest[0] if rest else ""
    return below if below in FRONT_DOOR | {"commands", "engine", "main", "recipes"} else "hpcai_cli"


def files(folder: str) -> list:
    # An id without the folder in front would be the same for commands/doctor.py and engine/environment/doctor.py.
    paths = (ROOT / folder).rglob("*.py") if folder.endswith("engine") else (ROOT / folder).glob("*.py")
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in sorted(paths)]


def breaches(path: Path, anywhere: set[str], in_functions: set[str]) -> list[str]:
    """Return the imports of a file that are not allowed."""
    standard = set(sys.stdlib_module_names) | {"hpcai_cli"}
    allowed = {True: standard | anywhere | in_functions, False: standard | anywhere}
    return [name for name, inside in imports(path) if room(name) not in allowed[inside]]


@pytest.mark.parametrize("path", files("hpcai_cli"))
def test_the_front_door_is_light(path):
    own = {"commands"} if path.stem == "main" else {"recipes"} if path.stem == "catalog" else set()
    # Python 3.10 has no tomllib.
    own |= {"tomli"} if path.stem == "recipe" else set()
    assert not breaches(path, FRONT_DOOR | {"typer"} | own, {"rich"})


@pytest.mark.parametrize("path", files("commands"))
def test_a_command_enters_the_engine_in_its_body_and_no_other_command(path):
    assert not breaches(path, FRONT_DOOR | {"typer"}, {"engine", "rich"})


@pytest.mark.parametrize("path", files("recipes"))
def test_a_recipe_takes_the_frameworks_in_its_bodies_and_no_other_recipe(path):
    assert not breaches(path, {"recipe"}, FRAMEWORKS - {"horovod"} | {"engine"})


@pytest.mark.parametrize("path", files("hpcai_cli/engine"))
def test_the_engine_knows_nothing_above_it(path):
    above = {"commands", "recipes", "main", "catalog", "options"}
    assert not [name for name, _ in imports(path) if room(name) in above]
    assert not [name for name, inside in imports(path) if room(name) == "typer"]


@pytest.mark.parametrize("path", files("hpcai_cli/engine"))
def test_horovod_is_imported_in_one_place(path):
    # The peer is a script as people write it, and measured beside ours.
    if path.stem not in ("distributed", "peer_horovod"):
        assert "horovod" not in {room(name) for name, _ in imports(path)}


def test_every_package_is_listed_for_the_wheel():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "hpcai_cli").rglob("__init__.py")}
    assert set(settings["options"]["packages"].split()) == found | {"hpcai_cli.commands", "hpcai_cli.recipes"}


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in sorted(
    path for folder in ("commands", "recipes", "hpcai_cli") for path in (ROOT / folder).rglob("__init__.py"))])
def test_packages_are_empty(path):
    assert path.read_text().strip() == "" or path.parent.name == "hpcai_cli"
