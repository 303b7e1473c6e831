"""Finds recipes: built-in files, a path given by the user, installed entry points."""

import contextlib
import difflib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from hpcai_cli.errors import MissingError, UsageError
from hpcai_cli.recipe import Recipe

ENTRY_POINTS = "hpcai.recipes"
"""Entry point group under which an installed package offers recipe modules."""

FUNCTIONS = {
    "load": "load(source: pathlib.Path, recipe) -> the raw files' arrays by split",
    "build_model": "build_model(recipe) -> keras.Model",
}
"""What a recipe module must define, unless it names another recipe's dataset, which then loads."""


@dataclass(frozen=True)
class CatalogEntry:
    """A recipe with the module that defines its functions."""

    recipe: Recipe
    module: ModuleType
    reference: str
    """What finds this recipe again: its name, or the absolute path of the user's file."""

    @property
    def path(self) -> Path:
        """The recipe's source file."""
        return Path(self.module.__file__)

    def function(self, name: str) -> Callable | None:
        """Return a function of the recipe's module, None where it has none of that name."""
        return getattr(self.module, name, None)

    def data_source(self) -> "CatalogEntry":
        """Return the recipe whose data this one reads: itself, or the one that `dataset` names."""
        return find(self.recipe.dataset) if self.recipe.dataset else self


def find(reference: str) -> CatalogEntry:
    """Load a recipe by name or by path.

    Raises:
        UsageError: there is none, or its module breaks the contract; all breaches are listed at once.
    """
    if reference.endswith(".py") or "/" in reference:
        return _from_path(Path(reference))
    name = reference.replace("_", "-")
    if name in _built_in():
        module = _import(lambda: importlib.import_module(f"hpcai_cli.recipes.{name.replace('-', '_')}"), name)
        return _entry(module, name, name)
    for point in _entry_points():
        if point.name.replace("_", "-") == name:
            return _entry(_import(point.load, name), name, name)
    near = difflib.get_close_matches(name, names(), n=1)
    if near:
        mend = f"did you mean `{near[0]}`?"
    elif Path(f"{reference}.py").exists():
        mend = f"for the file beside you write `./{reference}.py`"
    else:
        mend = "run `hpcai recipes list` for all of them"
    raise UsageError("no such recipe", expected=f"one of {', '.join(names())}, or the path of a recipe file",
                     mend=mend, received=reference)


def names() -> list[str]:
    """Return the names of all recipes that can be found without a path."""
    return sorted({*_built_in(), *(point.name.replace("_", "-") for point in _entry_points())})


def _built_in() -> list[str]:
    import hpcai_cli.recipes

    return [module.name.replace("_", "-") for module in pkgutil.iter_modules(hpcai_cli.recipes.__path__)]


def _entry_points():
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINTS)


def _from_path(path: Path) -> CatalogEntry:
    if not path.is_file():
        raise UsageError("no such recipe file", expected="a Python file or a name from `hpcai recipes list`",
                         received=str(path))
    name = path.stem.replace("_", "-")
    # A module name of its own keeps a user's mnist.py apart from the built-in one.
    spec = importlib.util.spec_from_file_location(f"hpcai_user_recipe_{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise UsageError("not a Python file", expected="a recipe file that ends in .py", received=str(path))
    module = importlib.util.module_from_spec(spec)

    def execute() -> ModuleType:
        # The user's recipe may import files that lie beside it.
        with _on_path(path.resolve().parent):
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        return module

    return _entry(_import(execute, str(path)), name, str(path.resolve()))


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        # Its functions import later, by the contract; at the end of the path the folder shadows nothing then.
        sys.path.remove(str(folder))
        sys.path.append(str(folder))


def _import(load: Callable[[], ModuleType], name: str) -> ModuleType:
    try:
        return load()
    except UsageError as error:
        raise UsageError(f"recipe {name} is not valid: {error}") from None
    except ModuleNotFoundError as error:
        raise MissingError(f"recipe {name} imports a package that is not installed",
                           mend=f"run `pip install {error.name}`", received=str(error)) from None
    except (Exception, SystemExit) as error:
        line = _line_of(error)
        raise UsageError(f"recipe {name} does not import{line}", expected="a Python module without side effects",
                         received=f"{type(error).__name__}: {error}") from error


def _line_of(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f" (line {error.lineno})"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})" if trace else ""


def _entry(module: ModuleType, name: str, reference: str) -> CatalogEntry:
    recipe = getattr(module, "recipe", None)
    problems = []
    if not isinstance(recipe, Recipe):
        problems.append("it has no `recipe = Recipe(...)`")
    elif recipe.name != name:
        problems.append(f"its name is {recipe.name!r} where its file says {name!r}")
    if not (module.__doc__ or "").strip():
        problems.append("it has no docstring")
    for function, signature in FUNCTIONS.items():
        borrowed = function == "load" and isinstance(recipe, Recipe) and recipe.dataset
        if not callable(getattr(module, function, None)) and not borrowed:
            problems.append(f"it lacks the function {signature}")
    if problems:
        raise UsageError(f"recipe {name} is not complete: {'; '.join(problems)}",
                         mend="run `hpcai recipes copy mnist FILE.py` for a complete one to start from",
                         received=str(getattr(module, "__file__", module)))
    return CatalogEntry(recipe, module, reference)
