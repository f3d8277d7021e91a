"""A table of names, read in both directions.

A `Rule` pairs one array of a checkpoint with the parameters it holds, and its `Op` changes the
layout there and back. A model has one table (`convert/beit.py`); reading and writing are the two
functions below, so import and export cannot drift apart.

Paths of ours are flat here: "layer_0/attention/query/kernel".
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np


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
    """Writes a table out: one rule per layer for `{i}`, other fields of a source from `fields`."""
    return [
        Rule(rule.source.format(i=i, **fields), tuple(t.format(i=i) for t in rule.targets), rule.op)
        for rule in rules
        for i in (range(num_layers) if "{i}" in rule.source else [None])
    ]


def renamed(rules: Iterable[Rule], names: Mapping[str, str]) -> list[Rule]:
    """The rules of a checkpoint that has other names: parts of sources, old -> new, in order."""
    changed = []
    for rule in rules:
        source = rule.source
        for old, new in names.items():
            source = source.replace(old, new)
        changed.append(rule._replace(source=source))
    return changed


def is_covered(name: str, parts: Iterable[str]) -> bool:
    """True where `name` is one of `parts` or lies under one: "head" covers "head.bias"."""
    parts = (parts,) if isinstance(parts, str) else parts
    return any(name == part or name.startswith((f"{part}/", f"{part}.")) for part in parts)


def to_params(
    tensors: Mapping[str, np.ndarray],
    rules: Iterable[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    drop: Iterable[str] = (),
    reset: Iterable[str] = (),
    label: str = "the checkpoint",
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Reads a checkpoint: every array used once, every parameter filled, in its exact shape.

    Args:
      tensors: name in the checkpoint -> float32 array.
      rules: an expanded table.
      shapes: our path -> shape of every parameter that the model has.
      drop: what to leave out of the checkpoint; names or leading parts of names, its or ours.
      reset: parameters of ours not to fill; paths or leading parts of paths.
      label: what to call the checkpoint in messages.

    Returns:
      our path -> array, and the paths left unfilled because `reset` names them.

    Raises:
      ValueError: listing every array that is unexpected, missing, or of the wrong shape or dtype,
        or not finite.
    """
    rules = list(rules)
    unfilled = tuple(path for path in shapes if is_covered(path, reset))
    problems = _unexpected(tensors, rules, shapes, drop) + _unreachable(rules, shapes, unfilled)
    params = {}
    for rule in rules:
        wanted = [path for path in rule.targets if path in shapes and path not in unfilled]
        if not wanted:
            continue
        if problem := _problem(rule, tensors.get(rule.source), shapes):
            problems.append(problem)
            continue
        arrays = dict(zip(rule.targets, rule.op.forward(tensors[rule.source]), strict=True))
        params.update({path: np.ascontiguousarray(arrays[path]) for path in wanted})
    if problems:
        raise ValueError(_report(problems, label))
    return params, unfilled


def to_tensors(
    params: Mapping[str, np.ndarray],
    rules: Iterable[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    label: str = "params",
) -> dict[str, np.ndarray]:
    """Writes parameters under a checkpoint's names; the exact inverse of `to_params`.

    Raises:
      ValueError: the parameters are not those that `shapes` names, or not finite float32.
    """
    rules = [rule for rule in rules if any(path in shapes for path in rule.targets)]
    left, tensors = {path: np.asarray(value) for path, value in params.items()}, {}
    for rule in rules:
        if all(path in left for path in rule.targets):
            arrays = rule.op.inverse(*(left.pop(path) for path in rule.targets))
            tensors[rule.source] = np.ascontiguousarray(arrays)
    to_params(tensors | left, rules, shapes, label=label)
    return tensors


def _unexpected(tensors, rules, shapes, drop) -> list[tuple[str, str]]:
    used = {rule.source for rule in rules if any(path in shapes for path in rule.targets)}
    dropped = {r.source for r in rules if any(is_covered(path, drop) for path in r.targets)}
    return [
        ("unexpected", name)
        for name in tensors
        if name not in used and name not in dropped and not is_covered(name, drop)
    ]


def _unreachable(rules, shapes, unfilled) -> list[tuple[str, str]]:
    reachable = {path for rule in rules for path in rule.targets}.union(unfilled)
    return [("missing", f"{path} {list(shapes[path])}") for path in shapes if path not in reachable]


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
            "Take the checkpoint that matches; from Python, `convert.load` can `drop` and `reset`.",
        ]
    )
