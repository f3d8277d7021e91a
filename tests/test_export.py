"""A program for any number of images that runs where there is JAX and nothing of ours."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from beit_jax import architecture, convert, export, pretrained, train
from beit_jax.convert import preprocessor
from beit_jax.tasks import classify
from configs import image_folder

ROOT = pathlib.Path(__file__).parents[1]
LIBRARIES = ("flatbuffers", "jax", "jaxlib", "ml_dtypes", "numpy", "opt_einsum", "scipy")
CALL = """
import json, pathlib, sys
sys.path.insert(0, "site")
import jax, jax.export
import numpy as np
folder = pathlib.Path(sys.argv[1])
program = jax.export.deserialize((folder / "program.bin").read_bytes())
shape = json.loads((folder / "program.json").read_text())["input"][1:]
image = np.random.default_rng(1).integers(0, 256, (5, *shape), np.uint8)
several, one = program.call(image), program.call(image[3:4])
np.testing.assert_allclose(several[3:4], one, rtol=1e-5, atol=1e-6)
print(json.dumps(np.asarray(several).tolist()))
"""


def save(model, directory):
    """Writes it as HuggingFace does; without torch."""
    info = model.info
    convert.save_hf(directory, model.params, info.architecture, info.class_names, info.image)
    return directory


def run(directory):
    """The logits of five random images, where JAX is installed with what it needs alone."""
    (directory.parent / "site").mkdir()
    for name in LIBRARIES:
        there = pathlib.Path(importlib.util.find_spec(name).origin).parent
        (directory.parent / "site" / name).symlink_to(there)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CALL, directory.name],
        capture_output=True,
        text=True,
        cwd=directory.parent,
    )
    assert done.returncode == 0, done.stderr
    return np.asarray(json.loads(done.stdout))


@pytest.mark.parametrize(
    "size, crop", [(None, "squash"), ((20, 28), "squash"), ((16, 16), "center")]
)
def test_program_gives_the_logits_of_an_evaluation(tmp_path, size, crop, random_classifier):
    model = random_classifier()
    image = {**model.info.image, "crop": crop, "crop_pct": 16 / 18 if crop == "center" else 1.0}
    model = model._replace(info=model.info._replace(image=image))
    checkpoint, out = save(model, tmp_path / "hf"), tmp_path / "program"
    flags = ["--size", *map(str, size)] if size else []
    assert export.main(["--checkpoint", str(checkpoint), "--out", str(out), *flags]) == 0
    described = json.loads((out / "program.json").read_text())
    assert described["class_names"] == model.info.class_names and described["image"] == image
    assert described["input"] == ["n", *(size or (16, 16)), 3]
    assert described["is_cropped_and_resized"] == (size is None)
    images = np.random.default_rng(1).integers(0, 256, (5, *described["input"][1:]), np.uint8)
    network = architecture.make_model(model.info, dtype="float32", attention="plain")
    resized = size is None
    expected = classify.classify(network, model.info, model.params, images, resized=resized)
    np.testing.assert_allclose(run(out), expected, rtol=1e-4, atol=1e-5)
    assert str(ROOT).encode() not in (out / "program.bin").read_bytes()


@pytest.mark.parametrize("family", ["beit", "vit", "swin", "swinv2", "cnn"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_every_family(family, dtype, tolerance, random_classifier):
    model = random_classifier(family)
    function, shape = export.make_classifier(model, dtype=dtype)
    program = export.serialize(function, shape)
    assert export.difference(program, model, shape, resized=True) < tolerance
    exported = jax.export.deserialize(program)
    assert exported.platforms == export.PLATFORMS
    for number in (1, 3):
        image = np.random.default_rng(2).integers(0, 256, (number, *shape), np.uint8)
        np.testing.assert_allclose(exported.call(image), function(image), rtol=1e-2, atol=1e-3)


def test_channels_are_those_of_the_network(random_classifier):
    image = {**preprocessor.DEFAULT, "mean": [0.5], "std": [0.5]}
    model = random_classifier(num_channels=1)
    model = model._replace(info=model.info._replace(image=image))
    function, shape = export.make_classifier(model)
    assert shape == (16, 16, 1)
    program = export.serialize(function, shape, ["cpu"])
    assert export.difference(program, model, shape, resized=True) < 1e-5


def test_adapters_are_merged(tmp_path, classifier_directory, image_dir):
    config = image_folder.get_config(str(image_dir))
    config.pretrained, config.lora.rank = str(classifier_directory), 2
    config.optim.learning_rate = 0.1
    config.batch_size, config.total_steps, config.optim.warmup = 8, 2, "0"
    config.tensorboard, config.compile_cache = False, ""
    train.run(config, str(tmp_path / "run"))
    model = pretrained.load(str(tmp_path / "run"))
    base = pretrained.load(str(classifier_directory))
    merged, before = (m.params["layer_0"]["attention"]["query"]["kernel"] for m in (model, base))
    assert np.abs(merged - before).max() > 1e-3
    out = tmp_path / "program"
    assert export.main(["--checkpoint", str(tmp_path / "run"), "--out", str(out)]) == 0
    program = (out / "program.bin").read_bytes()
    assert export.difference(program, model, (16, 16, 3), resized=True) < 1e-5


def test_difference_is_told(tmp_path, classifier_directory, monkeypatch, capsys):
    model = pretrained.load(str(classifier_directory))
    function, shape = export.make_classifier(model)
    other = jax.jit(lambda image: function(image) * 1.01)
    program = export.serialize(other, shape, ["cpu"])
    found = export.difference(program, model, shape, resized=True)
    assert found == pytest.approx(0.01, rel=1e-2)
    monkeypatch.setattr(export, "serialize", lambda *_: program)
    out = tmp_path / "program"
    assert export.main(["--checkpoint", str(classifier_directory), "--out", str(out)]) == 1
    assert "0.01 off" in capsys.readouterr().err and not out.exists()


def test_weights_that_are_not_finite(random_classifier):
    model = random_classifier()
    model.params["classifier"] = {k: x * np.nan for k, x in model.params["classifier"].items()}
    function, shape = export.make_classifier(model)
    program = export.serialize(function, shape, ["cpu"])
    with pytest.raises(ValueError, match="own logits are not finite"):
        export.difference(program, model, shape, resized=True)


def test_a_head_of_zeros_is_no_error(random_classifier):
    model = random_classifier()
    model.params["classifier"] = {k: x * 0 for k, x in model.params["classifier"].items()}
    function, shape = export.make_classifier(model)
    program = export.serialize(function, shape, ["cpu"])
    assert export.difference(program, model, shape, resized=True) == 0


def test_weights_that_no_program_holds(monkeypatch, random_classifier):
    model = random_classifier()
    monkeypatch.setattr(export, "_MOST_BYTES", 400_000)  # of 560,000 in float32
    with pytest.raises(ValueError, match="GB in float32: use --dtype bfloat16, or convert to-hf"):
        export.check_size(model, "float32")
    export.check_size(model, "bfloat16")


def test_nothing_is_overwritten(tmp_path, classifier_directory, capsys, random_classifier):
    """An export for HuggingFace, which `convert` would replace, is not ours to replace."""
    other = save(random_classifier(), tmp_path / "hf")
    files = {path.name: path.read_bytes() for path in other.iterdir()}
    with pytest.raises(SystemExit, match="2"):
        export.main(["--checkpoint", str(classifier_directory), "--out", str(other)])
    assert "name a new or an empty directory" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in other.iterdir()} == files


def test_a_network_without_a_classifier(tmp_path, capsys, random_classifier):
    model = random_classifier(head="mim", vocab_size=8, use_mask_token=True)
    convert.save_hf(tmp_path / "hf", model.params, model.info.architecture, None, model.info.image)
    command = ["--checkpoint", str(tmp_path / "hf"), "--out", str(tmp_path / "program")]
    assert export.main(command) == 2
    assert "is no classifier; fine-tune it first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "nothing"], "There is no file or directory nothing"),
        (["--platforms", "tpu"], "--platforms is tpu, and the program is tried on cpu"),
        (["--size", "0", "3"], "--size must be at least 1 1, got 0 3"),
    ],
)
def test_bad_input(tmp_path, classifier_directory, flags, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = export.main(
            ["--checkpoint", str(classifier_directory), "--out", "program", *flags]
        )
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "program").exists()
