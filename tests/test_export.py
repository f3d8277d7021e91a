"""A program for any number of pictures that runs where there is JAX and nothing of ours."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from beit_jax import export, modules, pretrained
from beit_jax.checkpoint import ModelInfo
from beit_jax.convert import preprocessor
from beit_jax.tasks import classify

NAMES = ["red", "blue", "green"]
CALL = """
import json, pathlib, sys
import jax, jax.export
import numpy as np
folder = pathlib.Path(sys.argv[1])
program = jax.export.deserialize(bytearray((folder / "program.bin").read_bytes()))
shape = json.loads((folder / "program.json").read_text())["input"][1:]
image = np.random.default_rng(1).integers(0, 256, (5, *shape), np.uint8)
several, one = program.call(image), program.call(image[3:4])
np.testing.assert_allclose(several[3:4], one, rtol=1e-5, atol=1e-6)
print(json.dumps(np.asarray(several).tolist()))
assert "beit_jax" not in sys.modules and "flax" not in sys.modules
"""


def run(directory):
    """The logits of five random pictures, in a process of its own, in a directory without ours."""
    done = subprocess.run(
        [sys.executable, "-c", CALL, directory.name],
        capture_output=True,
        text=True,
        cwd=directory.parent,
    )
    assert done.returncode == 0, done.stderr
    return np.asarray(json.loads(done.stdout))


@pytest.mark.parametrize(
    "size, crop", [(None, "squash"), ((20, 28), "squash"), ((20, 28), "center")]
)
def test_program_gives_the_logits_of_an_evaluation(tmp_path, hf_directory, size, crop, monkeypatch):
    model = pretrained.load(str(hf_directory))
    model = model._replace(info=model.info._replace(image={**model.info.image, "crop": crop}))
    monkeypatch.setattr(export, "load_classifier", lambda checkpoint: model)
    flags = ["--size", *map(str, size)] if size else []
    out = tmp_path / "program"
    assert export.main(["--checkpoint", str(hf_directory), "--out", str(out), *flags]) == 0
    described = json.loads((out / "program.json").read_text())
    assert described["class_names"] == NAMES and described["image"]["crop"] == crop
    assert described["input"] == ["n", *(size or (16, 16)), 3]
    image = np.random.default_rng(1).integers(0, 256, (5, *described["input"][1:]), np.uint8)
    network = classify.make_model(model.info, dtype="float32", attention="plain")
    resized = size is None
    expected = classify.classify(network, model.info, model.params, image, resized=resized)
    np.testing.assert_allclose(run(out), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["beit", "vit", "swin", "swinv2", "cnn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family(family, dtype):
    presets = modules.load("models", family).PRESETS
    architecture = {**presets["digits"], "num_labels": 3}
    info = ModelInfo(family, "classify", architecture, NAMES, preprocessor.DEFAULT, None)
    network = classify.make_model(info)
    image = np.zeros((1, *network.config.image_size, 3), np.float32)
    params = jax.jit(network.init)(jax.random.key(0), image)["params"]
    model = pretrained.Pretrained(params, info)
    function, size = export.make_classifier(model, dtype=dtype)
    program = export.serialize(function, size)
    assert export.difference(program, function, size) < 1e-3
    exported = jax.export.deserialize(bytearray(program))
    assert exported.platforms == export.PLATFORMS
    assert str(exported.out_avals[0].shape[0]) == "n"


def test_difference_is_told(tmp_path, hf_directory, monkeypatch, capsys):
    model = pretrained.load(str(hf_directory))
    function, size = export.make_classifier(model)
    other = jax.jit(lambda image: function(image) * 1.01)
    program = export.serialize(other, size, ["cpu"])
    assert export.difference(program, function, size) == pytest.approx(0.01, rel=1e-2)
    monkeypatch.setattr(export, "serialize", lambda *_: program)
    out = tmp_path / "program"
    assert export.main(["--checkpoint", str(hf_directory), "--out", str(out)]) == 1
    assert "0.01 off" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "nothing"], "There is no file or directory nothing"),
        (["--platforms", "tpu"], "--platforms lacks cpu"),
        (["--size", "0", "3"], "--size must be at least 1 1"),
        (["--out", "full"], "is not an earlier export"),
    ],
)
def test_bad_input(tmp_path, hf_directory, flags, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    command = ["--checkpoint", str(hf_directory), "--out", "program", *flags]
    try:
        status = export.main(command)
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "program").exists()
