"""What XLA is given: which steps get options, and that none of them asks the host anything."""

import re

import jax
import pytest

from beit_jax import build, compiler, embed


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_a_gpu_leaves_products_to_cublas(gpu):
    assert compiler.options() == {"xla_gpu_enable_triton_gemm": False}


def test_other_devices():
    assert compiler.options() == {}


def test_flags_decide(gpu, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert compiler.options() == {}


def test_options_are_known_to_xla():
    options = {"xla_gpu_enable_triton_gemm": False}
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_training_evaluation_and_predictions_ask(tmp_path, monkeypatch, train, image_dir):
    asked = []
    monkeypatch.setattr(compiler, "options", lambda: asked.append(True) or {})
    train(tmp_path / "run", {})
    assert len(asked) == 2
    paths = ["--checkpoint", str(tmp_path / "run"), "--images", str(image_dir)]
    assert embed.main([*paths, "--out", str(tmp_path / "v.npz")]) == 0
    assert len(asked) == 3


EVERYTHING = {
    "augment.crop": "rrc",
    "augment.randaugment": "rand-m9-mstd0.5-inc1",
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.erasing": 0.25,
    "model.drop_path_rate": 0.1,
    "optim.layer_decay": 0.75,
    "optim.clip_norm": 1.0,
    "ema_decay": 0.99,
}


@pytest.mark.parametrize(
    "changes",
    [
        EVERYTHING,
        {"task_name": "pretrain", "objective": "mae", "augment.crop": "rrc"},
        {"task_name": "pretrain", "objective": "data2vec", "data2vec.layers": 2},
    ],
    ids=["classify", "mae", "data2vec"],
)
def test_a_step_does_not_ask_the_host(tmp_path, monkeypatch, train, changes):
    """Whether to go on with a loop, or which branch to take, a GPU has the host decide, which then
    cannot prepare the next kernels before those of the step before have run."""
    programs = []

    class Lowered(Exception):
        pass

    def lower(function, **options):
        def at(*args):
            traced = jit(function, **options).trace(*args)
            programs.append(traced.lower(lowering_platforms=("cuda",)).as_text())
            raise Lowered

        return type("Jitted", (), {"lower": staticmethod(at)})

    def compile_step(*args):
        monkeypatch.setattr(jax, "jit", lower)
        return compile_as_ever(*args)

    jit, compile_as_ever = jax.jit, build.compile_step
    monkeypatch.setattr(build, "compile_step", compile_step)
    with pytest.raises(Lowered):
        train(tmp_path / "run", changes)
    assert "stablehlo.add" in programs[0]
    assert not questions(programs[0])


def questions(program):
    """Loops, and branches but for those that JAX leaves for each platform: a constant decides."""
    known, found = set(), re.findall(r"= (?:stablehlo\.while.*)", program)
    for line in program.splitlines():
        if "func.func" in line:  # where names begin anew
            known.clear()
        name, _, rest = line.strip().partition(" = ")
        branch = re.match(r'"stablehlo\.case"\((%\w+)\)', rest)
        if rest.startswith("stablehlo.constant") or branch and branch[1] in known:
            known.add(name)
        elif branch:
            found.append(line)
    return found


def test_such_questions_are_found():
    def draw(key):
        return jax.random.beta(key, 0.8, 0.8)

    def choose(x):
        x = jax.lax.platform_dependent(x, cpu=lambda x: x, default=lambda x: x + 1)
        return jax.jit(lambda x: jax.lax.cond(x > 0, lambda: 1.0, lambda: x))(x)

    for function, given in ((draw, jax.random.key(0)), (choose, 1.0)):
        traced = jax.jit(function).trace(given)
        assert questions(traced.lower(lowering_platforms=("cuda",)).as_text())
