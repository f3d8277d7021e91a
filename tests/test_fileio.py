"""Files that are there whole or not at all."""

import json
import math
import os

import jax
import numpy as np
import pytest

from beit_jax import fileio


def test_write_json(tmp_path):
    path = tmp_path / "results.json"
    fileio.write_json(
        path,
        {
            "loss": np.float32(0.5),
            "count": np.int64(3),
            "confusion": np.array([[1.0, np.nan]]),
            "device": jax.numpy.arange(2),
            "none": None,
            "nested": [{"x": math.inf}, (1, True)],
            3: "ä",
        },
    )
    assert json.loads(path.read_text()) == {
        "loss": 0.5,
        "count": 3,
        "confusion": [[1.0, None]],
        "device": [0, 1],
        "none": None,
        "nested": [{"x": None}, [1, True]],
        "3": "ä",
    }


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "results.json"
    fileio.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        fileio.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_writing_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), fileio.writing(path) as file:
        file.write("half of the n")
        file.flush()
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["rows.csv"]
    assert path.read_text() == "old"


def test_names_that_are_not_utf8_keep_their_bytes(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    with fileio.writing(tmp_path / "names.txt") as file:
        file.write(name)
    assert (tmp_path / "names.txt").read_bytes() == b"caf\xe9.png"
    fileio.write_json(tmp_path / "names.json", {"class": name})
    assert fileio.read_json(tmp_path / "names.json") == {"class": name}


@pytest.mark.parametrize(
    "content, reason",
    [(b"", "damaged JSON"), (b"{", "damaged JSON"), (b"\xff", "damaged JSON"), (b"[]", "no JSON")],
)
def test_read_json_that_is_none(tmp_path, content, reason):
    path = tmp_path / "model.json"
    assert fileio.read_json(path) is None
    path.write_bytes(content)
    with pytest.raises(fileio.FileFormatError, match=f"model.json: .*{reason}.*Restore it"):
        fileio.read_json(path, "Restore it")
