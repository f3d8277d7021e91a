"""What the layers of a frozen network know: features, linear probes, nearest neighbours."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from sklearn.neighbors import KNeighborsClassifier

from beit_jax import checkpoint, compare, inference, knn, pretrained, train
from beit_jax.data import inputs, sources
from beit_jax.metrics import wilson_interval
from beit_jax.models import beit, features, vit
from beit_jax.tasks import linear_probe as task
from beit_jax.tasks.task import Data
from configs import image_folder, linear_probe

SMALL = dict(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=8,
    patch_size=4,
    num_labels=10,
    use_absolute_position_embeddings=True,
    initializer_range=0.3,
    head_init_scale=1.0,
    drop_path_rate=0.0,
)
RUN = {
    "data.train": "train[:600]",
    "data.val": "train[600:700]",
    "data.test": "test[:100]",
    "batch_size": 64,
    "num_epochs": 20.0,
    "optim.learning_rate": 0.1,
    "eval_every": "10ep",
    "save_every": "5ep",
    "tensorboard": False,
    "compile_cache": "",
}


@pytest.fixture(scope="module")
def network():
    model = beit.Model(**SMALL)
    image = jax.random.normal(jax.random.key(1), (5, 8, 8, 3))
    return model, model.init(jax.random.key(0), image)["params"], image


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, network):
    """A network with random weights as a model on disk, which is no classifier of digits."""
    path = tmp_path_factory.mktemp("network")
    image = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    image |= {"crop": "squash", "crop_pct": 1.0}
    names = [f"class {i}" for i in range(10)]
    checkpoint.write_model_info(
        path, checkpoint.ModelInfo("beit", "classify", SMALL, names, image, None)
    )
    with checkpoint.Checkpointer(path) as saver:
        saver.save(0, {"params": jax.device_get(network[1])})
    return path


def probe(path, pretrained, changes=()):
    config = linear_probe.get_config("digits")
    config.update_from_flattened_dict(RUN | {"pretrained": str(pretrained)} | dict(changes))
    return train.run(config, str(path))


def test_layer_outputs_are_those_of_the_layers(network):
    model, params, image = network
    found = features.layer_outputs(model, params, image)
    assert [x.shape for x in found] == [(5, 5, 16)] * 3
    norm = nn.LayerNorm(model.config.layer_norm_eps)
    pooled = norm.apply({"params": params["pooler_layernorm"]}, found[-1][:, 1:].mean(1))
    head = params["classifier"]
    logits = pooled @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, model.apply({"params": params}, image), atol=1e-5)


READERS = {
    "beit, class token": (beit, {"use_mean_pooling": False}, {}),
    "beit, masked": (beit, {"head": "mim", "vocab_size": 5}, {"masked_index": [[2, 0], [1, 3]]}),
    "vit": (vit, {}, {}),
    "vit, norms after": (vit, {"use_post_norm": True}, {}),
    "deit": (vit, {"use_distillation_token": True, "use_distillation_classifier": True}, {}),
    "registers": (vit, {"num_register_tokens": 2, "remat": "full"}, {}),
}


@pytest.mark.parametrize("family, changes, given", READERS.values(), ids=READERS)
def test_the_last_mlp_sees_what_is_read(family, changes, given):
    """Nothing else, unless somebody looks into the layers, which changes no result."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32, "image_size": 8, "patch_size": 4, "initializer_range": 0.5}
    model = family.Model(**shape, **changes)
    image = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    params = model.init(jax.random.key(1), image)["params"]
    given = {name: jnp.asarray(index) for name, index in given.items()}

    expected, _ = model.apply({"params": params}, image, **given, mutable=["intermediates"])
    found = model.apply({"params": params}, image, **given)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    text = str(jax.make_jaxpr(lambda p: model.apply({"params": p}, image, **given))(params))
    tokens = sorted(int(n) for n in re.findall(r"f32\[2,(\d+),32\]", text))
    read = model.config.num_readout_tokens + len(given and given["masked_index"][0])
    assert {min(tokens), max(tokens)} == {read, model.config.num_prefix + 4}
    outputs = features.layer_outputs(model, params, image, **given)
    assert [x.shape[1] for x in outputs] == [model.config.num_prefix + 4] * 2


def test_layer_outputs_of_a_network_without_layers(network):
    dense = nn.Dense(3)
    params = dense.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    with pytest.raises(ValueError, match="Dense has no layers of tokens"):
        features.layer_outputs(dense, params, jnp.zeros((1, 4)))


def test_pool():
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    with_class = np.concatenate([x[:, 0], x[:, 1:].mean(1)], -1)
    np.testing.assert_allclose(features.pool(x, 1), with_class, rtol=1e-5)
    np.testing.assert_allclose(features.pool(x, 0), x.mean(1), rtol=1e-5)


def test_of_equal_layers_the_one_of_the_lowest_loss_is_best():
    sums = {"correct": [3, 4, 4, 2], "loss": [1.0, 3.0, 2.0, 0.5], "count": 4}
    found = task.summarize(sums)
    assert found["best_layer"] == 2 and found["loss"] == 0.5 and found["accuracy"] == 1


def test_probes_learn_and_the_network_does_not(tmp_path, workdir):
    results = probe(tmp_path, workdir)
    test = results["test"]
    layers = [test[f"accuracy_layer_{i}"] for i in range(3)]
    val = results["val"]
    assert val["accuracy"] == max(val[f"accuracy_layer_{i}"] for i in range(3))
    assert test["best_layer"] == val["best_layer"]  # chosen there, measured here
    assert test["accuracy"] == layers[test["best_layer"]]
    assert test["chosen_by"] == "the validation" and "chosen_by" not in val
    assert min(layers) > 0.5  # random features of digits are good features
    assert test["count"] == 100
    saved = checkpoint.load_params(tmp_path)
    assert saved.keys() == {"probe_0", "probe_1", "probe_2"}
    assert saved["probe_0"]["kernel"].shape == (32, 10)
    assert results["num_trainable_parameters"] == 3 * (32 * 10 + 10)
    assert (tmp_path / "layers.png").stat().st_size > 5000


def test_without_a_validation_the_test_chooses_and_says_so(tmp_path, workdir, caplog):
    test = probe(tmp_path, workdir, {"data.val": "", "data.test": "test[:100]"})["test"]
    assert test["accuracy"] == max(test[f"accuracy_layer_{i}"] for i in range(3))
    assert test["chosen_by"] == "the test" and "selected on the test split itself" in caplog.text


def test_probes_resume(tmp_path, workdir):
    """A run that ended halfway, by its number of steps, has the same bits as one that did not."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"total_steps": 20, "save_every": "10", "data.val": "", "data.test": "test[:100]"}
    changes |= {"optim.schedule": "constant"}
    probe(whole, workdir, changes)
    probe(parts, workdir, changes)
    newest = parts / "checkpoints" / "20"
    for path in sorted(newest.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    newest.rmdir()
    probe(parts, workdir, changes)
    expected, found = checkpoint.load_params(whole), checkpoint.load_params(parts)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_untrained_probes_are_no_evaluation(tmp_path, workdir):
    with pytest.raises(ValueError, match="has not all parameters of the task 'linear_probe'"):
        probe(tmp_path, workdir, {"eval_only": True})


def test_probes_of_other_classes_or_of_another_network_are_no_evaluation(tmp_path, workdir):
    changes = {"total_steps": 2, "eval_only": False}
    network = shutil.copytree(workdir, tmp_path / "network")
    probe(tmp_path / "probe", network, changes)
    start = pretrained.load(str(network))
    info = checkpoint.read_model_info(tmp_path / "probe")
    config = linear_probe.get_config("digits")
    config.pretrained = str(network)
    data = Data(("a", *info.class_names), resized=True)
    with pytest.raises(ValueError, match="The model has 10 classes .0, 1, .* has 11 .a, 0"):
        task.make_task(config, data, start=start, info=info)
    params = jax.tree.map(lambda x: x + 1, checkpoint.load_params(network))
    shutil.rmtree(network / "checkpoints")
    with checkpoint.Checkpointer(network) as saver:
        saver.save(0, {"params": params})
    before = (tmp_path / "probe" / "results.json").read_text()
    with pytest.raises(ValueError, match="used and did not train have changed since"):
        probe(tmp_path / "probe", network, changes | {"eval_only": True})
    assert (tmp_path / "probe" / "results.json").read_text() == before


def test_a_probe_is_no_network(tmp_path, workdir):
    probe(tmp_path, workdir, {"total_steps": 2})
    with pytest.raises(ValueError, match="is of the task 'linear_probe'"):
        pretrained.load(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained": ""}, "Nothing to probe: set config.pretrained"),
        ({"model.image_size": 10}, r"image_size \(10, 10\) must be a multiple of patch_size 4"),
    ],
)
def test_nothing_to_probe(tmp_path, workdir, changes, message):
    with pytest.raises(ValueError, match=message):
        probe(tmp_path, workdir, changes)


def test_neighbours_vote_as_in_scikit_learn():
    rng = np.random.default_rng(0)
    train_x, test_x = (rng.normal(size=(n, 8)).astype(np.float32) for n in (300, 111))
    train_x, test_x = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train_x, test_x))
    direction = rng.normal(size=(8, 4))
    train_y, test_y = ((x @ direction).argmax(1) for x in (train_x, test_x))
    theirs = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train_x, train_y)
    expected = theirs.score(test_x, test_y)
    assert 0.5 < expected < 1
    found = knn.accuracy(train_x, train_y, test_x, test_y, k=20, chunk=50)
    assert found == pytest.approx(expected, abs=1e-9)


def test_knn_command(tmp_path, start, workdir):
    out = tmp_path / "knn.json"
    arguments = ("--data", "digits", "--train", "train[:500]", "--test", "test[:100]", "--k", 5)
    finished = start("beit_jax.knn", "--checkpoint", workdir, *arguments, "--out", out).wait()
    assert finished.status == 0, finished.output
    content = json.loads(out.read_text())
    assert len(content["accuracy"]) == 3 and min(content["accuracy"]) > 0.6
    best = content["best_layer_of_test"]
    assert content["accuracy"][best] == max(content["accuracy"])
    told = f"layer  {best}  accuracy {content['accuracy'][best]:.4f}  highest, on these very im"
    assert told in finished.output


@pytest.mark.parametrize("name", ["digits", "nothing"])
def test_knn_names_its_flags_where_a_split_is_wrong(workdir, capsys, name):
    arguments = ["--checkpoint", str(workdir), "--data", name, "--test", "dev"]
    assert knn.main(arguments) == 2
    is_told = "--train and --test name what knn takes" in capsys.readouterr().err
    assert is_told == (name == "digits")


def test_knn_into_no_folder(tmp_path, start, workdir):
    out = tmp_path / "none" / "knn.json"
    finished = start(
        *("beit_jax.knn", "--checkpoint", workdir, "--data", "digits", "--out", out)
    ).wait()
    assert finished.status == 2
    assert f"--out {out}: there is no folder" in finished.output


@pytest.mark.parametrize("has_test", [True, False])
def test_probes_see_the_images_of_fine_tuning(tmp_path, image_dir, has_test):
    for name in ("train", "test")[: 1 + has_test]:
        shutil.copytree(image_dir, tmp_path / name)
    probe = inputs.with_own_splits(linear_probe.get_config(f"folder:{tmp_path}")).data
    tuning = inputs.with_own_splits(image_folder.get_config(str(tmp_path))).data
    assert probe.name == tuning.name
    assert (probe.train, probe.val, probe.test) == (tuning.train, tuning.val, tuning.test)
    assert probe.test == ("test" if has_test else "train[90%:]")


@pytest.mark.parametrize("other", ["", "test", "valid"])
def test_knn_takes_the_splits_there_are(tmp_path, workdir, image_dir, capsys, other):
    for name in filter(None, ("train", other)):
        shutil.copytree(image_dir, tmp_path / name)
    arguments = ["--checkpoint", str(workdir), "--data", f"folder:{tmp_path}"]
    assert knn.main(arguments) == 0
    train, test = (60, 60) if other else (54, 6)
    names = ("train", other) if other else ("train[:90%]", "train[90%:]")
    expected = f"{test} of {names[1]} by their 20 nearest of {train} of {names[0]}\n"
    assert expected in capsys.readouterr().out


def test_knn_with_a_bad_image(tmp_path, start, workdir, image_dir):
    folder = shutil.copytree(image_dir, tmp_path / "images")
    (folder / "red" / "broken.png").write_bytes(b"no image")
    arguments = ("--checkpoint", workdir, "--data", f"folder:{folder}", "--test", "train[:6]")
    status, output = start("beit_jax.knn", *arguments).wait()
    assert status == 2
    assert "broken.png" in output and "--on-bad-image=skip) goes on without" in output
    status, output = start("beit_jax.knn", *arguments, "--on-bad-image=skip").wait()
    assert status == 0, output
    source = sources.get_source(f"folder:{folder}", "train", on_bad_image="skip")
    bad = [i for i in range(len(source)) if source.id(i).endswith("broken.png")]
    apply = inference.make(knn.describe, pretrained.load(str(workdir)), batch_size=16)
    features, labels = knn.extract(apply, source)
    np.testing.assert_array_equal(labels, np.delete(source.labels(), bad))
    assert all(x.shape == (60, 32) for x in features)


def test_probes_can_be_compared(workdir, tmp_path):
    results = probe(tmp_path / "probe", workdir)
    row = compare.read("probe", [str(tmp_path / "probe")])
    assert row.accuracy == results["test"]["accuracy"]
    expected = wilson_interval(row.accuracy, results["test"]["count"])
    assert (row.low, row.high) == pytest.approx(expected)


def test_knn_with_no_image_left(tmp_path, workdir, capsys):
    for name in ("train/a/0.png", "train/b/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"no image")
    arguments = ["--checkpoint", str(workdir), "--data", f"folder:{tmp_path}", "--test", "train"]
    assert knn.main([*arguments, "--on-bad-image=skip", "--k", "1"]) == 2
    assert "None of the 2 images of folder:" in capsys.readouterr().err


def test_knn_with_more_neighbours_than_images(workdir, capsys):
    splits = ["--train", "train[:10]", "--test", "test[:5]"]
    assert knn.main(["--checkpoint", str(workdir), "--data", "digits", *splits]) == 2
    assert "--k is 20, and train[:10] has 10 images." in capsys.readouterr().err


def test_knn_with_an_unlabelled_test(tmp_path, workdir, image_dir, capsys):
    shutil.copytree(image_dir, tmp_path / "train")
    shutil.copytree(image_dir / "red", tmp_path / "test")
    assert knn.main(["--checkpoint", str(workdir), "--data", f"folder:{tmp_path}"]) == 2
    assert f"test of folder:{tmp_path} has no labels to vote for." in capsys.readouterr().err


def test_knn_into_a_folder(tmp_path, workdir, capsys):
    with pytest.raises(SystemExit, match="2"):
        knn.main(["--checkpoint", str(workdir), "--data", "digits", "--out", str(tmp_path)])
    assert f"--out {tmp_path}: expected a file" in capsys.readouterr().err


def test_knn_without_labels(tmp_path, start, workdir, image_dir):
    finished = start(
        *("beit_jax.knn", "--checkpoint", workdir, "--data", f"folder:{image_dir / 'red'}"),
        *("--train", "train[:10]", "--test", "train[10:]"),
    ).wait()
    assert finished.status == 2
    assert "has no labels to vote for" in finished.output
