"""A bundle has the sources that its program needs, and nothing that drags in another kind's library."""

import ast
import sys
from pathlib import Path

import pytest

import hpcai_cli
from hpcai_cli.engine.deployment import bundle_sources
from hpcai_cli.engine.deployment.bundle import EDGE_RUNNER, SERVER
from hpcai_cli.engine.deployment.bundle_requirements import EDGE_PACKAGES, LIBRARIES, SERVER_PACKAGES
from hpcai_cli.engine.deployment.bundle_sources import OPENERS, sources

PROGRAMS = [*((SERVER, kind, SERVER_PACKAGES) for kind in OPENERS), (EDGE_RUNNER, "tflite", EDGE_PACKAGES)]
MODULES = {"pillow": "PIL", "python-multipart": "python_multipart", "prometheus-client": "prometheus_client",
           "ai-edge-litert": "ai_edge_litert"}
"""Names under which packages are imported that are called otherwise."""


def imported_at_the_top(node: ast.AST):
    """Yield the packages that a module imports as soon as it is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (name.name.split(".")[0] for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module.split(".")[0]
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from imported_at_the_top(child)


@pytest.mark.parametrize(("start", "kind", "packages"), PROGRAMS)
def test_what_is_imported_is_there_or_required(start, kind, packages):
    required = {MODULES.get(name, name) for name in (*packages, *LIBRARIES[kind])}
    required |= {"h5py"} if "tensorflow" in required else set()
    allowed = required | set(sys.stdlib_module_names) | {"hpcai_cli"}
    for name, file in sources(start, kind).items():
        if file.suffix == ".py":
            assert set(imported_at_the_top(ast.parse(file.read_text()))) <= allowed, name


@pytest.mark.parametrize(("start", "kind", "packages"), PROGRAMS)
def test_of_the_kinds_only_one_is_there(start, kind, packages):
    found = {name.removesuffix(".py").replace("/", ".") for name in sources(start, kind)}
    assert found & set(OPENERS.values()) == {OPENERS[kind]}
    assert start in found
    assert not [name for name in found if name.startswith(("hpcai_cli.commands", "hpcai_cli.recipes"))]


def test_each_module_comes_with_its_packages():
    found = sources(EDGE_RUNNER, "tflite")
    for name in found:
        assert all(f"{folder.as_posix()}/__init__.py" in found for folder in list(Path(name).parents)[:-1])
    assert "hpcai_cli/engine/raw/images.py" in found


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A package with a few modules in the place of ours."""
    texts = {"__init__.py": "", "start.py": """
import numpy
from typing import TYPE_CHECKING
from hpcai_cli import top
if TYPE_CHECKING:
    from hpcai_cli import for_checkers
def light():
    import hpcai_cli.room.inner
    if True:
        from hpcai_cli.room import first, second
class Holder:
    from hpcai_cli.top import value
""", "top.py": "import hpcai_cli.start\nvalue = 1", "for_checkers.py": "", "unused.py": "", "page.html": "<p>",
             ".hidden": "", "room/__init__.py": "", "room/deep.py": "", "room/beside.txt": "",
             "room/inner.py": "async def f():\n    from hpcai_cli.room.deep import things",
             "room/first.py": "", "room/second.py": "from hpcai_cli import of_second", "of_second.py": ""}
    for name, text in texts.items():
        path = tmp_path / "hpcai_cli" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(hpcai_cli, "__file__", str(tmp_path / "hpcai_cli/__init__.py"))
    monkeypatch.setattr(bundle_sources, "OPENERS", {"one": "hpcai_cli.room.first", "two": "hpcai_cli.room.second"})


@pytest.mark.parametrize(("kind", "own"), [("one", {"room/first.py"}), ("two", {"room/second.py", "of_second.py"})])
def test_imports_are_followed_wherever_they_stand(house, kind, own):
    shared = {"__init__.py", "start.py", "top.py", "page.html", "room/__init__.py", "room/inner.py", "room/deep.py"}
    assert set(sources("hpcai_cli.start", kind)) == {f"hpcai_cli/{name}" for name in shared | own}
