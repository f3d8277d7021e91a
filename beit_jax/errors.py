"""Which errors are shown as messages, and which are bugs, shown as tracebacks."""

import pathlib
import re
import traceback
from collections.abc import Iterable, Sequence

import jax

KINDS = (OSError, ValueError, RuntimeError, FloatingPointError)  # that may be messages
_PACKAGE = pathlib.Path(__file__).resolve().parent
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def message(error: BaseException) -> str:
    """The text to show for an error of the system, or for one that a `raise` of this package made
    on purpose, with its notes.

    Raises:
      error: it is a bug, of ours or of a library.
    """
    text = str(error)
    if _OUT_OF_MEMORY in text and isinstance(error, jax.errors.JaxRuntimeError):
        text = (
            f"{text.splitlines()[0]}\nThe device has too little memory: take a smaller batch (in "
            "training perhaps with config.accumulate_steps, which keeps a step's number of "
            "images), config.model.remat=dots or full, or, where they are large, do not keep "
            "images on the device: config.data.resident_bytes=0."
        )
    elif not isinstance(error, OSError) and not _is_raised_here(error):
        raise error
    # Grain and JAX add notes on tracebacks, which are not shown
    notes = [note for note in getattr(error, "__notes__", ()) if not note.startswith("---")]
    return "\n".join([text, *notes])


def few(names: Sequence, most: int = 8) -> str:
    """The first `most` of the names, for a message."""
    return ", ".join(map(str, names[:most])) + ", ..." * (len(names) > most)


def compile_patterns(argument: str, patterns: Iterable[str]) -> list[re.Pattern]:
    """The regular expressions of an argument; ValueError, with its name, where one is none."""
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(
            f"{argument}: {error.pattern!r} is no regular expression: {error}."
        ) from None


def _is_raised_here(error) -> bool:
    """Whether the frame that raised it is one of ours, at a `raise`: what C code raises has no
    frame of its own."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = _PACKAGE in pathlib.Path(frame.filename).resolve().parents
    return is_ours and (frame.line or "raise").startswith("raise")
