"""Which steps get options of XLA."""

import jax
import pytest

from beit_jax import compiler, embed


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


def test_training_evaluation_and_predictions_ask(tmp_path, monkeypatch, train, picture_folder):
    asked = []
    monkeypatch.setattr(compiler, "options", lambda: asked.append(True) or {})
    train(tmp_path / "run", {})
    assert len(asked) == 2
    paths = ["--checkpoint", str(tmp_path / "run"), "--images", str(picture_folder)]
    assert embed.main([*paths, "--out", str(tmp_path / "v.npz")]) == 0
    assert len(asked) == 3
