"""Files of checkpoints: reading, writing, damage, malice, the Hub and the command."""

import json
import pickle
import struct
import sys
import time
import warnings

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import serialization, traverse_util
from PIL import Image

from beit_jax import convert
from beit_jax.convert import FileFormatError, hf_config, preprocessor
from beit_jax.convert.__main__ import main
from beit_jax.models.beit import Model

ARCHITECTURE = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "num_channels": 3,
    "use_mask_token": False,
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": True,
    "use_shared_relative_position_bias": False,
    "layer_scale_init_value": 0.1,
    "drop_path_rate": 0.1,
    "use_mean_pooling": True,
    "vocab_size": 8192,
    "image_size": (16, 16),
    "patch_size": 8,
    "num_labels": 3,
    "head": "classifier",
}
NAMES = ["cat", "dog", "Käfer"]
SQUASH = {
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.25],
    "interpolation": "bicubic",
    "crop": "squash",
    "crop_pct": 1.0,
}
CENTER = {**SQUASH, "interpolation": "bilinear", "crop": "center", "crop_pct": 0.5}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = hf_config.parameter_shapes(Model(**ARCHITECTURE))
    flat = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture
def exported(tmp_path, params):
    convert.save_hf(tmp_path / "hf", params, ARCHITECTURE, NAMES, SQUASH)
    return tmp_path / "hf"


@pytest.fixture
def unsigned(exported):
    """An export without its digests: a directory as it comes from elsewhere."""
    (exported / "export_manifest.json").unlink()
    return exported


def assert_same(actual, expected):
    actual, expected = (traverse_util.flatten_dict(tree, sep="/") for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path)


def tensors_of(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def safetensors_file(description, data=bytes(8)):
    """A file of this format, by hand: also of what its library would not write."""
    text = json.dumps(description).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("image", [SQUASH, CENTER, None])
def test_round_trip(tmp_path, params, image):
    convert.save_hf(tmp_path / "hf", params, ARCHITECTURE, NAMES, image)
    checkpoint = convert.load(tmp_path / "hf")
    assert_same(checkpoint.params, params)
    assert checkpoint.architecture == ARCHITECTURE
    assert checkpoint[2:] == (NAMES, image, str(tmp_path / "hf"), (), "beit")
    with safetensors.safe_open(tmp_path / "hf/model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("image", [SQUASH, CENTER])
def test_processor_of_transformers(tmp_path, params, image):
    transformers = pytest.importorskip("transformers")
    convert.save_hf(tmp_path, params, ARCHITECTURE, NAMES, image)
    processor = transformers.BeitImageProcessorPil.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (40, 64, 3), np.uint8))
    pixels = processor(photo, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    if image["crop"] == "squash":
        expected = photo.resize((16, 16), Image.Resampling.BICUBIC)
    else:  # shorter side to 16 / 0.5, then the centre
        resized = photo.resize((51, 32), Image.Resampling.BILINEAR)
        expected = resized.crop((17, 8, 33, 24))
    expected = (np.asarray(expected) / 255 - image["mean"]) / image["std"]
    np.testing.assert_allclose(pixels, expected, atol=1e-5)


def test_what_only_a_run_knows_is_not_exported(tmp_path, params):
    run = {**ARCHITECTURE, "image_size": 16, "head_init_scale": 0.1, "initializer_bound": 1.0}
    convert.save_hf(tmp_path, params, run, NAMES)
    assert convert.load(tmp_path).architecture == ARCHITECTURE


def test_without_preprocessor_and_names(tmp_path, params):
    convert.save_hf(tmp_path, params, ARCHITECTURE)
    assert convert.load(tmp_path)[2:4] == (None, None)


def test_a_file_is_enough(exported, params):
    checkpoint = convert.load(exported / "model.safetensors")
    assert_same(checkpoint.params, params)
    assert checkpoint.image == SQUASH


def test_sharded(unsigned, params):
    tensors = tensors_of(unsigned)
    (unsigned / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:5], names[5:])):
        shard = f"model-{i + 1:05}-of-00002.safetensors"
        safetensors.numpy.save_file({n: tensors[n] for n in part}, unsigned / shard)
        weight_map.update(dict.fromkeys(part, shard))
    index = unsigned / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(convert.load(unsigned).params, params)

    index.write_text(json.dumps({"weight_map": {**weight_map, "classifier.scale": shard}}))
    with pytest.raises(FileFormatError, match="no shard has: classifier.scale"):
        convert.load(unsigned)
    index.write_text(json.dumps({"weight_map": {**weight_map, "w": "../hf/" + shard}}))
    with pytest.raises(FileFormatError, match="not beside it"):
        convert.load(unsigned)
    (unsigned / shard).unlink()
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FileFormatError, match=f"{shard}.*not beside it"):
        convert.load(unsigned)
    index.write_text("{}")
    with pytest.raises(FileFormatError, match="no weight_map"):
        convert.load(unsigned)


@pytest.mark.parametrize("dtype, name", [(np.float16, "F16"), (ml_dtypes.bfloat16, "BF16")])
def test_half_precision_is_widened(unsigned, params, dtype, name):
    description, data = {}, b""
    for path, tensor in tensors_of(unsigned).items():
        start, data = len(data), data + tensor.astype(dtype).tobytes()
        offsets = [start, len(data)]
        description[path] = {"dtype": name, "shape": tensor.shape, "data_offsets": offsets}
    (unsigned / "model.safetensors").write_bytes(safetensors_file(description, data))
    kernel = convert.load(unsigned).params["classifier"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, params["classifier"]["kernel"].astype(dtype))


def test_safetensors_come_first(unsigned, params):
    (unsigned / "flax_model.msgpack").write_bytes(b"garbage")
    (unsigned / "pytorch_model.bin").write_bytes(b"garbage")
    assert_same(convert.load(unsigned).params, params)


TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGE = {
    "empty": lambda good: b"",
    "seven bytes": lambda good: good[:7],
    "header only": lambda good: good[: 8 + struct.unpack("<Q", good[:8])[0]],
    "truncated": lambda good: good[:-1],
    "trailing bytes": lambda good: good + b"\0",
    "huge header": lambda good: struct.pack("<Q", 2**62) + good[8:],
    "garbage header": lambda good: good[:8] + b"\xff" * 40 + good[48:],
    "overlap": lambda good: safetensors_file({"a": TWO, "b": TWO}),
    "hole": lambda good: safetensors_file({"a": {**TWO, "data_offsets": [8, 16]}}, bytes(16)),
    "negative shape": lambda good: safetensors_file({"a": {**TWO, "shape": [-2]}}),
    "wrong size": lambda good: safetensors_file({"a": {**TWO, "shape": [3]}}),
    "bad dtype": lambda good: safetensors_file({"a": {**TWO, "dtype": "F33"}}),
    "float8": lambda good: safetensors_file({"a": {**TWO, "dtype": "F8_E4M3", "shape": [8]}}),
    "a pickle": lambda good: pickle.dumps({"a": 1}),
    "no arrays": lambda good: safetensors_file({}, b""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_safetensors(unsigned, damage):
    path = unsigned / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FileFormatError) as error:
        convert.load(unsigned)
    assert str(error.value).startswith(f"{path}: ") and error.value.args[0].endswith(".")


def test_a_flipped_bit_is_found(exported):
    path = exported / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="SHA-256"):
        convert.load(exported)


@pytest.mark.parametrize("tree", [b"", b"garbage", [1, 2], {"a": {"b": "text"}}, {}, "truncated"])
def test_damaged_msgpack(tmp_path, tree):
    path = tmp_path / "flax_model.msgpack"
    if tree == "truncated":
        tree = serialization.msgpack_serialize({"a": np.zeros(9)})[:-3]
    path.write_bytes(tree if isinstance(tree, bytes) else serialization.msgpack_serialize(tree))
    with pytest.raises(FileFormatError, match="flax_model.msgpack: "):
        convert.load(tmp_path)


class Canary:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "a.pt", "a.pth", "model.safetensors", "flax_model.msgpack"]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_never_run(tmp_path, name, zipped):
    torch = pytest.importorskip("torch")
    content = {"model": {"a": Canary(tmp_path / "canary")}}
    with (tmp_path / name).open("wb") as file:
        torch.save(content, file) if zipped else pickle.dump(content, file, protocol=2)
    with pytest.raises(FileFormatError, match=name):
        convert.load(tmp_path / name)
    assert not (tmp_path / "canary").exists()
    with (tmp_path / name).open("rb") as file:
        torch.load(file, weights_only=False) if zipped else pickle.load(file)
    assert (tmp_path / "canary").exists()  # it would have run


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pth", "a.pt"])
@pytest.mark.parametrize("content", [b"", b"garbage", "list", "text"])
def test_damaged_torch_file(tmp_path, name, content):
    torch = pytest.importorskip("torch")
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save([torch.zeros(2)] if content == "list" else {"w": content}, tmp_path / name)
    with pytest.raises(FileFormatError, match=name):
        convert.load(tmp_path / name)


def test_torch_files(unsigned, params):
    torch = pytest.importorskip("torch")
    from argparse import Namespace

    tensors = {name: torch.from_numpy(t) for name, t in tensors_of(unsigned).items()}
    (unsigned / "model.safetensors").unlink()
    torch.save(tensors, unsigned / "pytorch_model.bin")
    assert_same(convert.load(unsigned).params, params)
    torch.save({"model": tensors, "args": Namespace(lr=1e-3)}, unsigned / "run.pth")
    assert_same(convert.load(unsigned / "run.pth").params, params)
    torch.save({k: v.bfloat16() for k, v in tensors.items()}, unsigned / "half.pt")
    kernel = convert.load(unsigned / "half.pt").params["classifier"]["kernel"]
    expected = params["classifier"]["kernel"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(kernel, expected)

    names = sorted(tensors)
    weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        torch.save({n: tensors[n] for n in names if weight_map[n] == shard}, unsigned / shard)
    (unsigned / "pytorch_model.bin").unlink()
    index = json.dumps({"weight_map": weight_map})
    (unsigned / "pytorch_model.bin.index.json").write_text(index)
    assert_same(convert.load(unsigned).params, params)


def test_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileFormatError, match="torch is not installed.*safetensors/convert"):
        convert.load(tmp_path)


def test_files_that_are_none(unsigned, tmp_path):
    with pytest.raises(FileFormatError, match="no weights; looked for model.safetensors"):
        convert.load(tmp_path)
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(FileFormatError, match="'.h5' are not read"):
        convert.load(tmp_path / "weights.h5")
    for missing in (tmp_path / "nothing", "./nothing", "nothing.pth", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such file or directory"):
            convert.load(missing)
    with pytest.raises(ValueError, match="revision='main' is for the Hub"):
        convert.load(unsigned, revision="main")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a": NaN'])
def test_damaged_json(exported, name, content):
    (exported / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=name):
        convert.load(exported)


def test_no_config(exported):
    (exported / "config.json").unlink()
    with pytest.raises(ValueError, match=f"{exported}: .* need the config.json"):
        convert.load(exported)


@pytest.mark.parametrize(
    "processor, expected",
    [
        (  # what transformers wrote before it had image processors
            {
                "feature_extractor_type": "BeitFeatureExtractor",
                "size": 224,
                "crop_size": 224,
                "do_center_crop": False,
                "resample": 2,
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
            },
            ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "bilinear", "squash", 1.0),
        ),
        (
            {"do_center_crop": True, "size": {"shortest_edge": 256}, "crop_size": 224},
            ([0.5] * 3, [0.5] * 3, "bicubic", "center", 0.875),
        ),
        (
            {"do_center_crop": True, "size": {"height": 32, "width": 32}, "crop_size": 32},
            ([0.5] * 3, [0.5] * 3, "bicubic", "squash", 1.0),
        ),
        ({"do_normalize": False}, ([0.0] * 3, [1.0] * 3, "bicubic", "squash", 1.0)),
        ({"rescale_factor": 2 / 255}, ([0.25] * 3, [0.25] * 3, "bicubic", "squash", 1.0)),
    ],
)
def test_preprocessors(exported, processor, expected):
    (exported / "preprocessor_config.json").write_text(json.dumps(processor))
    assert tuple(convert.load(exported).image.values()) == expected


@pytest.mark.parametrize("shorter_side", [232, 256, 353, 354, 438])
def test_the_shorter_side_comes_back(shorter_side):
    config = {"do_center_crop": True, "size": {"shortest_edge": shorter_side}, "crop_size": 224}
    written = preprocessor.to_hf(preprocessor.from_hf(config), 224)
    assert written["size"] == {"shortest_edge": shorter_side}


def test_one_number_for_all_channels():
    written = preprocessor.to_hf({**preprocessor.DEFAULT, "mean": [0.4]}, 224, num_channels=4)
    assert written["image_mean"] == [0.4] * 4 and written["image_std"] == [0.5] * 3


def test_a_centre_that_transformers_would_cut_otherwise():
    image = {**preprocessor.DEFAULT, "crop": "center", "crop_pct": 0.875}
    with pytest.warns(UserWarning, match="cannot cover 192 x 256 as this model does"):
        preprocessor.to_hf(image, (192, 256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preprocessor.to_hf(image, (224, 224))


def test_preprocessor_out_of_the_ordinary(exported, params):
    path = exported / "preprocessor_config.json"
    path.write_text(json.dumps({"do_center_crop": True, "size": 256, "crop_size": 224}))
    with pytest.warns(UserWarning, match="without squashing"):
        assert convert.load(exported).image["crop_pct"] == 0.875
    with pytest.raises(ValueError, match="'cubic'; available: nearest, lanczos"):
        image = {**SQUASH, "interpolation": "cubic"}
        convert.save_hf(exported, params, ARCHITECTURE, None, image)
    path.write_text(json.dumps({"resample": 17}))
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        convert.load(exported)


def test_export_replaces_only_an_export(exported, params, tmp_path):
    convert.save_hf(exported, params, {**ARCHITECTURE, "drop_path_rate": 0.3})
    assert convert.load(exported).architecture["drop_path_rate"] == 0.3
    assert not (exported / "preprocessor_config.json").exists()

    (exported / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    with pytest.raises(FileExistsError, match="README.md"):
        convert.save_hf(exported, params, ARCHITECTURE)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        convert.save_hf(tmp_path / "file", params, ARCHITECTURE)
    (tmp_path / "empty").mkdir()
    convert.save_hf(tmp_path / "empty", params, ARCHITECTURE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "hf"]


def test_a_failed_export_changes_nothing(exported, params, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        convert.save_hf(exported, params, {**ARCHITECTURE, "drop_path_rate": 0.3})
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert [path.name for path in exported.parent.iterdir()] == ["hf"]


def test_hub(exported, params, monkeypatch):
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns, **kwargs):
        asked.append((repository, revision, allow_patterns[-1]))
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = convert.load("someone/beit", revision="v1")
    assert_same(checkpoint.params, params)
    assert checkpoint.source == "someone/beit@v1"
    assert asked == [("someone/beit", "v1", "model*.safetensors")]

    (exported / "model.safetensors").unlink()
    asked.clear()
    with pytest.raises(FileFormatError, match="holds no weights"):
        convert.load("someone/beit")
    assert [pattern for *_, pattern in asked] == [
        "model*.safetensors",
        "flax_model.msgpack",
        "pytorch_model*.bin",
    ]


def test_hub_cache_serves_offline(unsigned, params, monkeypatch, tmp_path):
    cached = tmp_path / "cache/models--someone--beit"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("c0ffee")
    (cached / "snapshots").mkdir()
    unsigned.rename(cached / "snapshots/c0ffee")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert_same(convert.load("someone/beit").params, params)


@pytest.mark.parametrize("repository", ["microsoft/beit-base-patch16-224", "beit", "a b/c"])
def test_offline(monkeypatch, tmp_path, repository, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match=f"hf download {repository} --local-dir"):
        convert.load(repository)
    assert main(["from-hf", repository, str(tmp_path / "out")]) == 2
    assert time.monotonic() - start < 5
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["best", "latest"])
def test_command_round_trip(exported, tmp_path, step):
    workdir, out = str(tmp_path / "workdir"), str(tmp_path / "out")
    assert main(["from-hf", str(exported), workdir]) == 0
    assert main(["to-hf", workdir, out, "--step", step]) == 0
    for path in exported.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_command_verifies(exported, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    workdir, out = str(tmp_path / "workdir"), str(tmp_path / "out")
    assert main(["from-hf", str(exported), workdir]) == 0
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["to-hf", workdir, out, "--verify"]) == 2
    assert "pip install torch transformers" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("torch")
    assert main(["to-hf", workdir, out, "--verify"]) == 0
    assert "ok" in capsys.readouterr().out
    info = json.loads((tmp_path / "workdir/model.json").read_text())
    info["architecture"]["hidden_act"] = "relu"  # which the export then says as well
    (tmp_path / "workdir/model.json").write_text(json.dumps(info))
    assert main(["to-hf", workdir, out, "--verify"]) == 0


def test_command_reports_a_difference(exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("beit_jax.convert.verify.check_installed", lambda: None)
    monkeypatch.setattr("beit_jax.convert.verify.max_difference", lambda *args: (2e-4, 8.0))
    assert main(["from-hf", str(exported), str(tmp_path / "workdir")]) == 0
    assert main(["to-hf", str(tmp_path / "workdir"), str(tmp_path / "out"), "--verify"]) == 1
    told = "0.0002, 2.5e-05 of the largest output (too large)"
    assert told in capsys.readouterr().out


def test_command_errors(exported, tmp_path, capsys):
    for argv in (
        ["from-hf", str(tmp_path / "nothing"), str(tmp_path / "out")],
        ["from-hf", str(exported), str(exported.parent)],
        ["to-hf", str(tmp_path / "nothing"), str(tmp_path / "out")],
    ):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert error.startswith("python -m beit_jax.convert: ") and error.count("\n") == 1
    (exported / "export_manifest.json").unlink()
    (exported / "model.safetensors").write_bytes(b"")
    assert main(["from-hf", str(exported), str(tmp_path / "out")]) == 2
    assert "model.safetensors: damaged" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("argv", [[], ["onnx"], ["to-hf", "a", "b", "--step", "last"], ["from-hf"]])
def test_command_usage(argv):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2


def test_an_export_can_be_read_by_others_as_other_files_can(exported, tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    modes = {path.stat().st_mode for path in (plain, *exported.iterdir())}
    assert len(modes) == 1
