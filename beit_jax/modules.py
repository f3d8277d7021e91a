"""Import by name: a name in a config is the name of a file."""

import importlib
import pkgutil
from types import ModuleType


def load(package: str, name: str) -> ModuleType:
    """The module `beit_jax.{package}.{name}`; an unknown name is an error listing the known."""
    parent = importlib.import_module(f"beit_jax.{package}")
    names = [module.name for module in pkgutil.iter_modules(parent.__path__)]
    names = sorted(set(names) - set(parent.SHARED))
    if name not in names:
        raise ValueError(f"Unknown name {name!r} in {package}; available: {', '.join(names)}.")
    return importlib.import_module(f"beit_jax.{package}.{name}")
