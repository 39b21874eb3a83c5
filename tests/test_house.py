"""The house rules, as tests.

A rule is a function from one parsed module to its offences, listed in RULES with a snippet that breaks it. Each rule is
tried on its snippet first, so that none can pass because it sees nothing, and then on every module of the house.
"""

import ast
import fnmatch
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("data_pipelines", "vlp", "server")
ABOVE = {"data_pipelines": ("vlp", "server", "tests"), "vlp": ("server", "tests"), "server": ("tests",)}

MAX_FUNCTION = 60
MAX_MODULE = 400
TORCH_LOAD = "vlp/models/weights.py"
"""The one module that may call torch.load: it reads checkpoints of open_clip and timm, with weights_only=True."""
IMPORT_TIME_CALLS = ("ensure_torchvision()",)
"""The one call that must happen at import: it makes the imports below it possible."""
TOP_LEVEL = {
    *FLOORS, "docker", "tests", ".ci", ".git", ".gitignore", ".dockerignore",
    "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile",
}  # fmt: skip
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@dataclass(frozen=True)
class Module:
    """One source file: its path from the root, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        """Every call with the dotted name of what is called; the last part alone when it hangs on an expression."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield dotted(node.func), node

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of all that is imported anywhere in the file, names of `from` imports included."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.lineno, f"{node.module or ''}.{alias.name}") for alias in node.names)


def dotted(node: ast.expr) -> str:
    """`a.b.c` for nested attributes; an unnamed base is left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def parse(path: str, text: str) -> Module:
    """A Module from source text."""
    return Module(path, text, ast.parse(text, filename=path))


@cache
def house() -> tuple[Module, ...]:
    """Every Python file of the three floors and the tests."""
    files = [path for top in (*FLOORS, "tests") for path in sorted((ROOT / top).rglob("*.py"))]
    return tuple(parse(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in files)


def floor_of(path: str) -> str:
    """The top folder of a path."""
    return path.partition("/")[0]


# -- the rules ---------------------------------------------------------------------------------------------------------


def no_upward_import(module: Module) -> Iterator[str]:
    """A floor imports only itself and what is below it; nothing ships that imports the tests."""
    for line, name in module.imports():
        if name.split(".")[0] in ABOVE.get(floor_of(module.path), ()):
            yield f"{line}: imports {name}"


def no_relative_import(module: Module) -> Iterator[str]:
    """One way to name a module, so that every import can be searched for."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{node.lineno}: relative import"


def one_distributed_module(module: Module) -> Iterator[str]:
    """torch.distributed is used in one shipped module; everything else asks that one."""
    if module.path == "vlp/distributed.py" or floor_of(module.path) == "tests":
        return
    for line, name in module.imports():
        if name.startswith("torch.distributed"):
            yield f"{line}: imports {name}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and dotted(node) == "torch.distributed":
            yield f"{node.lineno}: uses torch.distributed"


def no_print(module: Module) -> Iterator[str]:
    """Only command lines print; everything else returns, raises or logs."""
    if module.path.endswith("/cli.py"):
        return
    for name, call in module.calls():
        if name == "print" and floor_of(module.path) != "tests":
            yield f"{call.lineno}: print()"


def no_code_from_data(module: Module) -> Iterator[str]:
    """Nothing read from a file or a socket is ever executed."""
    for line, name in module.imports():
        if name.split(".")[0] in PICKLES:
            yield f"{line}: imports {name}"
    for name, call in module.calls():
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        pinned = module.path == TORCH_LOAD and words.get("weights_only") == "True"
        if name in {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}:
            yield f"{call.lineno}: {name}()"
        elif name == "torch.load" and not pinned:
            yield f"{call.lineno}: torch.load()"
        elif words.get("allow_pickle") == "True" or words.get("shell") == "True":
            yield f"{call.lineno}: {ast.unparse(call)}"


def no_tar_extraction(module: Module) -> Iterator[str]:
    """Archives are read member by member; extraction trusts names written by strangers."""
    for name, call in module.calls():
        if name.rpartition(".")[2] == "extractall" or name in {"shutil.unpack_archive", "tar.extract"}:
            yield f"{call.lineno}: {name}()"


def no_reader_threads(module: Module) -> Iterator[str]:
    """Parquet is read through data_pipelines.parquet: threads of pyarrow's readers may abort a process at its exit."""
    if floor_of(module.path) != "tests" and module.path != "data_pipelines/parquet.py":
        for name, call in module.calls():
            if name.rpartition(".")[2] in {
                "ParquetFile",
                "ParquetDataset",
                "read_table",
                "read_pandas",
                "read_parquet",
            }:
                yield f"{call.lineno}: {name}()"


def short_functions(module: Module) -> Iterator[str]:
    """A function fits on a screen."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}"


def short_modules(module: Module) -> Iterator[str]:
    """A module fits in a head."""
    length = module.text.count("\n")
    if length > MAX_MODULE:
        yield f"1: {length} lines, at most {MAX_MODULE}"


def nothing_legacy(module: Module) -> Iterator[str]:
    """What is replaced is deleted."""
    for node in ast.walk(module.tree):
        name = getattr(node, "name", None) or getattr(node, "id", None)
        if isinstance(name, str) and re.match(r"_?(legacy|old|deprecated)_", name.lower()):
            yield f"{getattr(node, 'lineno', 1)}: {name}"


def only_definitions_at_import(module: Module) -> Iterator[str]:
    """Importing a module defines things and does nothing else; `python -m` is no import."""
    if module.path.endswith("/__main__.py"):
        return
    for node in module.tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        allowed = isinstance(node, ast.Expr) and ast.unparse(node) in IMPORT_TIME_CALLS
        loops = isinstance(node, ast.For | ast.While | ast.With | ast.AsyncFor | ast.AsyncWith | ast.Delete)
        if loops or (isinstance(node, ast.Expr) and not docstring and not allowed):
            yield f"{node.lineno}: {ast.unparse(node).splitlines()[0]}"


def no_metaclass(module: Module) -> Iterator[str]:
    """No framework in the framework."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and any(word.arg == "metaclass" for word in node.keywords):
            yield f"{node.lineno}: {node.name} has a metaclass"


Check = Callable[[Module], Iterator[str]]


@dataclass(frozen=True)
class Rule:
    """A check, a file name it applies to, and text that breaks it there."""

    check: Check
    crime: str
    path: str = "vlp/crime.py"


RULES = (
    Rule(no_upward_import, "def f():\n    from vlp.recipe import Recipe", "data_pipelines/crime.py"),
    Rule(no_upward_import, "import server.app"),
    Rule(no_relative_import, "from . import recipe"),
    Rule(one_distributed_module, "import torch.distributed as dist"),
    Rule(one_distributed_module, "from torch import distributed"),
    Rule(one_distributed_module, "def f():\n    torch.distributed.barrier()"),
    Rule(no_print, "def f():\n    print(1)", "server/crime.py"),
    Rule(no_code_from_data, "import pickle"),
    Rule(no_code_from_data, "def f(p):\n    return torch.load(p)", TORCH_LOAD),
    Rule(no_code_from_data, "def f(p):\n    return torch.load(p, weights_only=True)"),
    Rule(no_code_from_data, "def f(t):\n    return eval(t)"),
    Rule(no_code_from_data, "def f(t):\n    exec(t)"),
    Rule(no_code_from_data, "def f(p):\n    return np.load(p, allow_pickle=True)"),
    Rule(no_code_from_data, "def f(t):\n    subprocess.run(t, shell=True)"),
    Rule(no_tar_extraction, "def f(tar):\n    tarfile.open(tar).extractall('.')"),
    Rule(no_reader_threads, "def f(p):\n    return pq.read_table(p)"),
    Rule(short_functions, "def f():\n" + "    x = 1\n" * MAX_FUNCTION),
    Rule(short_modules, "x = 1\n" * (MAX_MODULE + 1)),
    Rule(nothing_legacy, "def legacy_load(): ..."),
    Rule(only_definitions_at_import, "for x in []:\n    pass"),
    Rule(only_definitions_at_import, "configure()"),
    Rule(no_metaclass, "class A(metaclass=type): ..."),
)


@pytest.mark.parametrize("rule", RULES, ids=[f"{rule.check.__name__}-{n}" for n, rule in enumerate(RULES)])
def test_every_rule_sees_its_crime(rule: Rule) -> None:
    assert list(rule.check(parse(rule.path, rule.crime)))


CHECKS = {rule.check.__name__: rule.check for rule in RULES}


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_the_house_keeps_the_rule(name: str) -> None:
    check = CHECKS[name]
    offences = [f"{module.path}:{offence}" for module in house() for offence in check(module)]
    assert not offences, f"{check.__doc__}\n" + "\n".join(offences)


def test_the_rules_look_at_real_code() -> None:
    counts = {top: sum(floor_of(module.path) == top for module in house()) for top in (*FLOORS, "tests")}
    assert min(counts.values()) >= 3, f"too few modules were found for the rules to mean anything: {counts}"
    assert any(module.path == TORCH_LOAD for module in house()), f"{TORCH_LOAD} is gone: drop its exception too"


# -- rules about more than one module ----------------------------------------------------------------------------------


def own_bases() -> dict[str, set[str]]:
    """Class name -> names of its bases, for every class the three floors define; `click.Group` is not our `Group`."""
    found: dict[str, set[str]] = {}
    for module in house():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and floor_of(module.path) != "tests":
                found.setdefault(node.name, set()).update(ast.unparse(base).partition("[")[0] for base in node.bases)
    return found


def test_inheritance_is_at_most_one_step_deep() -> None:
    bases = own_bases()
    assert bases, "no class was found"
    deep = {
        f"{name} -> {base} -> {grand}"
        for name, named in bases.items()
        for base in named & bases.keys()
        for grand in bases[base] & bases.keys()
    }
    assert not deep, f"compose instead of inheriting twice: {sorted(deep)}"


def test_no_init_in_tests_and_no_file_that_hijacks_an_import() -> None:
    files = [path for top in (*FLOORS, "tests") for path in (ROOT / top).rglob("*.py")]
    assert files
    inits = [path for path in files if path.name == "__init__.py" and path.relative_to(ROOT).parts[0] == "tests"]
    assert not inits, "tests/server/__init__.py would shadow the package `server`"
    assert not [path for path in files if path.name in {"server.py", "tests.py"}], "a script beside it imports it"


def test_top_level_holds_only_what_the_readme_shows() -> None:
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] != "#"]
    names = {path.name for path in ROOT.iterdir()}
    assert {"pyproject.toml", "Makefile", *FLOORS} <= names
    strays = {n for n in names - TOP_LEVEL if not any(fnmatch.fnmatch(n, pattern) for pattern in ignored)}
    assert not strays, f"not part of the layout: {sorted(strays)}"


def test_ruff_is_trusted_with_the_rest() -> None:
    """Public docstrings, broad excepts and prints are ruff's to find: they must stay switched on."""
    tomllib: Any = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert {"D1", "BLE", "T20", "S301", "S102", "S506"} <= set(lint["select"])
    assert not {"D1", "D100", "D101", "D102", "D103", "BLE", "BLE001", "T20", "T201"} & set(lint["ignore"])
    may_print = [pattern for pattern, codes in lint["per-file-ignores"].items() if "T20" in codes]
    assert may_print == ["**/cli.py"]


def test_ci_and_help_say_what_make_does() -> None:
    """CI runs what a developer runs, and `make help` shows every target."""
    script = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert script == ["set -eu", 'cd "$(dirname "$0")/.."', "make test"]
    lines = (ROOT / "Makefile").read_text().splitlines()
    (targets,) = [line.partition(":")[2].split() for line in lines if line.startswith(".PHONY:")]
    explained = {line.partition(":")[0] for line in lines if re.match(r"[a-z-]+:.*## \w", line)}
    assert {"help", "setup", "demo", "test"} <= explained == set(targets)


def test_every_objective_is_one_file_and_has_a_recipe() -> None:
    """The parts of the contract; what they must do is tested with the objectives."""
    from vlp.recipe import load_recipe, recipe_names

    names = {path.stem for path in (ROOT / "vlp/objectives").glob("[!_]*.py")} - {"base"}
    assert "clip" in names
    used = {load_recipe(recipe).objective["name"] for recipe in recipe_names()}
    assert names - used == set(), "no recipe uses them"
    for name in sorted(names):
        module = importlib.import_module(f"vlp.objectives.{name}")
        lacking = [part for part in ("NEEDS", "Config", "COUPLING", "build") if not hasattr(module, part)]
        assert not lacking, f"vlp/objectives/{name}.py lacks {lacking}"
        assert module.COUPLING in {"global", "local", "stateful"}
