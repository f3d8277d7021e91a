"""Which steps get options of XLA."""

import jax
import pytest

from beit_jax import compiler, embed


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_many_pictures_on_a_gpu(gpu):
    assert compiler.options(31) == {}
    assert compiler.options(32) == {"xla_gpu_enable_triton_gemm": False}


def test_other_devices():
    assert compiler.options(512) == {}


def test_flags_decide(gpu, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert compiler.options(512) == {}


def test_options_are_known_to_xla():
    options = {"xla_gpu_enable_triton_gemm": False}
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_training_evaluation_and_predictions_ask(tmp_path, monkeypatch, train, picture_folder):
    asked = []
    monkeypatch.setattr(compiler, "options", lambda pictures: asked.append(pictures) or {})
    train(tmp_path / "run", {"batch_size": 32, "accumulate_steps": 2, "eval_batch_size": 90})
    assert sorted(asked) == [16, 90]
    for batch_size, expected in (("8", 8), ("100", 60)):
        paths = ["--checkpoint", str(tmp_path / "run"), "--images", str(picture_folder)]
        arguments = [*paths, "--out", str(tmp_path / "v.npz"), "--batch-size", batch_size]
        assert embed.main(arguments) == 0
        assert asked[-1] == expected
