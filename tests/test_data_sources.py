"""Digits, folders and CSV lists as sources; splits; the fixed class-balanced order."""

import io
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from beit_jax import sharding
from beit_jax.data import __main__ as command
from beit_jax.data import images, inputs, sources
from beit_jax.data.source import balanced_order, check, stratified_fold
from configs import common, image_folder


def save(path, color=(1, 2, 3), size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def class_folders(root, counts, prefix=""):
    for name, count in counts.items():
        for i in range(count):
            save(root / prefix / name / f"{i:03d}.png", color=(i, len(name), 7))


def ids(source):
    return [source.id(i) for i in range(len(source))]


def labels(source):
    return [source[i]["label"] for i in range(len(source))]


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    source = sources.get_source("digits", "all")
    assert len(source) == 1797 and source.class_names == tuple("0123456789")
    assert source.image_shape == (8, 8, 3)
    numbers = [int(id.rpartition("/")[2]) for id in ids(source)]
    assert sorted(numbers) == list(range(1797))
    for i in range(0, 1797, 100):
        example = source[i]
        grey = np.rint(digits.images[numbers[i]] * 255 / 16)
        assert example["image"].dtype == np.uint8 and example["image"].max() == 255
        np.testing.assert_array_equal(example["image"], np.repeat(grey[..., None], 3, -1))
        assert example["label"] == digits.target[numbers[i]]


def test_digits_splits_are_disjoint_and_balanced():
    train, test = sources.get_source("digits", "train"), sources.get_source("digits", "test")
    assert len(train) == 1437 and len(test) == 360
    assert not set(ids(train)) & set(ids(test))
    counts = np.bincount(labels(train)) + np.bincount(labels(test))
    assert np.abs(np.bincount(labels(test)) - counts / 5).max() <= 1


@pytest.mark.parametrize(
    "split,expected",
    [
        ("train[:90%]", slice(0, 90)),
        ("train[90%:]", slice(90, 100)),
        ("train[10:20]", slice(10, 20)),
        ("train[-5:]", slice(95, 100)),
        ("train[25%:75%]", slice(25, 75)),
    ],
)
def test_split_slices(tmp_path, split, expected):
    class_folders(tmp_path, {"a": 60, "b": 40})
    whole = ids(sources.get_source(f"folder:{tmp_path}", "train"))
    assert ids(sources.get_source(f"folder:{tmp_path}", split)) == whole[expected]


@pytest.mark.parametrize("prefix", ["", "train"])
def test_a_folder_is_split_alike_with_and_without_labels(tmp_path, prefix):
    """What is tested on is not pre-trained on."""
    class_folders(tmp_path, {"a": 150, "b": 40, "c": 10}, prefix)
    for split in ("train[:80%]", "train[80%:]"):
        pair = (sources.get_source(f"folder:{tmp_path}", split, labelled=x) for x in (True, False))
        with_labels, without = (set(ids(source)) for source in pair)
        assert with_labels == without and len(without) in (160, 40)


def test_splits_add_up(tmp_path):
    class_folders(tmp_path, {"a": 6, "b": 4}, "train")
    class_folders(tmp_path, {"b": 5, "c": 1}, "test")

    def get(split):
        return sources.get_source(f"folder:{tmp_path}", split)

    train, test = get("train"), get("test")
    assert (len(train), len(test)) == (10, 6)
    assert ids(get("train+test")) == ids(train) + ids(test) == ids(get("all"))
    assert ids(get("test[:50%]+train[5:6]")) == ids(test)[:3] + ids(train)[5:6]
    assert train.class_names == test.class_names == ("a", "b", "c")
    assert labels(test).count(1) == 5 and labels(test).count(2) == 1


@pytest.mark.parametrize(
    "split,message",
    [
        ("val", r"split='val' of folder:.*It has train \(10 examples\).*'train\[:90%\]'"),
        ("train[:200]", "incompatible with 10 examples"),
        ("train[5:5]", r"selects no examples: it has train \(10 examples\)"),
        ("train[", "Error parsing split"),
    ],
)
def test_bad_split_says_what_there_is(tmp_path, split, message):
    class_folders(tmp_path, {"a": 6, "b": 4})
    with pytest.raises(ValueError, match=message):
        sources.get_source(f"folder:{tmp_path}", split)


def test_every_stretch_of_a_folder_is_balanced_and_stable(tmp_path):
    counts = {"rare": 10, "common": 200, "middle": 90}
    class_folders(tmp_path, counts)
    source = sources.get_source(f"folder:{tmp_path}")
    assert source.class_names == ("common", "middle", "rare")
    label = np.array(labels(source))
    for start, stop in itertools.combinations(range(0, 301, 30), 2):
        share = np.bincount(label[start:stop], minlength=3) / (stop - start)
        expected = np.array([200, 90, 10]) / 300
        assert np.abs(share - expected).max() * (stop - start) <= 1.01
    # Hashes of the relative paths: the same on every machine, wherever the folder is.
    first = [os.path.relpath(id, tmp_path) for id in ids(source)[:3]]
    assert first == ["common/172.png", "middle/074.png", "common/019.png"]


def test_order_follows_the_ids_and_not_the_listing():
    names = [f"c{i % 3}/{i}.png" for i in range(50)]
    label = np.arange(50) % 3
    order = balanced_order(names, label)
    shuffle = np.random.default_rng(0).permutation(50)
    again = balanced_order([names[i] for i in shuffle], label[shuffle])
    assert [names[i] for i in order] == [names[shuffle[i]] for i in again]


def test_folders_below_a_class_belong_to_it(tmp_path):
    save(tmp_path / "cat" / "home" / "old" / "1.png")
    save(tmp_path / "cat" / "2.png")
    save(tmp_path / "dog" / "3.png")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "loop").symlink_to(tmp_path)
    source = sources.get_source(f"folder:{tmp_path}")
    assert dict(zip(ids(source), labels(source), strict=True)) == {
        str(tmp_path / "cat/home/old/1.png"): 0,
        str(tmp_path / "cat/2.png"): 0,
        str(tmp_path / "dog/3.png"): 1,
    }


def test_folders_that_link_to_each_other(tmp_path):
    for a, b in ("xy", "yx"):
        save(tmp_path / a / "1.png")
        (tmp_path / a / "link").symlink_to(tmp_path / b)
    found = ids(sources.get_source(f"folder:{tmp_path}"))
    assert len(found) == 4  # each once by its name, and once by the link


def test_links_to_folders_above_are_not_followed(tmp_path):
    save(tmp_path / "other" / "1.png")
    save(tmp_path / "pets" / "cat" / "2.png")
    (tmp_path / "pets" / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "pets" / "cat" / "more").symlink_to(tmp_path / "other")
    found = {
        os.path.relpath(id, tmp_path) for id in ids(sources.get_source(f"folder:{tmp_path}/pets"))
    }
    assert found == {"pets/cat/2.png", "pets/cat/more/1.png"}


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("train", "TEST")])
def test_split_folders_of_other_names(tmp_path, names):
    for name in names:
        class_folders(tmp_path / name, {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match=f"{sorted(names)[0]}.*look like splits"):
        sources.get_source(f"folder:{tmp_path}")
    assert len(sources.get_source(f"folder:{tmp_path}", labelled=False)) == 4


def test_names_that_are_not_utf_8(tmp_path):
    for name in (b"caf\xe9", b"th\xe9"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        save(tmp_path / "1.png")
        os.rename(tmp_path / "1.png", os.path.join(folder, b"\xff.png"))
    source = sources.get_source(f"folder:{tmp_path}")
    assert len(source) == 2 and not check(source) and source.fingerprint


def test_flat_folders_have_no_labels(tmp_path):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "a" / "2.png")
    source = sources.get_source(f"folder:{tmp_path / 'a'}")
    assert source.class_names is None and source[0].keys() == {"image"} and len(source) == 2
    save(tmp_path / "b" / "train" / "1.png")
    save(tmp_path / "b" / "test" / "2.png")
    assert ids(sources.get_source(f"folder:{tmp_path / 'b'}", "test")) == [
        str(tmp_path / "b/test/2.png")
    ]


def test_labelled_false_takes_any_tree(tmp_path):
    save(tmp_path / "1.png")
    save(tmp_path / "deep" / "er" / "2.png")
    (tmp_path / "empty").mkdir()
    source = sources.get_source(f"folder:{tmp_path}", labelled=False)
    assert len(source) == 2 and source[0].keys() == {"image"}
    assert sources.get_source("digits", labelled=False)[0].keys() == {"image"}


def test_images_of_all_splits_are_told(tmp_path, caplog):
    """Of a folder such as STL-10's, for pre-training."""
    for name in ("train/1/a.png", "test/1/b.png", "unlabeled/c.png"):
        save(tmp_path / "stl" / name)
    class_folders(tmp_path / "vehicles", {"train": 3, "plane": 3})  # a class, not a split
    for name, labelled in (("stl", False), ("vehicles", True)):
        config = common.get_config()
        config.data.update(name=f"folder:{tmp_path / name}", labelled=labelled)
        config.data.update(train=None, val="", test=None, shares=("train", "", ""))
        config = inputs.with_own_splits(config)
        inputs.open_splits(config.data, sharding.make_mesh())
    told = [message for message in caplog.messages if "are read" in message]
    assert len(told) == 1
    assert "stl holds test, train next to other folders or images: all of them" in told[0]


def test_class_names_are_the_same_on_every_machine(tmp_path):
    composed, apart = "K\u00e4se", "Ka\u0308se"
    class_folders(tmp_path, {composed: 2, "a": 1}, "train")
    class_folders(tmp_path, {apart: 1, "a": 1}, "test")
    train, test = (sources.get_source(f"folder:{tmp_path}", x) for x in ("train", "test"))
    assert train.class_names == test.class_names == (composed, "a")
    assert sorted(labels(train)) == [0, 0, 1] and sorted(labels(test)) == [0, 1]
    names = ("a", apart)
    assert sources.get_source(f"folder:{tmp_path}", class_names=names).class_names == names


def test_ambiguous_layouts_are_errors(tmp_path):
    class_folders(tmp_path / "a", {"cat": 1, "dog": 1})
    save(tmp_path / "a" / "loose.png")
    with pytest.raises(ValueError, match="1 images beside them .loose.png"):
        sources.get_source(f"folder:{tmp_path / 'a'}")
    class_folders(tmp_path / "b", {"cat": 1, "dog": 1}, "train")
    class_folders(tmp_path / "b", {"extra": 1})
    with pytest.raises(ValueError, match="split folder 'train' beside extra: name one folder"):
        sources.get_source(f"folder:{tmp_path / 'b'}")
    class_folders(tmp_path / "c", {"train": 2, "plane": 2})  # a class, not a split
    assert sources.get_source(f"folder:{tmp_path / 'c'}").class_names == ("plane", "train")
    class_folders(tmp_path / "d", {"cat": 1}, "train")
    save(tmp_path / "d" / "test" / "1.png")
    assert sources.get_source(f"folder:{tmp_path / 'd'}", "test").class_names is None
    with pytest.raises(ValueError, match="in part without labels"):
        sources.get_source(f"folder:{tmp_path / 'd'}", "train+test")


def test_empty_folders_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        sources.get_source(f"folder:{tmp_path / 'nowhere'}")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="notes.txt is a file; expected a folder of images"):
        sources.get_source(f"folder:{tmp_path / 'notes.txt'}")
    with pytest.raises(FileNotFoundError, match=r"no images in .*looked for \.jpg \.jpeg \.jfif"):
        sources.get_source(f"folder:{tmp_path}")
    class_folders(tmp_path, {"cat": 1})
    (tmp_path / "unicorn").mkdir()
    with pytest.raises(ValueError, match="no images in the class folders unicorn of"):
        sources.get_source(f"folder:{tmp_path}")


def test_check_lists_empty_folders_beside_broken_files(tmp_path, capsys):
    class_folders(tmp_path, {"cat": 2}, prefix="train")
    class_folders(tmp_path, {"cat": 1}, prefix="test")
    for name in ("train/dog", "test/eel"):
        (tmp_path / name).mkdir()
    (tmp_path / "test/cat/broken.png").write_bytes(b"")
    assert command.main([f"folder:{tmp_path}"]) == 2
    told = f"no images in the class folders train/dog, test/eel of {tmp_path}; looked for .jpg"
    error = capsys.readouterr().err
    assert told in error and "remove these folders, or put images there" in error
    assert command.main([f"folder:{tmp_path}", "--check"]) == 1
    out = capsys.readouterr().out
    assert told in out and "broken.png: the file is empty" in out and "1 of 4 images" in out
    (tmp_path / "test/cat/broken.png").unlink()
    assert command.main([f"folder:{tmp_path}", "--check"]) == 1


def test_class_names_set_the_numbers(tmp_path):
    class_folders(tmp_path, {"cat": 2, "dog": 2})
    source = sources.get_source(f"folder:{tmp_path}", class_names=["fish", "dog", "cat"])
    assert source.class_names == ("fish", "dog", "cat") and sorted(labels(source)) == [1, 1, 2, 2]
    with pytest.raises(ValueError, match="the classes cat that are not among the 2 expected"):
        sources.get_source(f"folder:{tmp_path}", class_names=["fish", "dog"])


def write_csv(path, *rows, encoding="utf-8"):
    path.write_text("\n".join(rows) + "\n", encoding=encoding)
    return f"folder:{path}"


@pytest.mark.parametrize("column", ["image", "file_name", "path"])
def test_csv(tmp_path, column):
    for i in range(3):
        save(tmp_path / "images" / f"{i}.png", color=(i, i, i))
    name = write_csv(
        tmp_path / "list.csv",
        f"{column},label,comment",
        "images/0.png,dog,x",
        'images/1.png,"cat, small",',
        f"{tmp_path}/images/2.png,dog,",
        encoding="utf-8-sig",
    )
    source = sources.get_source(name)
    assert source.class_names == ("cat, small", "dog")
    got = {int(source[i]["image"][0, 0, 0]): source[i]["label"] for i in range(3)}
    assert got == {0: 1, 1: 0, 2: 1}
    assert all(id.startswith(str(tmp_path)) for id in ids(source))


def test_csv_with_numbers_splits_and_classes(tmp_path):
    save(tmp_path / "0.png")
    rows = ["image,label,split", "0.png,0,train", "0.png,10,train", "0.png,9,test"]
    name = write_csv(tmp_path / "list.csv", *rows)
    train, test = sources.get_source(name, "train"), sources.get_source(name, "test")
    assert train.class_names == test.class_names == ("0", "9", "10")  # none without an image
    assert sorted(labels(train)) == [0, 2] and labels(test) == [1]
    names = [f"class {i}" for i in range(11)]
    assert sorted(labels(sources.get_source(name, "train", class_names=names))) == [0, 10]
    with pytest.raises(ValueError, match="the classes 10 that are not among the 10 expected"):
        sources.get_source(name, "train", class_names=names[:10])
    assert sorted(labels(sources.get_source(name, "train", class_names=11))) == [0, 10]
    with pytest.raises(ValueError, match="the classes 10 that are not among the 10 expected"):
        sources.get_source(name, "train", class_names=10)
    decimal = [str(i) for i in range(1, 11)]  # of which 0 is none, and 1 is not the second
    with pytest.raises(ValueError, match="the classes 0 that are not among the 10 expected"):
        sources.get_source(name, "train", class_names=decimal)
    unlabelled = write_csv(tmp_path / "list.csv", "image", "0.png")
    assert sources.get_source(unlabelled)[0].keys() == {"image"}


def test_csv_of_another_hand(tmp_path):
    """A name in capitals, blanks in the header and the cells; numbers are in their order."""
    rows = [f"{i}.png, {i} , {'test' if i == 11 else 'train'} " for i in range(12)]
    name = write_csv(tmp_path / "LIST.CSV", "image, label, split", *rows)
    source = sources.get_source(name, "train")
    assert source.class_names == tuple(map(str, range(12))) and len(source) == 11
    assert sources.split_names(name) == ["train", "test"]


def test_csv_errors(tmp_path):
    path = tmp_path / "list.csv"
    with pytest.raises(FileNotFoundError, match="no file .*list.csv"):
        sources.get_source(f"folder:{path}")
    with pytest.raises(ValueError, match="columns image, file_name, path, .* got 0.png, dog"):
        sources.get_source(write_csv(path, "0.png,dog"))
    with pytest.raises(ValueError, match="no rows"):
        sources.get_source(write_csv(path, "image,label"))
    with pytest.raises(ValueError, match="list.csv: 'utf-8' codec.*save it as a CSV file in UTF-8"):
        sources.get_source(write_csv(path, "image,label", "0.png,caf\u00e9", encoding="latin-1"))
    with pytest.raises(ValueError, match="list.csv: unexpected end of data; .*every quote closed"):
        sources.get_source(write_csv(path, "image,label", '0.png,"dog', "1.png,cat"))
    with pytest.raises(ValueError, match="list.csv: field larger than .*UTF-8"):
        sources.get_source(write_csv(path, "image,label", '"0.png,' + 200_000 * "x"))
    with pytest.raises(ValueError, match="list.csv, line 2: a path with a zero byte"):
        sources.get_source(write_csv(path, "image,label", "0\0.png,dog"))
    with pytest.raises(ValueError, match="list.csv, line 3: image, label needed"):
        sources.get_source(write_csv(path, "image,label", "0.png,dog", "1.png,"))
    with pytest.raises(ValueError, match="list.csv, line 2: image, label needed"):
        sources.get_source(write_csv(path, "image,label", '0.png," "'))
    with pytest.raises(ValueError, match="labels that are the same number, such as 1 and 01"):
        sources.get_source(write_csv(path, "image,label", "0.png,1", "1.png,01", "2.png,2"))
    source = sources.get_source(write_csv(path, "image,label", "absent.png,dog"))
    with pytest.raises(images.BadImageError, match="absent.png: no such file"):
        source[0]


def test_data_dir_is_where_a_folder_is(tmp_path):
    class_folders(tmp_path / "pets", {"cat": 2})
    expected = ids(sources.get_source(f"folder:{tmp_path / 'pets'}"))
    assert ids(sources.get_source("folder:pets", data_dir=tmp_path)) == expected
    assert ids(sources.get_source("folder", data_dir=tmp_path / "pets")) == expected


def test_classes_without_an_image_to_learn_from_are_told(tmp_path, caplog):
    class_folders(tmp_path, {"cat": 2, "dog": 1}, prefix="train")
    class_folders(tmp_path, {"cat": 1, "dog": 1, "eel": 1}, prefix="val")
    class_folders(tmp_path, {"cat": 1}, prefix="test")
    config = common.get_config().data
    config.update(name=f"folder:{tmp_path}", train="train", val="val", test="test")
    inputs.open_splits(config, sharding.make_mesh())
    unlearnt, unseen = caplog.messages
    assert unlearnt == (
        "The training split 'train' has no image of eel, unlike 'val': it is not learnt."
    )
    assert unseen.startswith("The split 'test' has no image of dog: its accuracy says nothing")
    caplog.clear()
    config.train, config.val, config.test = "train", "", ""
    inputs.open_splits(config, sharding.make_mesh())
    assert not caplog.records
    config.train, config.val = "train[:2]", "train[1:]"
    inputs.open_splits(config, sharding.make_mesh())
    message = "config.data.val 'train[1:]' shares 1 images with config.data.train 'train[:2]'."
    assert any(text.startswith(message) for text in caplog.messages)
    with caplog.at_level("INFO"):
        inputs.open_splits(config, sharding.make_mesh())
    assert f"folder:{tmp_path} has unused splits: val, test." in caplog.messages


SHARES = ("train[:80%]", "train[80%:90%]", "train[90%:]")


def resolved(path):
    """What `config.data` of a recipe is for a folder."""
    return inputs.with_own_splits(image_folder.get_config(str(path))).data


def splits_of(path):
    config = resolved(path)
    return config.train, config.val, config.test


def test_splits_of_a_folder_are_its_own(tmp_path):
    class_folders(tmp_path, {"cat": 4}, prefix="train")
    assert splits_of(tmp_path) == SHARES
    class_folders(tmp_path, {"cat": 2}, prefix="test")
    assert splits_of(tmp_path) == ("train[:90%]", "train[90%:]", "test")
    class_folders(tmp_path, {"cat": 2}, prefix="valid")
    assert splits_of(tmp_path) == ("train", "valid", "test")
    config = image_folder.get_config(str(tmp_path))
    config.data.val = ""  # of one's own choice, and the others stay open
    data = inputs.with_own_splits(config).data
    assert (data.train, data.val, data.test) == ("train", "", "test")


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_that_is_the_test_is_told(tmp_path, caplog, name):
    class_folders(tmp_path, {"cat": 20, "dog": 20}, prefix="train")
    class_folders(tmp_path, {"cat": 2, "dog": 2}, prefix=name)
    config = resolved(tmp_path)
    assert (config.train, config.val, config.test) == ("train[:90%]", "train[90%:]", name)
    mesh = sharding.make_mesh()
    caplog.set_level("INFO")
    inputs.open_splits(config, mesh)
    (message,) = caplog.messages
    assert f"has no split 'test': '{name}' is the test" in message
    flags = message.partition("and not test: ")[2].replace("--config.data.", "").split()
    config.update_from_flattened_dict(dict(flag.split("=") for flag in flags))
    caplog.clear()
    splits = inputs.open_splits(config, mesh)
    assert {key: len(split.source) for key, split in splits.items()} == {"train": 40, "val": 4}
    assert not caplog.messages
    class_folders(tmp_path, {"cat": 1, "dog": 1}, prefix="test")
    inputs.open_splits(resolved(tmp_path), mesh)
    assert not caplog.messages


def test_which_fold_is_told(tmp_path, caplog):
    class_folders(tmp_path, {"cat": 10, "dog": 10})
    config = resolved(tmp_path)
    config.folds, config.fold = 5, 2
    mesh = sharding.make_mesh()
    caplog.set_level("INFO")
    splits = inputs.open_splits(config, mesh)
    assert caplog.messages == [
        "Validation is fold 2 of 5 (numbered from 0, config.data.fold), training the others."
    ]
    assert splits["val"].source.split.endswith("fold 2 of 5")


def test_classes_without_an_image_to_measure_are_told(tmp_path, caplog):
    class_folders(tmp_path, {"cat": 2, "eel": 1})
    config = resolved(f"{tmp_path},test")
    mesh = sharding.make_mesh()
    classes = ["dog", "cat", "eel"]
    inputs.open_splits(config, mesh, ("val", "test"), classes)
    (message,) = caplog.messages
    assert message.startswith("The split 'train' has no image of dog: its accuracy says nothing")
    caplog.clear()
    inputs.open_splits(config, mesh, ("val", "test"), classes[1:])
    assert not caplog.messages


def test_shared_images_of_folds_are_counted():
    pool, test = (sources.get_source("digits", split) for split in ("train", "train[:100]"))
    outside, inside = stratified_fold(pool, 0, 5)
    shared = [part.shared_with(test) for part in (pool, outside, inside)]
    assert shared[0] == 100 == shared[1] + shared[2] and 0 < shared[2] < 40
    assert sources.get_source("digits", "test").shared_with(pool) == 0
    assert outside.shared_with(inside) == 0


def test_class_folders_with_names_of_splits_are_classes(tmp_path):
    class_folders(tmp_path, {"control": 3, "test": 3})
    assert splits_of(tmp_path) == SHARES


def test_files_that_are_not_read_are_told(tmp_path, caplog):
    class_folders(tmp_path, {"cat": 4, "dog": 4})
    for name in ("cat/a.heic", "cat/b.heic", "dog/notes.txt"):
        (tmp_path / name).write_bytes(b"")
    config = common.get_config().data
    config.update(name=f"folder:{tmp_path}", train="train", val="", test="")
    with caplog.at_level("INFO"):
        inputs.open_splits(config, sharding.make_mesh())
    assert f"Ignored files of folder:{tmp_path}: 2 .heic, 1 .txt." in caplog.messages


def test_a_listed_image_that_is_not_there_is_told_at_once(tmp_path):
    save(tmp_path / "1.png")
    path = tmp_path / "list.csv"
    path.write_text("image,label\n1.png,cat\n2.png,dog\n")
    with pytest.raises(FileNotFoundError, match="lists .*2.png, which is not there"):
        _ = sources.get_source(f"folder:{path}").fingerprint
    skipping = sources.get_source(f"folder:{path}", on_bad_image="skip")
    assert len(skipping) == 2 and skipping.fingerprint


def test_an_image_that_is_listed_in_two_splits_is_counted(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    path = tmp_path / "list.csv"
    rows = ["a.png,0,train", "b.png,1,train", "./b.png,1,test", f"{tmp_path}/a.png,0,test"]
    path.write_text("\n".join(["image,label,split", *rows, "c.png,0,test"]))
    train, test = (sources.get_source(f"folder:{path}", split) for split in ("train", "test"))
    assert test.shared_with(train) == 2


def test_splits_of_a_list_in_capitals_are_told(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("image,label,split\n1.png,a,train\n2.png,b,Val\n3.png,b,fold1\n4.png,b,TEST\n")
    names = sources.split_names(f"folder:{path}")
    with pytest.raises(ValueError, match="The splits TEST, Val are not called train, val, valid"):
        sources.own_test(names)
    assert len(sources.get_source(f"folder:{path}", "Val")) == 1


def test_folds_cover_every_example_once_and_evenly():
    whole = sources.get_source("digits", "train")
    pairs = [stratified_fold(whole, fold, 5) for fold in range(5)]
    held_out = [ids(fold) for _, fold in pairs]
    assert sorted(itertools.chain(*held_out)) == sorted(ids(whole))
    for (rest, fold), names in zip(pairs, held_out, strict=True):
        assert sorted(ids(rest) + names) == sorted(ids(whole))
        counts = np.bincount(fold.labels(), minlength=10)
        assert np.abs(counts - np.bincount(whole.labels()) / 5).max() < 1
        assert fold[3]["label"] == fold.labels()[3]
        np.testing.assert_array_equal(fold[3]["image"], whole[ids(whole).index(names[3])]["image"])
    assert len({fold.fingerprint for pair in pairs for fold in pair}) == 10


def test_folds_of_unlabelled_images(tmp_path):
    for i in range(7):
        save(tmp_path / f"{i}.png")
    source = sources.get_source(f"folder:{tmp_path}")
    folds = [stratified_fold(source, fold, 3)[1] for fold in range(3)]
    assert [len(fold) for fold in folds] == [3, 2, 2]
    assert folds[0].labels() is None and len({*ids(folds[0]), *ids(folds[1]), *ids(folds[2])}) == 7


@pytest.mark.parametrize(("fold", "folds"), [(5, 5), (-1, 5), (0, 1), (0, 2000)])
def test_there_is_no_such_fold(fold, folds):
    with pytest.raises(
        ValueError, match=f"data.fold={fold} of config.data.folds={folds}: expected 2 to"
    ):
        stratified_fold(sources.get_source("digits", "train"), fold, folds)


def test_unknown_names_list_the_known(tmp_path):
    with pytest.raises(ValueError, match="names no folder; expected .*image_folder.py:PATH"):
        sources.get_source("folder:")
    with pytest.raises(ValueError, match=f"a folder or CSV file is folder:{tmp_path}"):
        sources.get_source(str(tmp_path))
    for name in ("cifar", "tfds:"):
        with pytest.raises(ValueError, match=f"{name}.; available: digits, cifar10, .*folder:PATH"):
            sources.get_source(name)
    for name in ("tfds:cifar10:9.9.9", "tfds:cifar10/foo"):
        with pytest.raises(ValueError, match=f"^{name}: .*(version 9.9.9|BuilderConfig foo)"):
            sources.get_source(name, data_dir=tmp_path)
    with pytest.raises(ValueError, match="expected 'error', 'skip' or 'record'"):
        sources.get_source("digits", on_bad_image="ignore")
    with pytest.raises(TypeError, match="mistake"):
        sources.get_source("digits", mistake=1)


def test_fingerprint_and_shape(tmp_path):
    class_folders(tmp_path / "a", {"cat": 3, "dog": 2})
    class_folders(tmp_path / "b", {"cat": 3, "dog": 2})

    def get(name, split="train", **kwargs):
        return sources.get_source(f"folder:{tmp_path / name}", split, **kwargs)

    source = get("a")
    assert (len(source), source.image_shape) == (5, (4, 6, 3))
    prints = {
        "part": get("a", "train[:4]").fingerprint,
        "no labels": get("a", labelled=False).fingerprint,
        "whole": source.fingerprint,
    }
    assert get("b").fingerprint == source.fingerprint  # where it lies does not matter
    save(tmp_path / "b" / "dog" / "000.png", size=(700, 400))
    prints["other size"] = get("b").fingerprint
    assert get("b").image_shape is None
    os.rename(tmp_path / "a" / "dog", tmp_path / "a" / "fox")
    prints["other ids"] = get("a").fingerprint
    assert len(set(prints.values())) == len(prints)
    digits = [sources.get_source("digits", split).fingerprint for split in ("train", "test")]
    assert digits[0] != digits[1]


def test_shape_meets_bad_headers(tmp_path):
    class_folders(tmp_path, {"cat": 3})
    (tmp_path / "cat" / "001.png").write_bytes(b"nothing")
    skipping = sources.get_source(f"folder:{tmp_path}", on_bad_image="skip")
    assert skipping.image_shape == (4, 6, 3)
    with pytest.raises(images.BadImageError, match="001.png") as error:
        sources.get_source(f"folder:{tmp_path}").image_shape  # noqa: B018
    assert "--config.data.on_bad_image=skip" in error.value.__notes__[0]


def test_sources_can_be_pickled_and_iterated(tmp_path):
    class_folders(tmp_path, {"cat": 3})
    for name in ("digits", f"folder:{tmp_path}"):
        source = sources.get_source(name, "train[:3]")
        copy = pickle.loads(pickle.dumps(source))
        for ours, theirs in zip(source, copy, strict=True):
            np.testing.assert_array_equal(ours["image"], theirs["image"])
        with pytest.raises(IndexError):
            source[3]


def test_command_lists_bad_images(tmp_path, capsys):
    class_folders(tmp_path, {"cat": 3, "dog": 1})
    assert command.main([f"folder:{tmp_path}", "--check"]) == 0
    output = capsys.readouterr().out
    assert "4 images, 4 x 6 x 3" in output and "2 classes: cat, dog" in output
    (tmp_path / "cat" / "001.png").write_bytes(b"nothing")
    assert command.main([f"folder:{tmp_path}", "--check"]) == 1
    assert f"cannot decode {tmp_path}/cat/001.png: not an image" in capsys.readouterr().out
    assert command.main(["nothing"]) == 2
    assert capsys.readouterr().err.startswith("python -m beit_jax.data: no dataset 'nothing'")


def test_command_without_labels(tmp_path, capsys):
    """As the message about a bad image says."""
    class_folders(tmp_path, {"cat": 2})
    save(tmp_path / "loose.png")
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    assert command.main([f"folder:{tmp_path}", "--check"]) == 2
    assert "--unlabelled" in capsys.readouterr().err
    source = sources.get_source(f"folder:{tmp_path}", labelled=False)
    with pytest.raises(images.BadImageError) as error:
        source.image_shape  # noqa: B018
    assert f"folder:{tmp_path} --unlabelled --check` lists" in error.value.__notes__[0]
    assert command.main([f"folder:{tmp_path}", "--unlabelled", "--check"]) == 1
    assert "1 of 4 images cannot be decoded" in capsys.readouterr().out


def test_command_counts_other_files(tmp_path, capsys):
    class_folders(tmp_path, {"cat": 2})
    command.main([f"folder:{tmp_path}"])
    assert "ignored" not in capsys.readouterr().out
    for name in ("1.heic", "2.HEIC", "notes.txt", ".hidden"):
        (tmp_path / "cat" / name).write_text("")
    command.main([f"folder:{tmp_path}"])
    assert "\nignored: 2 .heic, 1 .txt\n" in capsys.readouterr().out


def test_no_other_framework_is_imported():
    code = (
        "import sys; from beit_jax.data import pipeline, sources; "
        "sources.get_source('digits'); "
        "print([m for m in ('tensorflow', 'torch', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_encoded_forms_are_equal(tmp_path):
    save(tmp_path / "1.png")
    content = (tmp_path / "1.png").read_bytes()
    array = np.asarray(Image.open(io.BytesIO(content)))
    for form in (content, tmp_path / "1.png", array):
        np.testing.assert_array_equal(np.asarray(images.open_image(form)), array)
