"""The main job: from a checkpoint of others, over fine-tuning, to predictions and back."""

import csv
import functools
import json
import os
import shutil
import time

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from beit_jax import checkpoint, convert, errors, fileio, predict, pretrained, report, train
from beit_jax.data import inputs
from configs import image_folder, lora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

RUN = {
    "batch_size": 8,
    "total_steps": 12,
    "eval_every": "6",
    "save_every": "6",
    "log_every": "1",
    "data.train": "train[:80%]",
    "data.val": "train[80%:]",
    "data.test": "train[80%:]",
    "optim.warmup": "0",
    "tensorboard": False,
    "mistakes": 0,
    "compile_cache": "",
}
FEW = {"red": [f"{i}.png" for i in range(3, 20)]}  # what is left out of a folder
STILL = {"optim.learning_rate": 0.0, "optim.end_value": 0.0, "total_steps": 1, "data.val": ""}


def finetune(workdir, images, pretrained, changes=()):
    config = image_folder.get_config(str(images))
    config.update_from_flattened_dict(RUN | {"pretrained": str(pretrained)} | dict(changes))
    return train.run(config, str(workdir))


def params_of(workdir):
    return traverse_util.flatten_dict(checkpoint.load_params(workdir), sep="/")


def architecture_of(workdir):
    return checkpoint.read_model_info(workdir).architecture


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, image_dir, hf_directory):
    """A finished run, and what it returned."""
    workdir = tmp_path_factory.mktemp("finetuned")
    changes = {"optim.learning_rate": 1e-2}
    return workdir, finetune(workdir, image_dir, hf_directory, changes)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, finetuned, start):
    """The finished run as a HuggingFace directory."""
    path = tmp_path_factory.mktemp("exported") / "hf"
    status, output = start("beit_jax.convert", "to-hf", finetuned[0], path, "--verify").wait()
    assert status == 0, output
    return path


def predict_with_transformers(directory, paths):
    """Class names, and probabilities [N, K] by transformers' own processor and model."""
    model = transformers.BeitForImageClassification.from_pretrained(directory).eval()
    processor = transformers.BeitImageProcessorPil.from_pretrained(directory)
    images = [Image.open(path).convert("RGB") for path in paths]
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    names = [model.config.id2label[i] for i in range(logits.shape[1])]
    return names, logits.softmax(-1).numpy()


def test_checkpoint_decides_the_architecture(tmp_path, image_dir, hf_directory):
    finetune(tmp_path, image_dir, hf_directory, STILL)
    info = checkpoint.read_model_info(tmp_path)
    assert info.architecture["hidden_size"] == 16
    assert info.architecture["patch_size"] == 4
    assert tuple(info.architecture["image_size"]) == (16, 16)
    assert info.class_names == ["blue", "green", "red"]
    assert info.pretrained == str(hf_directory)
    loaded = convert.load(hf_directory)
    expected = traverse_util.flatten_dict(loaded.params, sep="/")
    order = [loaded.class_names.index(name) for name in info.class_names]
    for name, array in params_of(tmp_path).items():
        of_checkpoint = expected[name]
        if name.startswith("classifier/"):
            of_checkpoint = of_checkpoint[..., order]
        np.testing.assert_array_equal(array, of_checkpoint, err_msg=name)


def test_evaluation_agrees_with_transformers(tmp_path, image_dir, hf_directory):
    config = image_folder.get_config(f"{image_dir},test")
    config.update(pretrained=str(hf_directory), compile_cache="")
    results = train.run(config, str(tmp_path))
    paths = [path for name in ("blue", "green", "red") for path in image_dir.glob(f"{name}/*")]
    names, probability = predict_with_transformers(hf_directory, paths)
    label = np.array([names.index(path.parent.name) for path in paths])
    loss = -np.log(probability[np.arange(len(label)), label]).mean()
    assert results["test"]["count"] == 60
    assert results["test"]["loss"] == pytest.approx(loss, abs=1e-3)
    assert results["test"]["accuracy"] == pytest.approx((probability.argmax(-1) == label).mean())


def test_overrides_and_resolution(tmp_path, image_dir, hf_directory, caplog):
    caplog.set_level("INFO")
    changes = {"model.image_size": 24, "model.drop_path_rate": 0.25}
    finetune(tmp_path, image_dir, hf_directory, STILL | changes)
    assert tuple(architecture_of(tmp_path)["image_size"]) == (24, 24)
    assert architecture_of(tmp_path)["drop_path_rate"] == 0.25
    assert "positions resized from (4, 4) to (6, 6) by unilm" in caplog.text
    table = params_of(tmp_path)["layer_1/attention/relative_position_bias_table"]
    assert table.shape == (11 * 11 + 3, 2)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("", {"optim.learning_rate": 5e-5, "optim.layer_decay": 0.85, "lora.rank": 0}),
        ("lora", {"lora.rank": 16, "optim.layer_decay": 1.0, "trainable": "all"}),
        ("head", {"trainable": "head", "model.drop_path_rate": 0.0}),
        ("bias", {"trainable": "bias"}),
        ("pretrained", {"optim.layer_decay": 0.65, "trainable": "all", "num_epochs": 50}),
        ("scratch", {"optim.layer_decay": 1.0, "pretrained": "", "preset": "small"}),
        ("other", {"optim.learning_rate": 5e-5, "trainable": "all"}),  # is a folder's name
    ],
)
def test_what_is_trained_is_an_argument(how, expected):
    config = image_folder.get_config(f"some,where,{how}" if how else "some,where")
    found = {key: functools.reduce(getattr, key.split("."), config) for key in expected}
    assert found == expected
    suffix = ",other" if how == "other" else ""
    assert config.data.name == f"folder:some,where{suffix}"
    if how not in ("", "other"):
        assert config.optim.learning_rate > 1e-4


def test_misspelt_arguments_are_told(tmp_path):
    """Beside a folder that is there; what is no folder may have commas."""
    with pytest.raises(ValueError, match="After hf:a/b may follow nothing; got test"):
        lora.get_config("hf:a/b,test")
    for words in ("Lora", "lora, head"):
        message = f"After {tmp_path} may follow one of lora, .*, test; got {words}."
        with pytest.raises(ValueError, match=message):
            image_folder.get_config(f"{tmp_path},{words.replace(' ', '')}")
    (tmp_path / "a").mkdir()
    (tmp_path / "a,b").mkdir()
    assert image_folder.get_config(f"{tmp_path}/a,b").data.name == f"folder:{tmp_path}/a,b"


def test_measures_images_of_some_classes(tmp_path, image_dir, finetuned, caplog):
    """Of a model of three; a class that it does not have is told."""
    config = image_folder.get_config(f"{tmp_path / 'some'},test")
    config.update(pretrained=str(finetuned[0]), compile_cache="")
    for name in ("green", "red"):
        shutil.copytree(image_dir / name, tmp_path / "some" / name)
    results = train.run(config, str(tmp_path / "own"))
    assert results["test"]["count"] == 40 and results["test"]["accuracy"] == 1.0
    (tmp_path / "some" / "red").rename(tmp_path / "some" / "pink")
    with pytest.raises(ValueError, match="classes pink that are not among the 3 expected: blue, "):
        train.run(config, str(tmp_path / "other"))


def test_classes_by_number(tmp_path, image_dir, finetuned, caplog):
    """Of a folder whose classes have other names, in the order of the model's."""
    caplog.set_level("INFO")
    images = tmp_path / "images"
    for new, name in enumerate(("blue", "green", "red")):
        shutil.copytree(image_dir / name, images / f"n{new}")
    config = image_folder.get_config(f"{images},test")
    config.update(pretrained=str(finetuned[0]), compile_cache="")
    with pytest.raises(ValueError, match="classes n0, n1, n2 that are not among") as error:
        train.run(config, str(tmp_path / "names"))
    assert "--config.pretrained_classes=numbers" in errors.message(error.value)
    config.pretrained_classes = "numbers"
    results = train.run(config, str(tmp_path / "numbers"))
    assert results["test"]["count"] == 60 and results["test"]["accuracy"] == 1.0

    for name in ("n1", "n2"):
        images.joinpath(name).rename(tmp_path / name)
    with pytest.raises(ValueError, match="classes n0 that are not among the 3") as error:
        config.pretrained_classes = "names"
        train.run(config, str(tmp_path / "one"))
    assert "numbers" not in errors.message(error.value)
    (tmp_path / "n1").rename(images / "n1")
    with pytest.raises(ValueError, match="has 3 classes, not 2"):
        finetune(tmp_path / "two", images, finetuned[0], STILL | {"pretrained_classes": "numbers"})
    (tmp_path / "n2").rename(images / "n2")

    caplog.clear()
    finetune(tmp_path / "new", images, finetuned[0], STILL)
    assert "is not used: it has other classes, such as blue. Where the same" in caplog.text
    finetune(tmp_path / "kept", images, finetuned[0], STILL | {"pretrained_classes": "numbers"})
    assert "by their order: blue is n0, green is n1, red is n2." in caplog.text
    for name, x in params_of(finetuned[0]).items():
        np.testing.assert_array_equal(params_of(tmp_path / "kept")[name], x)


def test_only_tests_where_the_folder_has_a_test(tmp_path, image_dir):
    for split in ("train", "test"):
        shutil.copytree(image_dir, tmp_path / split)
    config = inputs.with_own_splits(image_folder.get_config(f"{tmp_path},test"))
    assert (config.eval_only, config.data.val, config.data.test) == (True, "", "test")


def test_few_steps_are_told(tmp_path, image_dir, hf_directory, caplog):
    few = {"total_steps": None, "num_epochs": 2.0}
    with pytest.raises(ValueError, match="num_labels is 7"):  # first what stops the run
        changes = STILL | few | {"model.num_labels": 7}
        finetune(tmp_path, image_dir, hf_directory, changes)
    assert "training steps: lower config.batch_size" not in caplog.text
    finetune(tmp_path, image_dir, hf_directory, STILL | few)
    assert "training steps: lower config.batch_size" in caplog.text


def test_a_step_of_a_workdir(tmp_path, image_dir, hf_directory):
    changes = {"optim.learning_rate": 1e-2, "total_steps": 4, "save_every": "2", "keep_last": 3}
    finetune(tmp_path / "run", image_dir, hf_directory, changes | {"eval_every": "2"})
    for step in ("best", "latest", 2):
        expected = checkpoint.load_params(tmp_path / "run", step)
        found = pretrained.load(f"{tmp_path / 'run'}@{step}").params
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    a, b = (pretrained.load(f"{tmp_path / 'run'}@{step}").params for step in (2, 4))
    assert not np.array_equal(a["classifier"]["kernel"], b["classifier"]["kernel"])
    with pytest.raises(ValueError, match="ends in @newest; expected @best, @latest or @ and a"):
        pretrained.load(f"{tmp_path / 'run'}@newest")
    with pytest.raises(FileNotFoundError, match="has no step 3; available: 2, 4"):
        pretrained.load(f"{tmp_path / 'run'}@3")


def test_other_classes_get_a_new_head(tmp_path, image_dir, hf_directory, caplog):
    caplog.set_level("INFO")
    images = shutil.copytree(image_dir, tmp_path / "images")
    shutil.rmtree(images / "red")
    finetune(tmp_path / "run", images, hf_directory, STILL)
    assert "Randomly initialised: classifier/bias, classifier/kernel." in caplog.text
    assert "is not used: it has other classes, such as red." in caplog.text
    assert params_of(tmp_path / "run")["classifier/kernel"].shape == (16, 2)
    finetune(tmp_path / "next", image_dir, tmp_path / "run", STILL)
    assert f"The classifier of {tmp_path / 'run'} is not used" in caplog.text


def test_classes_without_names_are_told(hf_directory, caplog):
    caplog.set_level("INFO")
    start = pretrained.load(str(hf_directory))
    unnamed = start._replace(info=start.info._replace(class_names=[f"LABEL_{i}" for i in range(3)]))
    names = ["blue", "green", "red"]
    assert pretrained.with_head_for(unnamed, names) is unnamed
    told = "by their order: number 0 is blue, number 1 is green, number 2 is red."
    assert f"Classes of {hf_directory} {told}" in caplog.text
    caplog.clear()
    pretrained.with_head_for(unnamed, unnamed.info.class_names)
    assert not caplog.text


def test_a_mask_token_is_left_out_of_an_evaluation(tmp_path, image_dir, hf_directory):
    """transformers keeps that of pre-training in its classifiers."""
    source = shutil.copytree(hf_directory, tmp_path / "masked")
    model = transformers.BeitForImageClassification.from_pretrained(
        hf_directory, use_mask_token=True
    )
    model.save_pretrained(source)
    expected = finetune(tmp_path / "plain", image_dir, hf_directory, {"eval_only": True})
    found = finetune(tmp_path / "run", image_dir, source, {"eval_only": True})
    assert found["test"] == expected["test"]


def test_new_head_is_no_evaluation(tmp_path, image_dir, hf_directory):
    changes = {"eval_only": True, "data.name": "digits"}
    with pytest.raises(ValueError, match="has 3 classes, and digits has 10 .0, 1, 2, 3, "):
        finetune(tmp_path / "run", image_dir, hf_directory, changes)
    changes = {"eval_only": True, "model.num_hidden_layers": 1}
    with pytest.raises(ValueError, match="layer_1/attention/.* missing in the model") as error:
        finetune(tmp_path / "run", image_dir, hf_directory, changes)
    assert "evaluate on images of the checkpoint's classes" in error.value.__notes__[0]


def test_masked_image_modeling_checkpoint(tmp_path, image_dir, mim_directory, caplog):
    caplog.set_level("INFO")
    model = transformers.BeitForMaskedImageModeling.from_pretrained(mim_directory)
    tables = [p for name, p in model.named_parameters() if "relative_position_bias_table" in name]
    (shared,) = tables
    finetune(tmp_path / "run", image_dir, mim_directory, STILL)
    assert "classifier/kernel" in caplog.text
    params = params_of(tmp_path / "run")
    for layer in range(2):
        table = params[f"layer_{layer}/attention/relative_position_bias_table"]
        np.testing.assert_array_equal(table, shared.detach().numpy())
    assert not any(name.startswith(("lm_head", "embeddings/mask_token")) for name in params)


def test_learns_colours(finetuned):
    _, results = finetuned
    assert results["test"]["accuracy"] == 1.0
    assert results["test"]["count"] == 12


def test_killed_before_the_first_checkpoint(tmp_path, start, flags, image_dir, hf_directory):
    """The second start is from the pretrained weights as well."""
    changes = RUN | {"pretrained": hf_directory, "save_every": "0", "total_steps": 300}
    arguments = flags(tmp_path, changes, config=f"configs/image_folder.py:{image_dir}")
    first = []
    for _ in range(2):
        program, log = start("main.py", *arguments), tmp_path / "metrics.jsonl"
        while program.is_alive() and not (log.exists() and log.read_text().endswith("\n")):
            time.sleep(0.01)
        program.kill()
        assert program.wait().status == -9, program.output
        first.append(json.loads(log.read_text().splitlines()[0])["train/loss"])
        log.unlink()
    assert first[0] == first[1]


def test_splits_of_different_sizes(tmp_path, image_dir, hf_directory):
    """Images of one size in train, of several in test: both are read in the same way."""
    shutil.copytree(image_dir, tmp_path / "images" / "test")
    odd = shutil.ignore_patterns("*[13579].png")
    shutil.copytree(image_dir, tmp_path / "images" / "train", ignore=odd)
    changes = STILL | {"data.train": "train", "data.test": "test", "model.image_size": 8}
    results = finetune(tmp_path / "run", tmp_path / "images", hf_directory, changes)
    assert results["test"]["count"] == 60


def test_balanced_classes(tmp_path, image_dir, hf_directory):
    """With few of one class, its weight is seen in the loss of the first step."""
    images = tmp_path / "images"
    shutil.copytree(image_dir, images, ignore=lambda path, names: FEW.get(path[-3:], []))
    changes = STILL | {"data.train": "train", "data.test": "", "batch_size": 16}
    found = []
    for kind in ("none", "balanced"):
        finetune(tmp_path / kind, images, hf_directory, changes | {"class_weights": kind})
        lines = report.read_metrics(tmp_path / kind)
        found.append(lines[0]["train/loss"])
    assert abs(found[0] - found[1]) > 1e-3


def test_changed_data_are_refused(tmp_path, image_dir, hf_directory):
    images = shutil.copytree(image_dir, tmp_path / "images")
    finetune(tmp_path / "run", images, hf_directory, STILL)
    shutil.copy(images / "red" / "1.png", images / "red" / "copy.png")
    with pytest.raises(ValueError, match="The data of train, test have changed since"):
        finetune(tmp_path / "run", images, hf_directory, STILL)


def test_own_workdir_as_pretrained(tmp_path, image_dir, finetuned):
    finetune(tmp_path, image_dir, finetuned[0], STILL)
    expected = params_of(finetuned[0])
    for name, array in params_of(tmp_path).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("form", ["csv", "json"])
def test_predictions_agree_with_transformers(tmp_path, start, image_dir, finetuned, exported, form):
    out = tmp_path / f"predictions.{form}"
    status, output = start(
        "beit_jax.predict",
        *("--checkpoint", finetuned[0], "--images", image_dir, "--out", out, "--top-k", 2),
    ).wait()
    assert status == 0, output
    assert "60 predictions, 0 not read" in output
    rows = read_rows(out)
    names, probability = predict_with_transformers(exported, [row["path"] for row in rows])
    assert len(rows) == 60
    for row, expected in zip(rows, probability, strict=True):
        best = np.argsort(-expected)[:2]
        assert row["label"] == names[best[0]]
        assert float(row["probability"]) == row["top"][0][1]
        assert [name for name, _ in row["top"]] == [names[k] for k in best]
        assert [p for _, p in row["top"]] == pytest.approx(expected[best], abs=1e-3)


def read_rows(path):
    """Rows of a JSON or CSV file, both as JSON has them."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    header = "path label probability class_1 probability_1 class_2 probability_2 error"
    assert " ".join(rows[0]) == header
    pairs = (("class_1", "probability_1"), ("class_2", "probability_2"))
    return [
        row | {"top": [(row[name], float(row[p])) for name, p in pairs if row[name]]}
        for row in rows
    ]


def test_image_that_cannot_be_read(tmp_path, start, image_dir, finetuned):
    images = shutil.copytree(image_dir / "red", tmp_path / "images")
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:70])
    out = tmp_path / "predictions.csv"
    status, output = start(
        "beit_jax.predict", "--checkpoint", finetuned[0], "--images", images, "--out", out
    ).wait()
    assert status == 3
    assert f"not read: {images}/3.png" in output
    assert output.count("3.png") == 1
    assert "19 predictions, 1 not read" in output
    with open(out, newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    bad = rows.pop(f"{images}/3.png")
    assert bad["error"] and not bad["label"]
    assert all(row["label"] == "red" and not row["error"] for row in rows.values())


def test_images_of_a_list(tmp_path, image_dir, classifier_directory):
    names = [f"red/{i}.png" for i in (0, 2)] + ["blue/1.png"]
    listed = tmp_path / "list.csv"
    rows = [f"{os.path.relpath(image_dir / name, tmp_path)},?" for name in names]
    listed.write_text("\n".join(["image,label", *rows]))
    arguments = ["--checkpoint", str(classifier_directory), "--images", str(listed)]
    assert predict.main([*arguments, "--out", str(tmp_path / "out.csv")]) == 0
    with open(tmp_path / "out.csv", newline="") as file:
        found = [os.path.realpath(row["path"]) for row in csv.DictReader(file)]
    assert found == [os.path.realpath(image_dir / name) for name in names]


@pytest.mark.parametrize("form", ["csv", "json"])
def test_names_that_are_not_utf_8(tmp_path, image_dir, classifier_directory, form):
    folder, out = tmp_path / "images", tmp_path / f"out.{form}"
    name = os.fsencode(folder) + b"/caf\xe9.png"
    folder.mkdir()
    shutil.copy(image_dir / "red" / "0.png", name)
    arguments = ["--checkpoint", str(classifier_directory), "--images", str(folder)]
    assert predict.main([*arguments, "--out", str(out)]) == 0
    if form == "csv":
        assert name in out.read_bytes()
    else:
        assert os.fsencode(json.loads(out.read_text())[0]["path"]) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there.csv", "expected a file, found a folder or device"),
        (f"{'x' * 250}.csv", "it cannot be written: File name too long"),
    ],
)
def test_where_nothing_can_be_written(tmp_path, capsys, name, message):
    """Is told before the work."""
    (tmp_path / "there.csv").mkdir()
    arguments = ["--checkpoint", "none", "--images", "none", "--out", str(tmp_path / name)]
    with pytest.raises(SystemExit, match="2"):
        predict.main(arguments)
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["there.csv"]


def test_writing_that_fails(tmp_path, image_dir, classifier_directory, monkeypatch, capsys):
    def replace(*_):
        raise OSError("no space left")

    monkeypatch.setattr(fileio.os, "replace", replace)
    arguments = ["--checkpoint", str(classifier_directory), "--images", str(image_dir / "red")]
    assert predict.main([*arguments, "--out", str(tmp_path / "out.csv")]) == 2
    assert "no space left" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def by_name(out):
    """{path: {class: probability}} of a JSON file."""
    return {row["path"]: dict(row["top"]) for row in json.loads(out.read_text())}


def test_ensemble_is_the_mean(tmp_path, start, finetuned, hf_directory, image_dir):
    """Of two models that number the classes differently."""
    found = []
    for number, models in enumerate([[finetuned[0]], [hf_directory], [finetuned[0], hf_directory]]):
        out = tmp_path / f"{number}.json"
        arguments = ("--images", image_dir / "red", "--out", out)
        checkpoints = [x for model in models for x in ("--checkpoint", model)]
        finished = start("beit_jax.predict", *checkpoints, *arguments).wait()
        assert finished.status == 0, finished.output
        found.append(by_name(out))
    first, second, both = found
    assert len(both) == 20
    for path, probability in both.items():
        assert probability.keys() == {"red", "green", "blue"}
        for name, value in probability.items():
            assert value == pytest.approx((first[path][name] + second[path][name]) / 2, abs=1e-6)


def test_ensemble_of_other_classes(tmp_path, start, finetuned, hf_directory, image_dir):
    other = shutil.copytree(hf_directory, tmp_path / "other")
    text = (other / "config.json").read_text().replace('"green"', '"teal"')
    (other / "config.json").write_text(text)
    out = tmp_path / "predictions.csv"
    arguments = ("--images", image_dir, "--out", out)
    finished = start("beit_jax.predict", "--checkpoint", finetuned[0], other, *arguments).wait()
    assert finished.status == 2
    assert "The models have different classes" in finished.output
    assert "green, teal" in finished.output
    assert not out.exists()


@pytest.mark.parametrize("images", ["none", "empty"])
def test_no_images(tmp_path, start, finetuned, images):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "predictions.csv"
    arguments = ("--checkpoint", finetuned[0], "--images", tmp_path / images, "--out", out)
    status, output = start("beit_jax.predict", *arguments).wait()
    assert status == 2
    assert str(tmp_path / images) in output
    assert "Traceback" not in output
    assert not out.exists()


def test_checkpoint_without_a_classifier_predicts_nothing(tmp_path, start, image_dir):
    config = transformers.BeitConfig(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BeitForMaskedImageModeling(config).save_pretrained(tmp_path)
    out = tmp_path / "predictions.csv"
    arguments = ("--checkpoint", tmp_path, "--images", image_dir, "--out", out)
    status, output = start("beit_jax.predict", *arguments).wait()
    assert status == 2
    assert "is no classifier" in output
