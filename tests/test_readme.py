"""The Python of the README runs, on a small checkpoint in the place of the one that it names."""

import pathlib
import re

import numpy as np

from beit_jax import export

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
PROGRAM, PACKAGE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code, **replaced):
    """What the code has in its variables in the end."""
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    variables = {}
    exec(code, variables)
    return variables


def test_program(tmp_path, classifier_directory):
    out = str(tmp_path / "program")
    assert export.main(["--checkpoint", str(classifier_directory), "--out", out]) == 0
    logits = np.asarray(run(PROGRAM, DIRECTORY=out)["logits"])
    assert logits.shape == (8, 3) and np.isfinite(logits).all() and logits.std() > 0


def test_package(classifier_directory):
    path = str(classifier_directory)
    found = run(PACKAGE, **{"microsoft/beit-base-patch16-224": path})
    assert found["logits"].shape == (8, 3) and np.std(found["logits"]) > 0
    assert found["vectors"].shape == (8, 128) and np.std(found["vectors"]) > 0
    assert found["kernel"].shape == (64, 64)
