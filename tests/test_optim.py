"""Optimizers and schedules against torch, parameter groups against unilm's rule."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beit_jax import build, optim
from configs import common

NUM_LAYERS = 2
SHAPES = {
    "embeddings": {
        "cls_token": (1, 1, 4),
        "mask_token": (1, 1, 4),
        "position_embeddings": (1, 5, 4),
        "patch_embeddings": {"kernel": (2, 2, 3, 4), "bias": (4,)},
    },
    **{
        f"layer_{i}": {
            "layernorm_before": {"scale": (4,), "bias": (4,)},
            "attention": {
                "query": {"kernel": (4, 4), "bias": (4,)},
                "relative_position_bias_table": (12, 2),
            },
            "lambda_1": (4,),
        }
        for i in range(NUM_LAYERS)
    },
    "pooler_layernorm": {"scale": (4,), "bias": (4,)},
    "classifier": {"kernel": (4, 3), "bias": (3,)},
}
NOT_DECAYED = ("bias", "scale", "lambda_1", "cls_token", "position_embeddings")


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape).astype(np.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def named(tree):
    return {optim.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def layer_id(name):
    """unilm's `get_num_layer_for_vit`."""
    if name.startswith("embeddings"):
        return 0
    if name.startswith("layer_"):
        return int(name.split("/")[0].removeprefix("layer_")) + 1
    return NUM_LAYERS + 1


def lr_scale(name, decay):
    return decay ** (NUM_LAYERS + 1 - layer_id(name))


def unilm_schedule(base, end, total, warmup, start):
    """`cosine_scheduler` of beit/utils.py as formulas: one learning rate per iteration."""
    cosine = np.cos(np.pi * np.arange(total - warmup) / (total - warmup))
    return [*np.linspace(start, base, warmup), *(end + 0.5 * (base - end) * (1 + cosine))]


# Schedules.


def values(schedule, steps):
    return np.array(jax.vmap(schedule)(jnp.arange(steps)))


@pytest.mark.parametrize("warmup", [0, 1, 2, 30])
def test_cosine_equals_unilm(warmup):
    schedule = optim.make_schedule(
        "cosine",
        learning_rate=4e-3,
        end_value=1e-6,
        total_steps=200,
        warmup_steps=warmup,
        warmup_init=1e-5,
    )
    expected = unilm_schedule(4e-3, 1e-6, 200, warmup, 1e-5)
    np.testing.assert_allclose(values(schedule, 200), expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(schedule(200), 1e-6, rtol=1e-3)
    np.testing.assert_allclose(schedule(10_000), 1e-6, rtol=1e-3)


def torch_schedule(steps, make):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_equals_torch():
    expected = torch_schedule(100, lambda s, opt: s.CosineAnnealingLR(opt, 100, eta_min=0.01))
    schedule = optim.make_schedule("cosine", learning_rate=0.1, end_value=0.01, total_steps=100)
    np.testing.assert_allclose(values(schedule, 100), expected, rtol=1e-5)


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 49, 391])
def test_step_cosine_equals_torch_stepped_once_an_epoch(steps_per_epoch):
    epochs = 12
    rates = torch_schedule(epochs, lambda s, opt: s.CosineAnnealingLR(opt, epochs))
    schedule = optim.make_schedule(
        "step-cosine",
        learning_rate=0.1,
        total_steps=epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
    )
    actual = np.array(jax.jit(jax.vmap(schedule))(jnp.arange(epochs * steps_per_epoch)))
    np.testing.assert_allclose(actual, np.repeat(rates, steps_per_epoch), rtol=1e-5)


def test_step_cosine_with_warm_up_and_a_fractional_epoch():
    schedule = optim.make_schedule(
        "step-cosine",
        learning_rate=1.0,
        total_steps=24,
        warmup_steps=12,
        steps_per_epoch=2.4,
    )
    rates = values(schedule, 24)
    np.testing.assert_allclose(rates[:12], np.linspace(0, 1, 12), rtol=1e-6)
    starts = [12, 14, 17, 19, 22]  # epochs 5 ... 9
    np.testing.assert_array_equal(np.flatnonzero(np.diff(rates[12:])) + 13, starts[1:])
    cosine = [0.5 + 0.5 * math.cos(math.pi * i / 5) for i in range(5)]
    np.testing.assert_allclose(rates[starts], cosine, rtol=1e-5)


def test_linear_equals_torch():
    expected = torch_schedule(100, lambda s, opt: s.PolynomialLR(opt, 80, power=1))
    schedule = optim.make_schedule("linear", learning_rate=0.1, total_steps=80)
    np.testing.assert_allclose(values(schedule, 100), expected, rtol=1e-5, atol=1e-8)


def test_constant_with_warm_up():
    schedule = optim.make_schedule("constant", learning_rate=0.1, total_steps=9, warmup_steps=5)
    np.testing.assert_allclose(
        values(schedule, 9), 0.1 * np.array([0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "cosin"}, r"unknown schedule 'cosin'; available: constant, linear, cosine"),
        ({"total_steps": 0}, "total_steps >= 1"),
        ({"warmup_steps": 11}, "warmup_steps from 0 to total_steps"),
        ({"warmup_steps": -1}, "warmup_steps from 0 to total_steps"),
        ({"name": "step-cosine"}, "needs steps_per_epoch"),
    ],
)
def test_schedule_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        optim.make_schedule(**{"name": "cosine", "learning_rate": 1, "total_steps": 10, **kwargs})


# Optimizers.


def run(tx, params, steps, grads_of):
    """Trains with one jitted step; returns (params, opt_state)."""

    @jax.jit
    def step(params, state, target, scale):
        updates, state = tx.update(grads_of(params, target, scale), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, *problem(i))
    return params, state


def problem(step):
    """A target per step and the scale of its gradient, on both sides of the clipping norm."""
    return random_params(seed=step + 1), np.float32([0.02, 3.0][step % 2])


def gradients(params, target, scale):
    return jax.tree.map(lambda p, t: scale * (p - t), params, target)


def run_torch(make, schedule, layer_decay, weight_decay, clip_norm, frozen=()):
    """The same training with one torch parameter group per parameter, as in unilm."""
    torch = pytest.importorskip("torch")
    params = {name: torch.tensor(p) for name, p in named(random_params()).items()}
    trained = {name: p.requires_grad_() for name, p in params.items() if name not in frozen}
    groups = [
        {
            "params": [p],
            "lr_scale": lr_scale(name, layer_decay),
            "weight_decay": 0 if name.endswith(NOT_DECAYED) else weight_decay,
        }
        for name, p in trained.items()
    ]
    optimizer = make(torch.optim, groups)
    for i, rate in enumerate(schedule):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        target, scale = problem(i)
        target = named(target)
        for name, p in trained.items():
            p.grad = float(scale) * (p.detach() - torch.tensor(target[name]))
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(trained.values(), clip_norm)
        optimizer.step()
    return {name: p.detach().numpy() for name, p in params.items()}


STEPS = 60
SCHEDULE = {"learning_rate": 0.03, "end_value": 1e-4, "warmup_steps": 10}
MOMENTUM = {"momentum": 0.9, "nesterov": True}


@pytest.mark.parametrize(
    ("name", "make", "kwargs"),
    [
        ("adamw", lambda t, g: t.AdamW(g, betas=(0.9, 0.98), eps=1e-6), {"b2": 0.98, "eps": 1e-6}),
        ("adam", lambda t, g: t.Adam(g), {}),
        ("sgd", lambda t, g: t.SGD(g, lr=0.1, momentum=0.9), {}),
        ("sgd", lambda t, g: t.SGD(g, lr=0.1, **MOMENTUM), MOMENTUM),
    ],
    ids=["adamw", "adam", "sgd", "nesterov"],
)
def test_optimizer_equals_torch(name, make, kwargs):
    params = random_params()
    schedule = optim.make_schedule("cosine", total_steps=STEPS, **SCHEDULE)
    tx = optim.make_optimizer(
        name,
        learning_rate=schedule,
        params=params,
        weight_decay=0.3,
        layer_decay=0.65,
        layer_id=layer_id,
        num_layers=NUM_LAYERS,
        clip_norm=3.0,
        **kwargs,
    )
    actual, _ = run(tx, params, STEPS, gradients)
    expected = run_torch(make, unilm_schedule(0.03, 1e-4, STEPS, 10, 0), 0.65, 0.3, 3.0)
    for path, value in named(actual).items():
        np.testing.assert_allclose(value, expected[path], rtol=2e-5, atol=2e-5, err_msg=path)


def test_frozen_parameters_get_no_update_and_no_state():
    params = random_params()
    mask = optim.trainable_mask(params, freeze=["embeddings/.*", "layer_0/.*"])
    tx = optim.make_optimizer(
        "adamw",
        learning_rate=0.01,
        params=jax.eval_shape(lambda: params),
        weight_decay=0.3,
        layer_decay=0.5,
        layer_id=layer_id,
        num_layers=NUM_LAYERS,
        clip_norm=3.0,
        trainable=mask,
    )
    actual, state = run(tx, params, STEPS, gradients)
    frozen = [n for n in named(params) if n.startswith(("embeddings/", "layer_0/"))]
    assert [n for n, m in named(mask).items() if not m] == frozen
    expected = run_torch(lambda t, g: t.AdamW(g), [0.01] * STEPS, 0.5, 0.3, 3.0, frozen)
    for path, value in named(actual).items():
        if path in frozen:
            np.testing.assert_array_equal(value, named(params)[path], err_msg=path)
        np.testing.assert_allclose(value, expected[path], rtol=2e-5, atol=2e-5, err_msg=path)

    trained = [p for n, p in named(params).items() if n not in frozen]
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(p.size for p in trained)


def test_lion_follows_its_paper():
    params = {"kernel": np.float32([[1.0, -2.0]])}
    grads = [np.float32([[0.5, 0.1]]), np.float32([[-2.0, 0.3]]), np.float32([[0.1, -9.0]])]
    tx = optim.make_optimizer(
        "lion", learning_rate=0.1, params=params, b1=0.9, b2=0.99, weight_decay=0.2
    )
    state, expected, momentum = tx.init(params), params["kernel"], 0
    for grad in grads:
        direction = np.sign(0.9 * momentum + 0.1 * grad)
        expected = expected - 0.1 * (direction + 0.2 * expected)
        momentum = 0.99 * momentum + 0.01 * grad
        updates, state = tx.update({"kernel": grad}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-6)


def test_decay_mask_is_unilms():
    params = random_params()
    decayed = {name for name, decay in named(optim.decay_mask(params)).items() if decay}
    tables = {f"layer_{i}/attention/relative_position_bias_table" for i in range(NUM_LAYERS)}
    kernels = {f"layer_{i}/attention/query/kernel" for i in range(NUM_LAYERS)}
    other = {"embeddings/mask_token", "embeddings/patch_embeddings/kernel", "classifier/kernel"}
    assert decayed == tables | kernels | other

    mask = optim.decay_mask(params, decay_position_bias=False, no_decay=["classifier/.*"])
    decayed = {name for name, decay in named(mask).items() if decay}
    assert decayed == (kernels | other) - {"classifier/kernel"}


def test_decay_mask_skips_vectors_of_any_name():
    tree = {"gain": np.zeros(3), "temperature": np.zeros(()), "matrix": np.zeros((3, 3))}
    assert optim.decay_mask(tree) == {"gain": False, "temperature": False, "matrix": True}


@pytest.mark.parametrize("drop", [(), ("matrix", "array"), ("vector", "scalar")])
def test_global_norm_is_that_of_all_numbers(drop):
    shapes = {"matrix": (3, 4), "array": (2, 3, 4), "vector": (5,), "scalar": ()}
    rng = np.random.default_rng(0)
    tree = {k: rng.standard_normal(v) for k, v in shapes.items() if k not in drop}
    norm = jax.jit(optim.global_norm)(tree)
    assert norm.dtype == jnp.float32
    assert norm == pytest.approx(float(optax.tree.norm(tree)), rel=1e-6)


@pytest.mark.parametrize("backend, barriers", [("cpu", 0), ("gpu", 1)])
def test_small_arrays_are_updated_last_and_together(monkeypatch, backend, barriers):
    """On a GPU, where that is another program, with the same numbers; frozen ones stay."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    shapes = {"scale": (300,), "kernel": (300, 300), "adapter": (300, 4), "temperature": ()}
    shapes |= {"frozen_scale": (300,), "frozen_kernel": (300, 300)}
    params, updates = ({k: rng.normal(size=s).astype("f") for k, s in shapes.items()} for _ in "ab")
    learns = {name: not name.startswith("frozen") for name in shapes}
    expected = optax.apply_updates(params, updates)
    expected = {name: expected[name] if learns[name] else params[name] for name in shapes}

    def apply(params, updates):
        return optim.apply_updates(params, updates, learns)

    program = jax.make_jaxpr(apply)(params, updates)
    found = [x for x in program.eqns if x.primitive.name == "optimization_barrier"]
    assert len(found) == barriers
    given, made = program.jaxpr.invars, program.jaxpr.outvars
    for name, old, new in zip(sorted(shapes), given, made, strict=False):
        assert (old is new) == (not learns[name])
    jax.tree.map(np.testing.assert_array_equal, jax.jit(apply)(params, updates), expected)


@pytest.mark.parametrize("number", [1.0, np.inf, np.nan])
def test_global_norm_of_many_arrays(number):
    tree = [np.full(2 + i % 3, 0.5) for i in range(150)] + [np.ones((2, 3))] * 150
    tree[140] = np.float64([number])
    expected = optax.tree.norm(jax.tree.map(jnp.asarray, tree))
    np.testing.assert_allclose(jax.jit(optim.global_norm)(tree), expected, rtol=1e-6)


def test_clipped_norm_is_the_given_one_and_small_gradients_pass():
    grads = random_params()
    tx = optim.clip_by_global_norm(0.5)
    clipped, _ = tx.update(grads, tx.init(grads))
    assert optax.tree.norm(clipped) == pytest.approx(0.5, rel=1e-5)
    passed, _ = tx.update(clipped, tx.init(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), passed, clipped)


def test_clipping_costs_no_copy_of_the_gradients():
    params = {f"layer_{i}": {"kernel": jnp.ones((64, 64))} for i in range(8)}
    tx = optim.make_optimizer("adamw", learning_rate=0.1, params=params, clip_norm=1.0)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 8 * 64 * 64 * 4


@pytest.mark.parametrize(("name", "expected"), [("adamw", 0.999), ("adam", 0.999), ("lion", 0.99)])
def test_second_decay_is_that_of_the_rule(name, expected):
    params = random_params()
    grads = jax.tree.map(jnp.ones_like, params)

    def second_update(**options):
        tx = optim.make_optimizer(name, learning_rate=0.1, params=params, **options)
        _, state = tx.update(grads, tx.init(params), params)
        return tx.update(jax.tree.map(lambda x: -x / 50, grads), state, params)[0]

    same, other = second_update(b2=expected), second_update(b2=0.9999)
    jax.tree.map(np.testing.assert_array_equal, second_update(), same)
    differ = jax.tree.map(lambda a, b: not np.array_equal(a, b), same, other)
    assert any(jax.tree.leaves(differ))


LAYERS = {"layer_decay": 0.5, "layer_id": layer_id, "num_layers": NUM_LAYERS}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "adamww"}, "unknown optimizer 'adamww'; available: adam, adamw, sgd, lion"),
        ({"no_decay": ["head/.*"]}, r"no_decay patterns .*\['head/\.\*'\].*classifier/kernel"),
        ({"layer_decay": 0.5}, "needs layer_id and num_layers"),
        ({**LAYERS, "layer_decay": 1.5}, r"must lie in \(0, 1\]"),
        ({**LAYERS, "num_layers": 1}, r"layer ids must lie in 0 ... 2; got .*classifier/bias': 3"),
    ],
)
def test_optimizer_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        optim.make_optimizer(
            **{"name": "adamw", "learning_rate": 0.1, "params": random_params(), **kwargs}
        )


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("layer_0", r"freeze patterns .*\['layer_0'\].*Available: classifier/bias"),
        ("*", r"freeze: '\*' is no regular expression: nothing to repeat"),
        (".*", "nothing is left to train"),
    ],
)
def test_patterns_of_frozen_parameters(freeze, message):
    with pytest.raises(ValueError, match=message):
        optim.trainable_mask(random_params(), freeze=[freeze])


# Weight averaging.


def test_ema_equals_torch():
    torch = pytest.importorskip("torch")
    averages = torch.optim.swa_utils
    source = torch.nn.Linear(3, 2)
    expected = averages.AveragedModel(source, multi_avg_fn=averages.get_ema_multi_avg_fn(0.9))
    expected.update_parameters(source)  # the first update copies
    ema = {"kernel": source.weight.detach().numpy().copy()}
    for _ in range(5):
        torch.nn.init.normal_(source.weight)
        expected.update_parameters(source)
        ema = optim.ema_update(ema, {"kernel": source.weight.detach().numpy().copy()}, 0.9)
    np.testing.assert_allclose(ema["kernel"], expected.module.weight.detach(), rtol=1e-5)


def test_ema_warm_up():
    zeros, ones = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    for step, decay in [(0, 0.1), (8, 0.5), (10**6, 0.99)]:
        np.testing.assert_allclose(
            optim.ema_update(zeros, ones, 0.99, step)["a"], 1 - decay, rtol=1e-5
        )


# Gradient accumulation.


def loss(params, batch, rng):
    hidden = jnp.tanh(batch["image"] @ params["kernel"])
    error = hidden.sum(-1) - batch["label"]
    return jnp.mean(error**2), {"error": jnp.mean(error), "noise": jax.random.uniform(rng)}


def accumulation_problem(size=12):
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((5, 3)).astype(np.float32)}
    image = rng.standard_normal((size, 5)).astype(np.float32)
    return params, {"image": image, "label": np.arange(size)}, jax.random.key(0)


@pytest.mark.parametrize("num_micro", [1, 2, 3, 12])
def test_accumulated_gradients_equal_the_full_batch(num_micro):
    params, batch, rng = accumulation_problem()
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    accumulate = jax.jit(optim.accumulate_gradients, static_argnums=(0, 4))
    actual = accumulate(value_and_grad, params, batch, rng, num_micro)
    expected = value_and_grad(params, batch, rng)
    keys = [jax.random.fold_in(rng, i) for i in range(num_micro)] if num_micro > 1 else [rng]
    expected[0][1]["noise"] = jnp.mean(jax.vmap(jax.random.uniform)(jnp.stack(keys)))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, value in named(actual).items():
        np.testing.assert_allclose(value, named(expected)[path], 1e-5, 1e-6, err_msg=path)


def test_accumulation_is_in_float32_and_keeps_dtypes():
    params, batch, rng = accumulation_problem(size=512)

    def constant(params, batch, rng):
        value = jnp.mean(params["kernel"]) + jnp.bfloat16(1 / 3)
        return value, ()

    half = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.bfloat16), params)
    value_and_grad = jax.value_and_grad(constant, has_aux=True)
    (value, aux), grads = optim.accumulate_gradients(value_and_grad, half, batch, rng, 512)
    assert value == jnp.bfloat16(1 / 3)
    assert (value.dtype, grads["kernel"].dtype, aux) == (jnp.bfloat16, jnp.bfloat16, ())


def test_accumulation_errors():
    params, batch, rng = accumulation_problem()
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    for num_micro in (5, 0):
        with pytest.raises(ValueError, match=rf"\[12\] examples into {num_micro} equal parts"):
            optim.accumulate_gradients(value_and_grad, params, batch, rng, num_micro)

    def counting(params, batch, rng):
        return loss(params, batch, rng)[0], {"correct": jnp.int32(3)}

    with pytest.raises(ValueError, match="leaf 0/1/correct .* is int32"):
        value_and_grad = jax.value_and_grad(counting, has_aux=True)
        optim.accumulate_gradients(value_and_grad, params, batch, rng, 2)


def test_weight_decay_on_its_own_schedule():
    """unilm's --weight_decay_end: half a cosine over all steps, without the warm-up."""
    config = common.get_config()
    config.optim.update(
        name="adamw", learning_rate=0.5, schedule="constant", weight_decay=0.2, weight_decay_end=0.1
    )
    config.total_steps = 8
    params = {"kernel": jnp.ones((2, 2))}
    task = types.SimpleNamespace(layer_id=lambda name: 0, num_layers=0)
    plan = build.make_plan(config, num_examples=64)
    tx, _ = build.make_optimizer(config, task, plan, params, trainable=None)
    state = tx.init(params)
    for expected in unilm_schedule(0.2, 0.1, total=8, warmup=0, start=0.0):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        np.testing.assert_allclose(updates["kernel"], -0.5 * expected, rtol=1e-6)
