"""Schedules, optimizers, weight averaging and gradient accumulation.

BEiT's parameter groups (layer-wise learning rate decay, no weight decay on biases and norms) as
in microsoft/unilm `beit/optim_factory.py`; the update rules equal torch's, which its recipes are
written for. Patterns are regular expressions that match a whole parameter name, such as
"layer_0/attention/query/kernel" (see `path_name`).
"""

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from beit_jax import errors

CLASSIFIERS = "(distillation_)?classifier/.*"  # parameters of the heads, as a pattern
TOGETHER = 64  # arrays, which a kernel of a GPU can be given
SMALL = 2**16  # numbers, which a GPU updates in less time than it takes to start a kernel
_NO_DECAY = {
    "bias",
    "scale",
    "register_tokens",
    "lambda_1",
    "lambda_2",
    "cls_token",
    "distillation_token",
    "position_embeddings",
}
_POSITION_BIAS = re.compile(r"relative_position_bias_table$|continuous_position_bias_mlp/")


def _half_cosine(progress):
    return 0.5 * (1 + jnp.cos(jnp.pi * progress))


_CURVES = {  # share of the way from end_value back to the peak, by progress in [0, 1]
    "constant": jnp.ones_like,
    "linear": lambda progress: 1 - progress,
    "cosine": _half_cosine,
    "step-cosine": _half_cosine,
}


def path_name(path) -> str:
    """Joins a `jax.tree_util` key path: "layer_0/attention/query/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def make_schedule(
    name: str,
    *,
    learning_rate: float,
    total_steps: int,
    end_value: float = 0.0,
    warmup_steps: int = 0,
    warmup_init: float = 0.0,
    steps_per_epoch: float | None = None,
) -> optax.Schedule:
    """Returns a function from the step, counted from 0, to the learning rate.

    The warm-up is unilm's `linspace(warmup_init, learning_rate, warmup_steps)`: it starts at
    `warmup_init` and its last step has the full learning rate; one of a single step has
    `warmup_init`. Then follows, for the rest of the run,

      "constant"     the learning rate;
      "linear"       a line to `end_value`;
      "cosine"       half a cosine to `end_value`;
      "step-cosine"  the same cosine, read at the start of each epoch and held through it
                     (timm, or torch's CosineAnnealingLR stepped once an epoch).

    Args:
      name: one of the above.
      learning_rate: the peak.
      total_steps: length of the run.
      end_value: learning rate at the end of the decay and from there on.
      warmup_steps: length of the warm-up.
      warmup_init: learning rate of step 0, if there is a warm-up.
      steps_per_epoch: for "step-cosine" only.

    Raises:
      ValueError: the name is unknown, or the durations do not fit.
    """
    if name not in _CURVES:
        raise ValueError(f"unknown schedule {name!r}; available: {', '.join(_CURVES)}")
    if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            "a schedule needs total_steps >= 1 and warmup_steps from 0 to total_steps; "
            f"got total_steps={total_steps}, warmup_steps={warmup_steps}"
        )
    if name == "step-cosine" and not steps_per_epoch:
        raise ValueError('schedule "step-cosine" needs steps_per_epoch; or use "cosine"')
    decay_steps = max(total_steps - warmup_steps, 1)

    def decayed(step):
        if name == "step-cosine":
            step = jnp.floor((step + 0.5) / steps_per_epoch) * steps_per_epoch
        progress = jnp.clip((step - warmup_steps) / decay_steps, 0, 1)
        return end_value + (learning_rate - end_value) * _CURVES[name](progress)

    def schedule(step):
        warmup = warmup_init + (learning_rate - warmup_init) * step / max(warmup_steps - 1, 1)
        return jnp.where(step < warmup_steps, warmup, decayed(step))

    return schedule


def make_optimizer(
    name: str,
    *,
    learning_rate: float | optax.Schedule,
    params,
    b1: float = 0.9,
    b2: float | None = None,
    eps: float = 1e-8,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float | optax.Schedule = 0.0,
    no_decay: Sequence[str] = (),
    decay_position_bias: bool = True,
    layer_decay: float | None = None,
    layer_id: Callable[[str], int] | None = None,
    num_layers: int | None = None,
    clip_norm: float | None = None,
    trainable=None,
) -> optax.GradientTransformation:
    """The optimizer by name.

      "adam"   torch.optim.Adam; weight decay is an L2 penalty, added to the gradient
      "adamw"  torch.optim.AdamW; weight decay is decoupled
      "sgd"    torch.optim.SGD with momentum; weight decay as in "adam"
      "lion"   Lion (arXiv:2302.06675); weight decay is decoupled

    Decoupled decay is multiplied by the scheduled and layer-decayed learning rate, as in torch.

    Args:
      name: one of the above.
      learning_rate: a schedule (`make_schedule`) or a constant.
      params: the parameters or their shapes (`jax.eval_shape`).
      b1, b2, eps: of adam and adamw; b1, b2 also of lion. b2 None is 0.999, of lion 0.99.
      momentum, nesterov: of sgd.
      weight_decay: applied where `decay_mask` says so.
      no_decay: patterns of further parameters without weight decay.
      decay_position_bias: whether relative position bias tables are decayed, as unilm does.
      layer_decay: multiplies the learning rate of a parameter by
        layer_decay ** (num_layers + 1 - layer_id(name)); None or 1 for none.
      layer_id: from a parameter name to 0 (embeddings), i + 1 (layer i), num_layers + 1 (the rest).
      num_layers: number of transformer layers.
      clip_norm: largest global norm of the trained parameters' gradients; None or 0 for any.
      trainable: a tree of bools like `params`, see `trainable_mask`; the others get neither updates
        nor optimizer state. None trains all.

    Raises:
      ValueError: an unknown name, a pattern that matches nothing, or layer decay without its
        arguments or with ids out of range.
    """

    def decayed(tree):
        return decay_mask(tree, no_decay=no_decay, decay_position_bias=decay_position_bias)

    _check_patterns("no_decay", no_decay, params)
    decay = optax.add_decayed_weights(weight_decay, mask=decayed)
    if b2 is None:
        b2 = 0.99 if name == "lion" else 0.999
    adam = optax.scale_by_adam(b1, b2, eps)
    rules = {
        "adam": (decay, adam),
        "adamw": (adam, decay),
        "sgd": (decay, optax.trace(momentum, nesterov)),
        "lion": (optax.scale_by_lion(b1, b2), decay),
    }
    if name not in rules:
        raise ValueError(f"unknown optimizer {name!r}; available: {', '.join(rules)}")
    tx = optax.chain(
        clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        *rules[name],
        _scale_by_layer_decay(layer_decay, layer_id, num_layers, params),
        optax.scale_by_learning_rate(learning_rate),
    )
    if trainable is None or all(jax.tree.leaves(trainable)):
        return tx
    labels = jax.tree.map(lambda learns: "trained" if learns else "frozen", trainable)
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def apply_updates(params, updates, trainable):
    """Parameters with their updates added where `trainable`, a tree of bools, is true.

    On a GPU XLA makes a kernel for each array, hundreds of them for a few numbers each. It joins
    the updates of arrays of one shape where they have an operand in common that is no scalar, so
    small arrays are given one: a vector of ones. That vector waits for the updates of the large
    arrays, because the gradients of these may still read a small one, such as a scale that a kernel
    was multiplied by, and XLA would copy what is overwritten before its last use.
    """

    def add(p, update, learns):
        return p + update if learns else p

    new = jax.tree.map(add, params, updates, trainable)
    if jax.default_backend() == "gpu":
        large = [x for x in jax.tree.leaves(new) if x.size > SMALL]
        _, one = jax.lax.optimization_barrier((large, jnp.ones(2)))
        scaled = jax.tree.map(lambda update: update * one[0], updates)
        small = jax.tree.map(add, params, scaled, trainable)
        new = jax.tree.map(lambda x, y: x if x.size > SMALL else y, new, small)
    return new


def decay_mask(params, *, no_decay: Sequence[str] = (), decay_position_bias: bool = True):
    """True for the parameters with weight decay, in a tree like `params`.

    Not decayed are vectors and scalars, biases, norm scales, layer scales, class and distillation
    token and position embeddings; the mask token is, as are relative position bias tables, and what
    computes them in Swin v2, by default (unilm's rule; its
    `--disable_weight_decay_on_rel_pos_bias`, and what Swin does, is `decay_position_bias=False`).
    """

    def is_decayed(path, leaf):
        name = path_name(path)
        last = name.rpartition("/")[2]
        skipped = bool(_POSITION_BIAS.search(name)) and not decay_position_bias
        skipped = skipped or last in _NO_DECAY or _matches(name, no_decay)
        return leaf.ndim > 1 and not skipped

    return jax.tree.map_with_path(is_decayed, params)


def trainable_mask(
    params,
    *,
    trainable: str = "all",
    freeze: Sequence[str] = (),
    layer_id: Callable[[str], int] | None = None,
    num_layers: int = 0,
):
    """True for the parameters that are trained, in a tree like `params`.

    Args:
      params: the parameters or their shapes.
      trainable: "all"; "head" for the classifier alone; "bias" for it and all biases (BitFit,
        arXiv:2106.10199); "last-N" for the last N layers and what follows them.
      freeze: patterns of further parameters that are not trained.
      layer_id: from a parameter name to 0 (embeddings), i + 1 (layer i), num_layers + 1 (the rest).
      num_layers: number of layers.

    Raises:
      ValueError: `trainable` is none of these, or there are fewer than N layers, a pattern matches
        nothing, or nothing is left to train.
    """
    names = _names(params)
    _check_patterns("freeze", freeze, params)
    is_trained = _rule(trainable, names, layer_id, num_layers)
    trained = {name for name in names if is_trained(name) and not _matches(name, freeze)}
    if not trained:
        raise ValueError(
            f"trainable={trainable!r} and freeze={list(freeze)}: nothing is left to train"
        )
    return jax.tree.map_with_path(lambda path, _: path_name(path) in trained, params)


def _rule(trainable, names, layer_id, num_layers) -> Callable[[str], bool]:
    """Whether a parameter is trained by `config.trainable`, from its name."""

    def is_head(name):
        return bool(re.fullmatch(CLASSIFIERS, name))

    last = re.fullmatch(r"last-(\d+)", trainable)
    if last and 0 < int(last[1]) <= num_layers:
        return lambda name: layer_id(name) > num_layers - int(last[1])
    if trainable in ("head", "bias") and not any(map(is_head, names)):
        raise ValueError(
            f"config.trainable is {trainable!r}, and the network of this task has no classifier: "
            "expected all or last-N."
        )
    rules = {
        "all": lambda name: True,
        "head": is_head,
        "bias": lambda name: is_head(name) or name.endswith("bias"),
    }
    if trainable not in rules:
        raise ValueError(
            f"config.trainable is {trainable!r}; expected all, head, bias, or last-N with N from 1 "
            f"to {num_layers}."
        )
    return rules[trainable]


def global_norm(tree) -> jax.Array:
    """Euclidean norm of all arrays of a tree together, float32.

    Of a sum for each array XLA makes a GPU kernel or two, hundreds for a few numbers each. Here
    rows of matrices are summed, and their sums and vectors put together, many at a time, before
    they are summed; barriers keep XLA from taking that apart.
    """
    leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]
    parts = [x.reshape(-1) if x.ndim < 2 else _norms_of_rows(x) for x in leaves]
    total = 0.0
    for i in range(0, len(parts), TOGETHER):
        part = jax.lax.optimization_barrier(jnp.concatenate(parts[i : i + TOGETHER]))
        total += jnp.square(part).sum()
    return jnp.sqrt(total)


def _norms_of_rows(x):
    return jax.lax.optimization_barrier(jnp.sqrt(jnp.square(x).sum(-1).reshape(-1)))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales updates down to a global norm of `max_norm`, as torch's `clip_grad_norm_`; stateless.

    optax's transform of this name selects instead of multiplying. XLA then keeps a clipped copy
    of all gradients, and the whole update takes twice as long on a CPU.
    """

    def clip(updates, _):
        factor = jnp.minimum(max_norm / (global_norm(updates) + 1e-6), 1)
        return jax.tree.map(lambda update: update * factor.astype(update.dtype), updates)

    return optax.stateless(clip)


def scale_by_layer(scale: Callable[[str], float]) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by `scale(name)`; stateless."""
    return optax.stateless(
        lambda updates, _: jax.tree.map_with_path(
            lambda path, update: update * scale(path_name(path)), updates
        )
    )


def _scale_by_layer_decay(layer_decay, layer_id, num_layers, params):
    if layer_decay in (None, 1):
        return optax.identity()
    if not 0 < layer_decay < 1 or layer_id is None or num_layers is None:
        raise ValueError(
            "layer_decay must lie in (0, 1] and needs layer_id and num_layers of the model; got "
            f"layer_decay={layer_decay}, {'no' if layer_id is None else 'a'} layer_id, "
            f"num_layers={num_layers}"
        )
    ids = {name: layer_id(name) for name in _names(params)}
    if bad := {name: i for name, i in ids.items() if not 0 <= i <= num_layers + 1}:
        raise ValueError(f"layer ids must lie in 0 ... {num_layers + 1}; got {bad}")
    return scale_by_layer(lambda name: layer_decay ** (num_layers + 1 - ids[name]))


def _matches(name, patterns):
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _names(params):
    return [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]


def _check_patterns(argument, patterns, params):
    names = _names(params)
    compiled = errors.compile_patterns(argument, patterns)
    if unused := [p.pattern for p in compiled if not any(map(p.fullmatch, names))]:
        raise ValueError(
            f"{argument} patterns match no whole parameter name: {unused}; write for example "
            f'"layer_0/.*". Available: {", ".join(names)}'
        )


def ema_update(ema, params, decay: float, step=None):
    """Moves the averaged parameters by a share 1 - decay towards `params`.

    The decay is constant; given the `step`, counted from 0, it is min(decay, (1 + step) /
    (10 + step)), TensorFlow's warm-up, so that a short run forgets its initial values.
    """
    if step is not None:
        decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)


def accumulate_gradients(value_and_grad, params, batch, rng, num_micro: int):
    """Evaluates `value_and_grad` on `num_micro` parts of the batch, one after the other.

    Part i holds the examples i, i + num_micro, ...: with the batch sharded over devices, each
    device then splits its own share and nothing moves. The means over the parts are taken in
    float32; they equal the full batch's where the loss is a mean over examples.

    Args:
      value_and_grad: (params, batch, rng) -> ((loss, aux), grads), as
        `jax.value_and_grad(..., has_aux=True)` returns it; aux holds floats only.
      params: its first argument.
      batch: tree of arrays with the same leading axis B.
      rng: key; part i gets `jax.random.fold_in(rng, i)`. One part gets `rng` itself.
      num_micro: number of parts; must divide B.

    Returns:
      ((loss, aux), grads), each leaf the mean over the parts.

    Raises:
      ValueError: B is not divisible, or aux has a leaf that is not a float.
    """
    if num_micro == 1:
        return value_and_grad(params, batch, rng)
    sizes = sorted({x.shape[0] for x in jax.tree.leaves(batch)})
    if num_micro < 1 or len(sizes) != 1 or sizes[0] % num_micro:
        raise ValueError(f"cannot split a batch of {sizes} examples into {num_micro} equal parts")
    parts = jax.tree.map(  # [num_micro, B / num_micro, ...]
        lambda x: x.reshape(-1, num_micro, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def evaluate(part, i):
        return value_and_grad(params, part, jax.random.fold_in(rng, i))

    def add(total, part_and_i):
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, evaluate(*part_and_i)), None

    like = jax.eval_shape(evaluate, jax.tree.map(lambda x: x[0], parts), 0)
    _check_floats(like)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    total, _ = jax.lax.scan(add, zeros, (parts, jnp.arange(num_micro)))
    return jax.tree.map(lambda t, x: (t / num_micro).astype(x.dtype), total, like)


def _check_floats(tree):
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"only floats can be averaged over parts of a batch; leaf {path_name(path)} of "
                f"((loss, aux), grads) is {leaf.dtype}; convert it in the loss"
            )
