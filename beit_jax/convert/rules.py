"""A table of names, read in both directions.

A `Rule` pairs one array of a checkpoint with the parameters it holds, and its `Op` changes the
layout there and back. A model has one table (`convert/beit.py`); reading and writing are the two
functions below, so import and export cannot drift apart.

Paths of ours are flat here: "layer_0/attention/query/kernel".
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax import traverse_util

from beit_jax.convert import hf_config
from beit_jax.convert.hf_config import Tensors


class Op(NamedTuple):
    """A change of layout: one array of the checkpoint to our parameters, and its inverse."""

    forward: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    inverse: Callable[..., np.ndarray]


IDENTITY = Op(lambda x: (x,), lambda x: x)
LINEAR = Op(lambda x: (x.T,), lambda x: x.T)  # [out, in] <-> [in, out]
CONV = Op(lambda x: (x.transpose(2, 3, 1, 0),), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
FUSED_QKV = Op(  # [3 out, in] <-> three [in, out]
    lambda x: tuple(part.T for part in np.split(x, 3)),
    lambda *parts: np.concatenate([part.T for part in parts]),
)


class Rule(NamedTuple):
    """The array `source` of a checkpoint holds the parameters `targets`; `{i}` is a layer."""

    source: str
    targets: tuple[str, ...]
    op: Op = IDENTITY

    def filled(self, **fields: Any) -> "Rule":
        """The rule with fields such as `{i}` written out."""
        targets = tuple(target.format(**fields) for target in self.targets)
        return self._replace(source=self.source.format(**fields), targets=targets)


def array(source: str, target: str) -> list[Rule]:
    """The rule of an array that is kept as it is."""
    return [Rule(source, (target,))]


def linear(source: str, target: str, op: Op = LINEAR) -> list[Rule]:
    """The rules of an affine layer's weight and bias."""
    weight = Rule(f"{source}.weight", (f"{target}/kernel",), op)
    return [weight, Rule(f"{source}.bias", (f"{target}/bias",))]


def norm(source: str, target: str) -> list[Rule]:
    """The rules of a norm's weight and bias."""
    weight = Rule(f"{source}.weight", (f"{target}/scale",))
    return [weight, Rule(f"{source}.bias", (f"{target}/bias",))]


def expand(rules: Iterable[Rule], num_layers: int, **fields: str) -> list[Rule]:
    """Expands a table: a rule with `{i}` once per layer, other fields from `fields`."""
    return [
        rule.filled(i=i, **fields)
        for rule in rules
        for i in (range(num_layers) if "{i}" in rule.source else [None])
    ]


def renamed(rules: Iterable[Rule], names: Mapping[str, str]) -> list[Rule]:
    """The rules with parts of their sources replaced, old -> new, in order."""
    changed = []
    for rule in rules:
        source = rule.source
        for old, new in names.items():
            source = source.replace(old, new)
        changed.append(rule._replace(source=source))
    return changed


def to_params(
    tensors: Tensors,
    rules: Sequence[Rule],
    model: nn.Module,
    *,
    ignored: re.Pattern,
    optional: Collection[str] = (),
    label: str,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads a checkpoint: every array used once, every parameter filled, in its exact shape.

    Args:
      tensors: name in the checkpoint -> float32 array.
      rules: an expanded table.
      model: the network that the parameters are for.
      ignored: matches the names of arrays that the network has no use for.
      optional: paths of parameters that a checkpoint may lack, all of them together.
      label: what to call the checkpoint in messages.

    Returns:
      the nested parameters, and the optional paths that the checkpoint lacks.

    Raises:
      ValueError: listing every array that is unexpected, missing, or of the wrong shape or dtype,
        or not finite.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not ignored.fullmatch(name)}
    found = {path for rule in rules if rule.source in tensors for path in rule.targets}
    shapes, unfilled = _expected(model, optional, found)
    rules = _used(rules, shapes)
    _check(tensors, rules, shapes, label)
    params = {}
    for rule in rules:
        arrays = map(np.ascontiguousarray, rule.op.forward(tensors[rule.source]))
        params.update(zip(rule.targets, arrays, strict=True))
    return traverse_util.unflatten_dict(params, sep="/"), unfilled


def to_tensors(
    params: Mapping[str, Any],
    rules: Sequence[Rule],
    model: nn.Module,
    *,
    optional: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Writes nested parameters under a checkpoint's names; the exact inverse of `to_params`.

    Raises:
      ValueError: the parameters are not those of the model, or not finite float32.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    left, tensors = {path: np.asarray(value) for path, value in flat.items()}, {}
    shapes, _ = _expected(model, optional, left.keys())
    rules = _used(rules, shapes)
    for rule in rules:
        if all(path in left for path in rule.targets):
            arrays = rule.op.inverse(*(left.pop(path) for path in rule.targets))
            tensors[rule.source] = np.ascontiguousarray(arrays)
    _check(tensors | left, rules, shapes, "params")
    return tensors


def _expected(model, optional, found):
    """Path -> shape of the parameters to convert, and the paths that are left out: the optional
    ones, where none of them is found."""
    shapes = hf_config.parameter_shapes(model)
    absent = [path for path in shapes if path in optional] if found.isdisjoint(optional) else []
    return {path: shape for path, shape in shapes.items() if path not in absent}, tuple(absent)


def _used(rules, shapes) -> list[Rule]:
    return [rule for rule in rules if any(path in shapes for path in rule.targets)]


def _check(tensors, rules, shapes, label) -> None:
    """Raises ValueError, listing all problems, where tensors are not what the rules expect."""
    sources = {rule.source for rule in rules}
    reachable = {path for rule in rules for path in rule.targets}
    problems = [
        *(("unexpected", name) for name in tensors if name not in sources),
        *(("missing", f"{p} {list(shape)}") for p, shape in shapes.items() if p not in reachable),
        *filter(None, (_problem(rule, tensors.get(rule.source), shapes) for rule in rules)),
    ]
    if problems:
        raise ValueError(_report(problems, label))


def _problem(rule, tensor, shapes) -> tuple[str, str] | None:
    blanks = [np.broadcast_to(np.float32(0), shapes[path]) for path in rule.targets]
    shape = rule.op.inverse(*blanks).shape
    if tensor is None:
        return "missing", f"{rule.source} {list(shape)}"
    if tensor.shape != shape:
        return "wrong shape", f"{rule.source} {list(tensor.shape)}, expected {list(shape)}"
    if tensor.dtype != np.float32:
        return "wrong dtype", f"{rule.source} {tensor.dtype}, expected float32"
    if not np.isfinite(tensor).all():
        return "not finite", rule.source
    return None


def _report(problems: list[tuple[str, str]], label: str) -> str:
    kinds = dict.fromkeys(kind for kind, _ in problems)
    lines = [f"  {kind}: " + "; ".join(t for k, t in problems if k == kind) for kind in kinds]
    return "\n".join(
        [
            f"{label} does not fit the architecture in {len(problems)} place(s):",
            *lines,
            "Take the checkpoint that matches.",
        ]
    )
