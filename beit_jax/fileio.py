"""Files that are written whole or not at all, and the JSON in them."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

# errors after which another try may succeed: they say nothing about the file
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)


class FileFormatError(ValueError):
    """A file is damaged, or of a kind that cannot be read here."""

    def __init__(self, path: os.PathLike | str, reason: Any, fix: str = "Download it again"):
        super().__init__(f"{path}: {reason}. {fix}.")


@contextlib.contextmanager
def writing(path: str | os.PathLike, *, binary: bool = False) -> Iterator[IO]:
    """Yields a file, of text unless it is `binary`, that takes the place of `path` when the block
    ends without an error.

    Names of files that are not UTF-8 keep their bytes in text.
    """
    part = f"{path}.part"
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    try:
        with open(part, "wb") if binary else open(part, "w", **text) as file:
            yield file
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        if isinstance(error, OSError) and error.errno and not error.filename:  # as of a full disk
            error.filename = os.fspath(path)
        raise


def read_json(path: str | os.PathLike, fix: str = "Download it again") -> dict[str, Any] | None:
    """Reads an object of JSON; None where there is no such file.

    Raises:
      FileFormatError: it is damaged, or holds anything but an object; `fix` says what to do.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(path, f"damaged JSON: {error}", fix) from error
    if not isinstance(content, dict):
        raise FileFormatError(path, "is no JSON object", fix)
    return content


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes JSON whole or not at all; arrays become lists, numbers that are not finite null."""
    text = json.dumps(jsonable(content), indent=2, allow_nan=False)
    with writing(path) as file:
        file.write(f"{text}\n")


def jsonable(x: Any) -> Any:
    """What JSON can hold of nested mappings, sequences, arrays and numbers."""
    if isinstance(x, Mapping):
        return {str(key): jsonable(value) for key, value in x.items()}
    if isinstance(x, np.ndarray | np.generic | jax.Array):
        x = np.asarray(x).tolist()
    if isinstance(x, list | tuple):
        return [jsonable(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
