"""The rules of the house, read from the sources: who imports whom, and what nobody calls."""

import ast
import functools
import importlib
import inspect
import itertools
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from beit_jax.steps import to_steps
from configs import common

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "beit_jax").rglob("*.py"))
SOURCES = [ROOT / "main.py", *PACKAGE, *sorted((ROOT / "configs").glob("*.py"))]
LEAVES = ["losses", "metrics", "steps", "models"]
CONFIGS = [p.stem for p in sorted((ROOT / "configs").glob("*.py")) if p.stem[0] != "_"]


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


@pytest.mark.parametrize("path", list(of_leaves()))
def test_leaves_import_nothing_of_ours(path):
    ours = {name for name in imports(parse(path)) if name.startswith("beit_jax")}
    assert all(name.startswith("beit_jax.models") for name in ours), ours
    assert not ours or "models" in path.parts


def test_flags_are_parsed_in_main_alone():
    users = {path.name for path in SOURCES if "absl.flags" in set(imports(parse(path)))}
    assert users == {"main.py"}


def test_configs_import_configs_alone():
    allowed = sys.stdlib_module_names | {"configs", "ml_collections"}
    for path in (ROOT / "configs").glob("*.py"):
        assert {name.split(".")[0] for name in imports(parse(path))} <= allowed, path


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
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@functools.cache
def names_read():
    """Attributes and text in the package, and the fields of its classes."""
    names = set()
    for node in itertools.chain.from_iterable(ast.walk(parse(path)) for path in PACKAGE):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Constant):
            names.add(node.value)
        elif isinstance(node, ast.AnnAssign):
            names.add(dotted(node.target))
    return names


@pytest.mark.parametrize("key", list(keys(common.get_config())))
def test_every_key_is_read(key):
    assert key.split(".")[-1] in names_read()


def of_configs():
    """Each config with no argument and with each argument that it has."""
    for name in CONFIGS:
        get_config = importlib.import_module(f"configs.{name}").get_config
        yield pytest.param(get_config, id=name)
        if not inspect.signature(get_config).parameters:
            continue
        try:
            get_config("?")
        except ValueError as error:
            for argument in str(error).rstrip(".").split("available: ")[1].split(", "):
                if argument != "none":
                    call = functools.partial(get_config, argument)
                    yield pytest.param(call, id=f"{name}:{argument}")


@pytest.mark.parametrize("get_config", list(of_configs()))
def test_configs_build(get_config):
    config = get_config()
    assert config.is_locked
    assert set(keys(config)) == set(keys(common.get_config()))
    durations = {key: config[key] for key in ("log_every", "eval_every", "save_every")}
    for name, duration in {**durations, "warmup": config.optim.warmup}.items():
        to_steps(duration, total_steps=1000, steps_per_epoch=10, batch_size=8, name=name)
