"""What the code must not do, looked for in its syntax: unpickle, evaluate, start shells, run a model folder's code."""

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flow_runs import ROOT

FOLDERS = ("alignment", "models", "flows", "infra", "triton_repo", "metaflow_extensions", "benchmarks")
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
ARCHIVES = {"tarfile", "zipfile"}
LOADERS = ("from_pretrained", "from_config")
"""Methods of transformers' Auto classes, which run a folder's own code where they are not told otherwise."""


@functools.cache
def sources() -> dict[Path, ast.Module]:
    """The syntax of every source, by its path in the repository."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 150
    return {path.relative_to(ROOT): ast.parse(path.read_text()) for path in paths}


def name_of(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute, "" of anything else."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def keywords(call: ast.Call) -> dict[str, object]:
    return {word.arg: getattr(word.value, "value", None) for word in call.keywords if word.arg}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    yield from ((name_of(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def imported(tree: ast.AST) -> set[str]:
    """First parts of the names of all modules that are imported, wherever."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def unpickles(tree: ast.AST) -> Iterator[str]:
    yield from imported(tree) & UNPICKLERS
    for name, call in calls(tree):
        if name == "torch.load" and keywords(call).get("weights_only") is not True:
            yield "torch.load without weights_only=True"
        if name.endswith("np.load") or keywords(call).get("allow_pickle"):
            yield name


def evaluates(tree: ast.AST) -> Iterator[str]:
    yield from (name for name, _ in calls(tree) if name in ("eval", "exec", "compile", "__import__"))


def reads_unsafe_yaml(tree: ast.AST) -> Iterator[str]:
    loaders = {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.full_load_all", "yaml.unsafe_load_all"}
    yield from (name for name, _ in calls(tree) if name in loaders)
    safe = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "yaml.SafeLoader" in map(name_of, node.bases)
    }
    for name, call in calls(tree):
        if name == "yaml.load" and not (len(call.args) == 2 and name_of(call.args[1]) in {*safe, "yaml.SafeLoader"}):
            yield "yaml.load without a SafeLoader"


def starts_a_shell(tree: ast.AST) -> Iterator[str]:
    for name, call in calls(tree):
        if name in ("os.system", "os.popen", "subprocess.getoutput") or keywords(call).get("shell"):
            yield name


def unpacks_archives(tree: ast.AST) -> Iterator[str]:
    yield from imported(tree) & ARCHIVES
    yield from (name for name, _ in calls(tree) if name == "shutil.unpack_archive")


def runs_a_models_code(tree: ast.AST) -> Iterator[str]:
    """Auto classes that are not told trust_remote_code=False; GenerationConfig's has no such code to run."""
    for name, call in calls(tree):
        words = keywords(call)
        told = words.get("trust_remote_code") is False or any(word.arg is None for word in call.keywords)
        owner = name.split(".")[0]
        if name.endswith(LOADERS) and owner.startswith("Auto") and not told:
            yield name
        if words.get("trust_remote_code"):
            yield f"{name}(trust_remote_code=True)"


@pytest.mark.parametrize(
    "fault", [unpickles, evaluates, reads_unsafe_yaml, starts_a_shell, unpacks_archives, runs_a_models_code]
)
def test_no_source_does_it(fault: Callable[[ast.AST], Iterator[str]]) -> None:
    # Benchmarks load the models that come with packages.
    left_out = "benchmarks" if fault is runs_a_models_code else ""
    found = {str(path): list(fault(tree)) for path, tree in sources().items() if path.parts[0] != left_out}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (unpickles, "def f():\n    from pickle import loads"),
        (unpickles, "import torch\ntorch.load('a', weights_only=False)"),
        (unpickles, "numpy.array([], allow_pickle=True)"),
        (evaluates, "x = eval('1')"),
        (reads_unsafe_yaml, "yaml.load(text, yaml.Loader)"),
        (reads_unsafe_yaml, "yaml.load(text)"),
        (starts_a_shell, "subprocess.run('ls', shell=True)"),
        (unpacks_archives, "import tarfile"),
        (runs_a_models_code, "AutoModel.from_pretrained(folder)"),
        (runs_a_models_code, "model(trust_remote_code=True)"),
    ],
)
def test_the_search_finds_it(fault: Callable[[ast.AST], Iterator[str]], text: str) -> None:
    assert list(fault(ast.parse(text)))
