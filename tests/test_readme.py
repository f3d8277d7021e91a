"""The Python of the README runs."""

import pathlib
import re

import numpy as np
import pytest

from beit_jax import export

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=["program", "package"])
def test_python_of_the_readme(code, tmp_path, hf_directory):
    out = tmp_path / "program"
    if "DIRECTORY" in code:
        assert export.main(["--checkpoint", str(hf_directory), "--out", str(out)]) == 0
    for old, new in (
        ("DIRECTORY", str(out)),
        ("microsoft/beit-base-patch16-224", str(hf_directory)),
        ("224, 224", "16, 16"),
    ):
        code = code.replace(old, new)
    names = {}
    exec(code, names)
    logits = np.asarray(names["logits"])
    assert logits.shape == (8, 3) and np.isfinite(logits).all() and logits.std() > 0
    if "info" in names:
        shapes = {**names["params"]["layer_0"]["attention"]["query"]}
        assert shapes["kernel"].shape == (16, 16) and names["info"].architecture["num_labels"] == 3
