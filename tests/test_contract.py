"""The contracts that every command and every recipe keeps; a new one is found here by itself."""

import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from hpcai_cli import catalog
from hpcai_cli.main import app

ROOT = Path(__file__).parents[1]
HPCAI = Path(sys.executable).parent / "hpcai"
MODULES = sorted(path.stem for path in (ROOT / "commands").glob("*.py") if path.stem != "__init__")
BUILT_IN = sorted(path.stem.replace("_", "-") for path in (ROOT / "recipes").glob("*.py") if path.stem != "__init__")
HEAVY = ("tensorflow", "keras", "numpy", "h5py", "horovod", "sklearn", "pandas", "matplotlib", "PIL",
         "hpcai_cli.engine", "hpcai_cli.recipes.")
TREE = typer.main.get_command(app)


def leaves(group, words: tuple[str, ...] = ()) -> list:
    """Return all commands of the tree with the words that call them."""
    found = []
    for name, command in group.commands.items():
        below = leaves(command, (*words, name)) if hasattr(command, "commands") else [((*words, name), command)]
        found += below
    return found


COMMANDS = leaves(TREE)


def command_ids(case) -> str | None:
    return " ".join(case) if isinstance(case, tuple) else None


def lines_of(docstring: str) -> list[str]:
    """Return the command lines that a docstring shows, after `$` or after `Next:`, or after four spaces in a recipe."""
    return re.findall(r"^ *(?:\$|Next:) +(.*)$", docstring, re.M) or re.findall(r"^    (hpcai .*)$", docstring, re.M)


EXAMPLES = [line for _, command in COMMANDS for line in lines_of(inspect.getdoc(command.callback))]
EXAMPLES += [line for name in BUILT_IN for line in lines_of(catalog.find(name).module.__doc__)]


def parse(line: str) -> None:
    """Parse one command line with the real commands, and invoke nothing."""
    words = shlex.split(re.search(r"(?:^|\s)hpcai (.*)", line)[1], comments=True)
    words = words[:next((place for place, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))]
    command, context = TREE, None
    while hasattr(command, "commands"):
        context = command.make_context(command.name or "hpcai", list(words[:1]), parent=context)
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words), parent=context)


# ---- Commands ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODULES)
def test_a_command_file_has_one_public_function_or_group_of_its_name(name):
    module = importlib.import_module(f"hpcai_cli.commands.{name}")
    public = getattr(module, name)
    functions = {value for key, value in vars(module).items()
                 if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")}
    if isinstance(public, typer.Typer):
        assert functions == {inspect.unwrap(command.callback) for command in public.registered_commands}
    else:
        assert functions == {public}
    # A group may have a second file, GROUP_PART.py.
    verb = name.split("_")[0]
    assert re.match(rf"hpcai {verb}.*: .*\.\Z", module.__doc__.strip()), "one line, its job"
    assert verb in TREE.commands, "registered in main.py"


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=command_ids)
def test_a_command_says_what_it_does_and_shows_examples(words, command):
    docstring = inspect.getdoc(command.callback)
    assert re.match(r"[A-Z].*\.$", docstring.splitlines()[0]), "one sentence first"
    assert re.search(r"^Examples:\n(    \$ .*\n?)+", docstring, re.M)
    shown = re.findall(r"^ +\$ (.*)$", docstring, re.M)
    assert all(f"hpcai {' '.join(words)}" in line for line in shown)


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_parses(line):
    parse(line)


@pytest.mark.parametrize("line", ["hpcai train --bogus", "hpcai frobnicate", "hpcai train mnist --epochs many"])
def test_an_example_that_rots_does_not(line):
    with pytest.raises(Exception, match="No such option|no command|Input should|not a valid"):
        parse(line)


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=command_ids)
def test_every_option_and_argument_has_a_help_text(words, command):
    for parameter in command.params:
        assert parameter.help and parameter.help.strip().endswith((".", ")")), parameter.name


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=command_ids)
def test_the_help_of_a_command_is_shown(words, command, hpcai):
    done = hpcai(*words, "--help")
    assert done.exit_code == 0
    assert "Usage: hpcai " + " ".join(words) in done.stdout and "Examples" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("words", [(), ("train",), ("recipes",), ("recipes", "list")], ids=command_ids)
def test_help_loads_no_framework(words):
    done = subprocess.run([sys.executable, "-X", "importtime", HPCAI, *words, "--help"], capture_output=True, text=True,
                          timeout=60, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hpcai_cli.main" in loaded
    assert not [name for name in loaded if name.startswith(HEAVY) or name.split(".")[0] in HEAVY]


@pytest.mark.parametrize(("typed", "offered"), [
    ("hpcai pre", {"predict", "preprocess"}), ("hpcai recipes va", {"validate"}), ("hpcai train --ep", {"--epochs"})])
def test_the_shell_completes(typed, offered):
    script = ('source <(_HPCAI_COMPLETE=source_bash hpcai); COMP_WORDS=($TYPED); COMP_CWORD=$((${#COMP_WORDS[@]} - 1));'
              '_hpcai_completion hpcai; printf "%s\\n" "${COMPREPLY[@]}"')
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True,
                          env={**os.environ, "PATH": f"{HPCAI.parent}:{os.environ['PATH']}", "TYPED": typed})
    assert set(done.stdout.split()) >= offered
    assert all(word.startswith(typed.split()[-1]) for word in done.stdout.split())


# ---- Recipes -------------------------------------------------------------------------------------------------------

def test_every_recipe_file_is_found():
    assert set(BUILT_IN) <= set(catalog.names())


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_recipe_says_data_model_and_command(name):
    docstring = catalog.find(name).module.__doc__
    assert re.match(r"[A-Z].*\.$", docstring.strip().splitlines()[0])
    for part in (r"^Data: ", r"^Model: ", r"^Commands?:$", rf"^    hpcai train {name}\b"):
        assert re.search(part, docstring, re.M), part


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_recipe_is_shown_as_it_is(name, hpcai):
    done = hpcai("recipes", "show", name, "--json")
    document = json.loads(done.stdout)
    assert document["recipe"] == catalog.find(name).recipe.to_json()
    assert Path(document["file"]).samefile(ROOT / "recipes" / f"{name.replace('-', '_')}.py")


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_recipe_and_a_copy_of_it_are_valid(name, hpcai):
    assert hpcai("recipes", "copy", name, "own_copy.py").exit_code == 0
    for reference in (name, "./own_copy.py"):
        done = hpcai("recipes", "validate", reference, "--json")
        assert (done.exit_code, done.stderr) == (0, "")
        document = json.loads(done.stdout)
        assert document["recipe"] == ("own-copy" if reference.endswith(".py") else name)
        assert document["metrics"]["parameters"] > 0
        assert document["metrics"]["sample_examples"] > 0, "a sample that works offline"
