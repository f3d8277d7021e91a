"""Vectors of images."""

import numpy as np
import pytest

from beit_jax import embed, inference, knn, pretrained
from beit_jax.data import sources


@pytest.fixture(scope="module")
def workdir(train, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    train(path)
    return path


def command(workdir, images, out, *arguments):
    paths = ["--checkpoint", str(workdir), "--images", str(images), "--out", str(out)]
    return embed.main([*paths, *arguments])


def test_vectors_are_the_features_of_knn(tmp_path, workdir, image_dir):
    start = pretrained.load(str(workdir))
    source = sources.get_source(f"folder:{image_dir}", "all")
    layers, _ = knn.extract(inference.make(knn.describe, start, batch_size=16), source)
    place = {str(image_dir / source.id(i)): i for i in range(len(source))}
    for arguments, expected in (
        ((), layers[-1]),
        (("--layer", "0"), layers[0]),
        (("--layer", "-2"), layers[0]),
    ):
        assert command(workdir, image_dir, tmp_path / "v.npz", *arguments) == 0
        found = np.load(tmp_path / "v.npz")
        assert found["vector"].dtype == np.float32 and len(set(found["path"])) == 60
        unit = found["vector"] / np.linalg.norm(found["vector"], axis=1, keepdims=True)
        rows = [place[path] for path in found["path"]]
        np.testing.assert_allclose(unit, expected[rows], atol=1e-5)
    assert np.abs(layers[-1] - layers[0]).max() > 0.01


def test_bad_images_are_left_out(tmp_path, workdir, image_dir, capsys):
    good, bad = sorted(image_dir.glob("red/*"))[:2], tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    paths = [str(good[0]), str(bad), str(good[1])]
    out = str(tmp_path / "v.npz")
    arguments = ["--checkpoint", str(workdir), "--out", out, "--images", *paths]
    assert embed.main(arguments) == 3
    found = np.load(out)
    assert found["path"].tolist() == [paths[0], paths[2]] and len(found["vector"]) == 2
    captured = capsys.readouterr()
    assert f"not read: {bad}" in captured.err
    assert captured.out == f"2 vectors, 1 not read: {out}\n"


def test_warnings_are_plain_lines(tmp_path, workdir, image_dir, start):
    (tmp_path / "notes.heic").write_text("")
    (tmp_path / "red").symlink_to(image_dir / "red")
    paths = ["--checkpoint", workdir, "--images", tmp_path, "--out", tmp_path / "v.npz"]
    status, output = start("beit_jax.embed", *paths).wait()
    assert status == 0 and f"\nIgnored files of {tmp_path}: 1 .heic." in f"\n{output}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layer", "9"), "The layer is 9; the network has layers 0 to 1, or -2 to -1."),
        (("--layer", "-3"), "The layer is -3; the network has layers 0 to 1, or -2 to -1."),
    ],
)
def test_unknown_layers(tmp_path, workdir, image_dir, capsys, arguments, message):
    out = tmp_path / "v.npz"
    assert command(workdir, image_dir, out, *arguments) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_another_ending(tmp_path, workdir, image_dir, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(workdir, image_dir, tmp_path / "v.csv")
    assert "expected a file ending in .npz" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command(workdir, image_dir, tmp_path / "v.npz", "--batch-size", "0")
    assert "argument --batch-size: 0 is less than 1" in capsys.readouterr().err
