"""The CIFAR preparer, on tiny archives in the two official formats, read back by TFDS itself."""

import concurrent.futures
import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import struct
import tarfile
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from beit_jax.data import __main__ as command
from beit_jax.data import cifar, sources

NAMES = {
    "cifar10": {"label": [f"thing_{i}" for i in range(10)]},
    "cifar100": {
        "coarse_label": [f"group_{i}" for i in range(20)],
        "label": [f"thing_{i}" for i in range(100)],
    },
}
FILES = {
    "cifar10": {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    "cifar100": {"train": ["train"], "test": ["test"]},
}
UNREACHABLE = "http://127.0.0.1:9/"  # the discard port, where nothing listens


def contents(name, per_file=4):
    """file -> (uint8 [N, 3, 32, 32], {feature: [N]})"""
    rng = np.random.default_rng(0)
    return {
        file: (
            rng.integers(0, 256, (per_file, 3, 32, 32), np.uint8),
            {f: rng.integers(0, len(n), per_file).tolist() for f, n in NAMES[name].items()},
        )
        for files in FILES[name].values()
        for file in files
    }


def expected(name, split):
    """id -> (uint8 [32, 32, 3], {feature: label})"""
    batches = [contents(name)[file] for file in FILES[name][split]]
    examples = [
        (image.transpose(1, 2, 0), {feature: labels[feature][i] for feature in labels})
        for images, labels in batches
        for i, image in enumerate(images)
    ]
    return {f"{split}_{i:05d}": example for i, example in enumerate(examples)}


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its str, and NumPy's functions by their names then."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, value):
        self.write(b"T" + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_str


def python2_pickle(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


def binary_members(name):
    members = {}
    for file, (images, labels) in contents(name).items():
        columns = [np.array(labels[feature], np.uint8)[:, None] for feature in labels]
        rows = np.concatenate([*columns, images.reshape(len(images), -1)], 1)
        members[f"{file}.bin"] = rows.tobytes()
    meta = {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"}
    for feature, names in NAMES[name].items():
        file = "batches.meta.txt" if name == "cifar10" else meta[feature]
        members[file] = ("\n".join(names) + "\n\n").encode()
    folder = "cifar-10-batches-bin" if name == "cifar10" else "cifar-100-binary"
    return {f"{folder}/{file}": content for file, content in members.items()}


def python_members(name):
    keys = {"label": b"labels"}
    meta = {"label": b"label_names"}
    folder, meta_file = "cifar-10-batches-py", "batches.meta"
    if name == "cifar100":
        keys = {"coarse_label": b"coarse_labels", "label": b"fine_labels"}
        meta = {"coarse_label": b"coarse_label_names", "label": b"fine_label_names"}
        folder, meta_file = "cifar-100-python", "meta"
    members = {
        file: {b"data": images.reshape(len(images), -1), b"batch_label": b"a batch"}
        | {keys[feature]: labels[feature] for feature in labels}
        for file, (images, labels) in contents(name).items()
    }
    members[meta_file] = {
        key: [text.encode() for text in NAMES[name][feature]] for feature, key in meta.items()
    }
    return {f"{folder}/{file}": python2_pickle(value) for file, value in members.items()}


def write_archive(folder, file_name, members):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / file_name, "w:gz") as tar:
        for path, content in members.items():
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = (folder / file_name).read_bytes()
    url = f"{UNREACHABLE}{file_name}"
    return cifar.Archive(url, len(content), hashlib.sha256(content).hexdigest())


def archive(name, form, folder):
    members = (binary_members if form == "binary" else python_members)(name)
    return write_archive(folder, f"{name.replace('10', '-10')}-{form}.tar.gz", members)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(name, form) -> a data_dir in which it is prepared."""

    @functools.cache
    def prepare(name, form):
        data_dir = tmp_path_factory.mktemp(f"{name}_{form}")
        cifar.prepare(name, data_dir, archives=[archive(name, form, data_dir / "downloads")])
        return data_dir

    return prepare


@pytest.mark.parametrize("form", ["binary", "python"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_tfds_reads_what_is_prepared(prepared, name, form):
    for split in ("train", "test"):
        examples = tfds.data_source(
            name, split=split, data_dir=prepared(name, form), download=False
        )
        got = {example["id"].decode(): example for example in examples}
        assert got.keys() == expected(name, split).keys() and len(examples) == len(got)
        for id, (image, labels) in expected(name, split).items():
            np.testing.assert_array_equal(got[id]["image"], image)
            assert {feature: got[id][feature] for feature in labels} == labels
    assert examples.dataset_info.full_name == f"{name}/3.0.2"
    for feature, names in NAMES[name].items():
        assert examples.dataset_info.features[feature].names == names


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_both_formats_give_the_same_records(prepared, name):
    records = [
        [(e["id"], e["label"]) for e in data_source(prepared(name, form), name)]
        for form in ("binary", "python")
    ]
    assert records[0] == records[1]
    numbers = [int(id[-5:]) for id, _ in records[0]]
    assert numbers != sorted(numbers)  # TFDS shuffles by key


def data_source(data_dir, name, split="train"):
    return tfds.data_source(name, split=split, data_dir=data_dir, download=False)


def test_source_is_what_tfds_reads(prepared, monkeypatch):
    data_dir = prepared("cifar10", "binary")
    for split in ("train", "test", "train[:50%]", "train[50%:]", "train[3:5]+test", "all"):
        ours = sources.get_source("cifar10", split, data_dir=data_dir)
        theirs = data_source(data_dir, "cifar10", split)
        assert len(ours) == len(theirs)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            np.testing.assert_array_equal(a["image"], b["image"])
            assert a["label"] == b["label"] and ours.id(i) == b["id"].decode()
    assert ours.class_names == tuple(NAMES["cifar10"]["label"])
    assert ours.image_shape == (32, 32, 3)
    copy = pickle.loads(pickle.dumps(ours))
    np.testing.assert_array_equal(copy[3]["image"], ours[3]["image"])
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert sources.get_source("tfds:cifar10", "all").fingerprint == ours.fingerprint
    halves = [sources.get_source("cifar10", s).fingerprint for s in ("train[:5]", "train[5:10]")]
    assert halves[0] != halves[1]


def test_keys_of_a_tfds_source(prepared):
    data_dir = prepared("cifar100", "binary")
    source = sources.get_source("cifar100", data_dir=data_dir, label_key="coarse_label")
    assert source.class_names == tuple(NAMES["cifar100"]["coarse_label"])
    assert source[0]["label"] == data_source(data_dir, "cifar100")[0]["coarse_label"]
    assert sources.get_source("cifar100", data_dir=data_dir, labelled=False)[0].keys() == {"image"}
    with pytest.raises(ValueError, match="no label 'fine': .* Available: .*coarse_label"):
        sources.get_source("cifar100", data_dir=data_dir, label_key="fine")
    with pytest.raises(ValueError, match=r"It has train \(4 examples\), test \(4 examples\)"):
        sources.get_source("cifar100", "val", data_dir=data_dir)


def test_label_out_of_range_names_both_numbers(prepared, monkeypatch):
    source = sources.get_source("cifar10", data_dir=prepared("cifar10", "binary"))
    monkeypatch.setattr(source, "class_names", ("a",))
    with pytest.raises(ValueError, match=r"train_\d+ has label \d; cifar10 has 1 classes"):
        for i in range(len(source)):
            source[i]


def test_prepared_data_need_no_archive(prepared):
    data_dir = prepared("cifar10", "binary")
    nothing = cifar.Archive(f"{UNREACHABLE}nothing", 1, "")
    directory = cifar.prepare("cifar10", data_dir, archives=[nothing], download=False)
    assert directory == data_dir / "cifar10" / "3.0.2"


def test_checksums_are_those_of_tfds():
    binary, python = cifar.official_archives("cifar100")
    assert binary.url == "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    assert binary.size == 168513733 and binary.sha256.startswith("58a81ae192c23a4b")
    assert python.file_name == "cifar-100-python.tar.gz" and len(python.sha256) == 64


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_archive_is_refused(tmp_path, damage):
    good = archive("cifar10", "binary", tmp_path / "downloads")
    path = tmp_path / "downloads" / good.file_name
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        del content[-10:]
    else:
        content[1000] ^= 1
    path.write_bytes(content)
    message = f"is not {good.url}: got {len(content)} bytes.* expected {good.size} with"
    with pytest.raises(ValueError, match=message):
        cifar.prepare("cifar10", tmp_path, archives=[good])
    assert not (tmp_path / "cifar10").exists()


def test_archive_with_a_file_missing_is_refused(tmp_path):
    members = binary_members("cifar10")
    del members["cifar-10-batches-bin/data_batch_3.bin"]
    incomplete = write_archive(tmp_path / "downloads", "cifar-10-binary.tar.gz", members)
    with pytest.raises(ValueError, match=r"has no cifar-10-batches-bin/.data_batch_3.bin"):
        cifar.prepare("cifar10", tmp_path, archives=[incomplete])
    members["cifar-10-batches-bin/data_batch_3.bin"] = bytes(3073 + 1)
    ragged = write_archive(tmp_path / "downloads", "cifar-10-binary.tar.gz", members)
    with pytest.raises(ValueError, match="are not rows of 3073 bytes"):
        cifar.prepare("cifar10", tmp_path, archives=[ragged])


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickle_is_not_run(tmp_path, protocol):
    canary = tmp_path / "canary"
    evil = pickle.dumps({"data": Canary(canary), "labels": []}, protocol)
    pickle.loads(evil)  # it does work
    assert canary.exists()
    canary.rmdir()
    with pytest.raises(ValueError, match=r"not genuine: a pickle in it calls (posix|nt)\.mkdir"):
        cifar.safe_unpickle(evil)
    members = python_members("cifar10") | {"cifar-10-batches-py/data_batch_2": evil}
    bad = write_archive(tmp_path / "downloads", "cifar-10-python.tar.gz", members)
    with pytest.raises(ValueError, match="not genuine"):
        cifar.prepare("cifar10", tmp_path, archives=[bad])
    assert not canary.exists() and not (tmp_path / "cifar10").exists()


@pytest.mark.parametrize(
    "call", [b"cbuiltins\neval\n(S'1'\ntR.", b"cnumpy\nload\n(S'x'\ntR.", b"cos\nsystem\n."]
)
def test_no_function_can_be_reached(call):
    with pytest.raises(ValueError, match="not genuine"):
        cifar.safe_unpickle(call)


def test_plain_pickles_of_python_2_are_read():
    value = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, 2], b"n": (b"a",)}
    got = cifar.safe_unpickle(python2_pickle(value))
    assert got.keys() == value.keys() and got[b"labels"] == [1, 2] and got[b"n"] == (b"a",)
    np.testing.assert_array_equal(got[b"data"], value[b"data"])


def test_absent_and_offline_is_one_sentence_at_once(tmp_path, monkeypatch, capsys):
    absent = cifar.Archive(f"{UNREACHABLE}cifar-10-binary.tar.gz", 1, "")
    monkeypatch.setattr(cifar, "official_archives", lambda name: (absent,))
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as error:
        sources.get_source("cifar10", data_dir=tmp_path)
    assert time.monotonic() - start < 10
    message = str(error.value)
    assert message == (
        f"cifar10 is not in {tmp_path} and cannot be downloaded (no connection to 127.0.0.1): "
        f"where there is a network, run `python -m beit_jax.data cifar10 --data-dir {tmp_path}`, "
        f"or save {absent.url} in {tmp_path / 'downloads'}"
    )
    assert not list(tmp_path.glob("**/*.part"))
    with pytest.raises(FileNotFoundError, match="and no download is allowed: where there is"):
        cifar.prepare("cifar10", tmp_path, download=False)
    assert command.main(["cifar10", "--data-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"python -m beit_jax.data: {message}\n"


@pytest.fixture
def server(tmp_path):
    """Serves `tmp_path / "www"`; yields its URL."""
    (tmp_path / "www").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_command_downloads_and_prepares(tmp_path, server, monkeypatch, capsys):
    served = archive("cifar10", "binary", tmp_path / "www")
    served = served._replace(url=f"{server}{served.file_name}")
    monkeypatch.setattr(cifar, "official_archives", lambda name: (served,))
    data_dir = tmp_path / "new" / "data"
    assert command.main(["cifar10", "--data-dir", str(data_dir)]) == 0
    assert "cifar10 all: 24 images, 32 x 32 x 3" in capsys.readouterr().out
    files = sorted(path.name for path in (data_dir / "downloads").iterdir() if path.is_file())
    assert [file for file in files if not file.endswith(".lock")] == [served.file_name]
    assert [path.name for path in (data_dir / "cifar10").iterdir()] == ["3.0.2"]


def test_bad_downloads_leave_nothing(tmp_path, server):
    absent = cifar.Archive(f"{server}absent.tar.gz", 1, "")
    with pytest.raises(FileNotFoundError, match="cannot be downloaded .404 Client Error"):
        cifar.prepare("cifar10", tmp_path, archives=[absent])
    served = archive("cifar10", "binary", tmp_path / "www")
    other = served._replace(url=f"{server}{served.file_name}", sha256="0" * 64)
    with pytest.raises(ValueError, match="expected .* with 000"):
        cifar.prepare("cifar10", tmp_path, archives=[other])
    assert not list((tmp_path / "downloads").glob("*.gz*"))


def test_two_at_once_prepare_once(tmp_path):
    good = archive("cifar10", "binary", tmp_path / "downloads")
    prepare = functools.partial(cifar.prepare, "cifar10", tmp_path, archives=[good])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = [pool.submit(prepare) for _ in range(2)]
        assert first.result() == second.result()
    assert [path.name for path in (tmp_path / "cifar10").iterdir()] == ["3.0.2"]
    assert len(data_source(tmp_path, "cifar10")) == 20


def test_tfds_data_that_cannot_be_read_say_how_to_prepare_them(prepared, tmp_path):
    with pytest.raises(FileNotFoundError, match="mnist is not prepared in .*tfds.builder.'mnist'"):
        sources.get_source("tfds:mnist", data_dir=tmp_path)
    with pytest.raises(ValueError, match="TFDS has no dataset 'nothing'"):
        sources.get_source("tfds:nothing", data_dir=tmp_path)
    info = prepared("cifar10", "python") / "cifar10" / "3.0.2" / "dataset_info.json"
    content = json.loads(info.read_text())
    other = tmp_path / "cifar10" / "3.0.2"
    other.mkdir(parents=True)
    for file in info.parent.iterdir():
        name = file.name.replace("array_record", "tfrecord")
        (other / name).write_bytes(file.read_bytes())
    (other / "dataset_info.json").write_text(json.dumps(content | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="tfrecord files.*python -m beit_jax.data cifar10"):
        sources.get_source("cifar10", data_dir=tmp_path)


@pytest.mark.skipif("BEIT_JAX_CIFAR10" not in os.environ, reason="needs a prepared CIFAR-10")
def test_real_cifar10():
    data_dir = os.environ["BEIT_JAX_CIFAR10"]
    train = sources.get_source("cifar10", data_dir=data_dir)
    test = sources.get_source("cifar10", "test", data_dir=data_dir)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.class_names[0] == "airplane" and train.class_names[-1] == "truck"
    counts = np.bincount([record.label for record in test.fetch(range(10_000))])
    assert (counts == 1000).all()
