"""The rules of the house, read from the sources: who imports whom, and what nobody calls."""

import ast
import importlib
import itertools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "beit_jax").rglob("*.py"))
SOURCES = [ROOT / "main.py", *PACKAGE, *sorted((ROOT / "configs").glob("*.py"))]
LEAVES = ["losses", "metrics", "steps", "models"]
CONFIGS = [p.stem for p in sorted((ROOT / "configs").glob("*.py")) if p.stem != "__init__"]


def parse(path):
    return ast.parse(path.read_text())


def imports(tree):
    """Names of the modules that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node):
    """`a.b.c` of such an expression, else ""."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def of_leaves():
    for path in PACKAGE:
        if path.relative_to(ROOT / "beit_jax").with_suffix("").parts[0] in LEAVES:
            yield pytest.param(path, id=str(path.relative_to(ROOT)))


@pytest.mark.parametrize("path", of_leaves())
def test_leaves_import_nothing_of_ours(path):
    ours = {name for name in imports(parse(path)) if name.startswith("beit_jax")}
    assert all(name.startswith("beit_jax.models") for name in ours), ours
    assert not ours or "models" in path.parts


def test_flags_are_parsed_in_main_alone():
    users = {path.name for path in SOURCES if "absl.flags" in set(imports(parse(path)))}
    assert users == {"main.py"}


def test_configs_import_configs_alone():
    allowed = ("configs", "ml_collections", "os")
    for path in (ROOT / "configs").glob("*.py"):
        assert all(name.startswith(allowed) for name in imports(parse(path))), path


def test_training_imports_no_other_framework():
    code = (
        "import beit_jax.train, sys; "
        "print([m for m in ('tensorflow', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in SOURCES])
def test_nothing_unsafe_is_called(path):
    tree = parse(path)
    private = [n for n in imports(tree) if n.startswith(("jax._src", "jax.core"))]
    assert not private
    for node in ast.walk(tree):
        assert not dotted(node).startswith(("jax._src", "jax.core"))
        if not isinstance(node, ast.Call):
            continue
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert dotted(node.func) not in ("pickle.load", "pickle.loads", "eval", "exec")
        assert options.get("allow_pickle") != "True"
        if dotted(node.func) == "torch.load":
            assert options.get("weights_only") == "True"


def keys(config, prefix=""):
    for key in config:
        value = config.get_ref(key).get() if hasattr(config, "get_ref") else config[key]
        if hasattr(value, "keys"):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key
