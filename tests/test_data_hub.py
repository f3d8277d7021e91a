"""Datasets of HuggingFace's library, made here and read from directories."""

import collections
import shutil

import numpy as np
import pytest

from beit_jax import knn, train
from beit_jax.data import __main__ as command
from beit_jax.data import hub, images, inputs, sources
from beit_jax.data.source import check
from configs import image_folder, linear_probe, pretrain, quickstart

datasets = pytest.importorskip("datasets")

NAMES = ["cat", "dog", "owl"]
SPLITS = {"train": 30, "validation": 6}


def table(number, side=8, **columns):
    """Images sorted by class, as datasets often are; the red of image i is i."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (number, side, side, 3), np.uint8)
    pixels[..., 0] = np.arange(number)[:, None, None]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    content = {"image": list(pixels), "label": list(np.arange(number) * len(NAMES) // number)}
    for name, (kind, values) in columns.items():
        features[name], content[name] = kind, values
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory that save_to_disk has left."""
    path = tmp_path_factory.mktemp("hub") / "saved"
    tables = {name: table(number) for name, number in SPLITS.items()}
    datasets.DatasetDict(tables).save_to_disk(path)
    return path


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """A directory of parquet files, as most repositories of the Hub are."""
    path = tmp_path_factory.mktemp("hub") / "parquet"
    path.mkdir()
    for name, number in SPLITS.items():
        table(number).to_parquet(path / f"{name}-00000-of-00001.parquet")
    return path


def reds(source):
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_reads_images_and_labels(kind, request, tmp_path):
    path = request.getfixturevalue(kind)
    source = sources.get_source(f"hf:{path}", "train", data_dir=tmp_path)
    assert source.class_names == tuple(NAMES) and len(source) == 30
    assert source.image_shape == (8, 8, 3)
    assert sorted(reds(source)) == list(range(30))
    expected = table(30)
    for i in range(len(source)):
        row = int(source.id(i).rpartition("[")[2].rstrip("]"))
        np.testing.assert_array_equal(source[i]["image"], np.asarray(expected[row]["image"]))
        assert source[i]["label"] == expected[row]["label"] == source.labels()[i]


def test_both_ways_of_keeping_it_are_the_same_data(saved, parquet, tmp_path):
    a, b = (
        sources.get_source(f"hf:{path}", "train", data_dir=tmp_path).fingerprint
        for path in (saved, parquet)
    )
    assert a == b != sources.get_source(f"hf:{saved}", "validation").fingerprint


def test_splits_have_all_classes_and_are_the_same_without_labels(saved):
    parts = [sources.get_source(f"hf:{saved}", s) for s in ("train[:80%]", "train[80%:]")]
    assert [collections.Counter(part.labels().tolist()) for part in parts] == [
        {0: 8, 1: 8, 2: 8},
        {0: 2, 1: 2, 2: 2},
    ]
    assert not set(reds(parts[0])) & set(reds(parts[1]))
    blind = sources.get_source(f"hf:{saved}", "train[80%:]", labelled=False)
    assert blind.class_names is None and blind.labels() is None and reds(blind) == reds(parts[1])
    both = sources.get_source(f"hf:{saved}", "train[80%:]+validation")
    assert len(both) == 12 and both.id(11).startswith(f"hf:{saved} validation[")


def test_folder_of_images_keeps_files(tmp_path, image_dir):
    """Rows that are paths; the library takes class names from folders."""
    source = sources.get_source(f"hf:{image_dir}", "train", data_dir=tmp_path)
    assert source.class_names == ("blue", "green", "red") and len(source) == 60
    assert source.image_shape is None  # two sizes
    assert source[0]["image"].dtype == np.uint8


def test_bad_images_are_named(tmp_path):
    rows = {"image": [{"bytes": b"no image", "path": None}] * 2, "label": [0, 1]}
    names = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": datasets.Image(decode=False), "label": names})
    broken = datasets.Dataset.from_dict(rows, features=features)
    broken.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "data")
    source = sources.get_source(f"hf:{tmp_path / 'data'}", "train")
    with pytest.raises(images.BadImageError, match=r"cannot decode hf:.* train\[\d\]"):
        source[0]


def test_columns_of_other_names(tmp_path):
    fine, coarse = (datasets.ClassLabel(names=n) for n in (NAMES, ["small", "large"]))
    columns = {"fine": (fine, [0, 1, 2] * 2), "coarse": (coarse, [0, 1] * 3)}
    two = table(6, **columns).remove_columns("label").rename_column("image", "img")
    two.save_to_disk(tmp_path / "two")
    name = f"hf:{tmp_path / 'two'}"
    with pytest.raises(
        ValueError, match="has no label 'label': .*--label-key. names .* fine, coarse"
    ):
        sources.get_source(name)
    assert sources.get_source(name, label_key="coarse").class_names == ("small", "large")
    with pytest.raises(ValueError, match="has no label 'corse': --config.data.label_key"):
        sources.get_source(name, label_key="corse")
    with pytest.raises(ValueError, match="has no image 'image': --config.data.image_key .* img"):
        sources.get_source(name, image_key="image", label_key="fine")
    assert len(sources.get_source(name, labelled=False)) == 6
    two.remove_columns(["fine", "coarse"]).save_to_disk(tmp_path / "none")
    name = f"hf:{tmp_path / 'none'}"
    assert len(sources.get_source(name, labelled=False)) == 6
    with pytest.raises(ValueError, match="has no label .* Available: none"):
        sources.get_source(name)


def test_labels_that_are_no_classes(tmp_path):
    text = (datasets.Value("string"), ["a", "b"] * 3)
    table(6, text=text).remove_columns("label").rename_column("text", "label").save_to_disk(
        tmp_path / "text"
    )
    with pytest.raises(ValueError, match="The labels 'label' of .* not classes: .*class_encode_"):
        sources.get_source(f"hf:{tmp_path / 'text'}")


def test_splits_with_other_classes(tmp_path):
    other = table(6).cast_column("label", datasets.ClassLabel(names=NAMES[::-1]))
    datasets.DatasetDict(train=table(6), test=other).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match="differ in their classes: train has cat, .* test has owl"):
        sources.get_source(f"hf:{tmp_path / 'two'}", "train+test")
    assert sources.get_source(f"hf:{tmp_path / 'two'}", "test").class_names == ("owl", "dog", "cat")


def test_missing_labels_and_images(tmp_path):
    """-1 and nothing stand for no label, as in tests of the Hub."""
    holes = table(6).to_dict()
    holes["label"] = [0, -1, None, 1, 2, 2]
    holes["image"][0] = None
    features = table(1).features
    path = tmp_path / "data"
    datasets.Dataset.from_dict(holes, features=features).save_to_disk(path)
    source = sources.get_source(f"hf:{path}", on_bad_image="skip")
    row = {int(source.id(i).rpartition("[")[2].rstrip("]")): i for i in range(6)}
    assert source.fingerprint and source.image_shape == (8, 8, 3)
    assert sorted(source.labels()) == [-1, -1, 0, 1, 2, 2]
    for number in (1, 2):
        with pytest.raises(ValueError, match="has label -1; hf:.* has 3 classes, 0 to 2"):
            source[row[number]]
    with pytest.raises(images.BadImageError, match="the file is empty"):
        source[row[0]]


def test_a_split_without_labels_is_told_before_the_run(tmp_path):
    blind = table(6).remove_columns("label").add_column("label", [-1] * 6)
    blind = blind.cast_column("label", datasets.ClassLabel(names=NAMES))
    datasets.DatasetDict(train=table(30), test=blind).save_to_disk(tmp_path / "data")
    config = image_folder.get_config(f"hf:{tmp_path / 'data'},scratch")
    config.data.test, config.compile_cache = "test", ""
    with pytest.raises(ValueError, match="'test' of hf:.* has 6 images without the label"):
        train.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_several_configs_are_told(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "data" / name).mkdir(parents=True)
        table(6).to_parquet(tmp_path / "data" / name / "train.parquet")
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/*.parquet\n" for n in ("one", "two"))
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    name = f"hf:{tmp_path / 'data'}"
    with pytest.raises(ValueError, match=f"configs: write {name}:CONFIG.(.|\n)*'one', 'two'"):
        sources.get_source(name, data_dir=tmp_path / "cache")
    assert len(sources.get_source(f"{name}:two", data_dir=tmp_path / "cache")) == 6


def test_splits_that_number_classes_differently_do_not_vote(tmp_path, train_digits, capsys):
    reversed_ = table(6).cast_column("label", datasets.ClassLabel(names=NAMES[::-1]))
    datasets.DatasetDict(train=table(30), test=reversed_).save_to_disk(tmp_path / "data")
    arguments = ["--checkpoint", str(train_digits), "--data", f"hf:{tmp_path / 'data'}"]
    assert knn.main([*arguments, "--k", "1"]) == 2
    assert "The splits differ in their classes: train has" in capsys.readouterr().err
    assert knn.main([*arguments, "--k", "1", "--test", "train[:50%]"]) == 0
    out = capsys.readouterr().out
    assert "15 images are their own neighbours: train[:50%] shares them." in out
    assert "layer  0  accuracy 1.0000" in out


@pytest.fixture(scope="module")
def train_digits(tmp_path_factory):
    """A run of a tiny network."""
    path = tmp_path_factory.mktemp("run")
    config = quickstart.get_config()
    config.update(total_steps=1, compile_cache="", tensorboard=False)
    config.optim.warmup, config.data.val, config.data.test = "0", "", "test[:10]"
    train.run(config, str(path))
    return path


def test_a_missing_file_is_told(tmp_path, image_dir):
    folder = shutil.copytree(image_dir, tmp_path / "images")
    name, cache = f"hf:{folder}", {"data_dir": tmp_path / "cache"}
    before = sources.get_source(name, **cache).fingerprint
    (folder / "red" / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists hf:.* train\[\d+\], which is not there"):
        assert sources.get_source(name, **cache).fingerprint
    after = sources.get_source(name, on_bad_image="skip", **cache)
    assert after.fingerprint != before
    assert len(check(after)) == 1


def test_fingerprint_changes_with_any_image(tmp_path):
    found = set()
    for name, side in (("a", 8), ("b", 9)):
        content = table(600).to_dict()
        content["image"][401] = table(1, side).to_dict()["image"][0]
        path = tmp_path / name
        datasets.Dataset.from_dict(content, features=table(1).features).save_to_disk(path)
        found.add(sources.get_source(f"hf:{path}").fingerprint)
    assert len(found) == 2


def test_a_split_of_its_own_name(tmp_path):
    """One table is train, whatever part of a dataset it was."""
    both = datasets.concatenate_datasets([table(6), table(6)])
    assert len(both) == 12
    both.save_to_disk(tmp_path / "a:b")
    state = tmp_path / "a:b" / "state.json"
    state.write_text(state.read_text().replace('"_split": null', '"_split": "train+test"'))
    assert len(sources.get_source(f"hf:{tmp_path / 'a:b'}", "train[:50%]")) == 6


def test_what_is_not_there(saved, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="hf:.*empty.*Expected a dataset of the Hub, for"):
        sources.get_source(f"hf:{tmp_path / 'empty'}")
    with pytest.raises(ValueError, match="It has train .30 examples., validation .6 examples."):
        sources.get_source(f"hf:{saved}", "test")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    hub._tables.cache_clear()
    with pytest.raises(ValueError, match="pip install datasets"):
        sources.get_source(f"hf:{saved}")


def test_is_described(saved, capsys):
    assert command.main([f"hf:{saved}", "--split", "validation", "--check"]) == 0
    assert "validation: 6 images, 8 x 8 x 3" in capsys.readouterr().out


def test_splits_are_its_own_as_those_of_a_folder(saved, tmp_path):
    def found(path, *arguments):
        config = image_folder.get_config(",".join([f"hf:{path}", *arguments]))
        data = inputs.with_own_splits(config).data
        return data.train, data.val, data.test

    assert found(saved) == ("train[:90%]", "train[90%:]", "validation")
    assert found(saved, "test") == ("train[:90%]", "", "validation")
    tables = {"train": table(6), "validation": table(6), "test": table(6)}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "all")
    assert found(tmp_path / "all") == ("train", "validation", "test")
    table(6).save_to_disk(tmp_path / "one")
    assert found(tmp_path / "one") == ("train[:80%]", "train[80%:90%]", "train[90%:]")


def test_recipes_take_it(saved, tmp_path):
    assert pretrain.get_config("hf:some/set,tiny,mae").data.name == "hf:some/set"
    assert linear_probe.get_config("tfds:beans").data.name == "tfds:beans"
    config = image_folder.get_config(f"hf:{saved},scratch")
    assert config.data.name == f"hf:{saved}"
    config.preset, config.compile_cache, config.batch_size = "digits", "", 8
    config.data.train, config.data.val, config.data.test = "train", "", "validation"
    config.total_steps, config.optim.warmup, config.tensorboard = 2, "0", False
    results = train.run(config, str(tmp_path / "run"))
    assert results["test"]["count"] == 6
    assert (tmp_path / "run" / "predictions.csv").read_text().count(f"hf:{saved} validation[") == 6
