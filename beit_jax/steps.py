"""Durations in a config (steps, epochs, examples, percent) as steps.

    500 or "500" or "500st"    steps
    "10ep"                     epochs; fractions are fine: "0.5ep"
    "50000ex"                  examples
    "5%"                       percent of the whole run

The units follow big_vision (`big_vision.utils.steps`), written as one string instead of one
config key per unit.
"""

import math
import re

_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(st|ep|ex|%|)\s*")
_FORMS = 'an int (steps) or text such as "1000", "10ep", "50000ex", "5%"'


def to_steps(
    duration: int | str | None,
    *,
    total_steps: int | None = None,
    steps_per_epoch: float | None = None,
    batch_size: int | None = None,
    name: str = "duration",
) -> float:
    """Returns `duration` in steps, not rounded; 0 for None.

    A duration above zero is at least one step.

    Args:
      duration: steps as an int, or text: see the module's docstring.
      total_steps: length of the run, for "%".
      steps_per_epoch: training examples / batch size, not rounded, for "ep".
      batch_size: examples per step over all devices, for "ex".
      name: the config key, for messages.

    Raises:
      ValueError: `duration` is malformed, or what its unit needs is not known.
    """
    if duration is None:
        return 0
    match = _DURATION.fullmatch(str(duration)) if type(duration) in (int, str) else None
    if match is None:
        raise ValueError(f"{name} must be {_FORMS}; got {duration!r}")
    number, unit = float(match[1]), match[2] or "st"
    if unit == "st" and not number.is_integer():
        raise ValueError(f'{name}={duration!r}: steps are whole; write "0.5ep" or "50%" for a part')
    steps_per_unit, needs = {
        "st": (1, None),
        "ep": (steps_per_epoch, "the number of training examples (steps_per_epoch)"),
        "ex": (batch_size and 1 / batch_size, "batch_size"),
        "%": (total_steps and total_steps / 100, "total_steps, given in another unit"),
    }[unit]
    if not steps_per_unit:
        raise ValueError(f"{name}={duration!r} needs {needs}, which is not known here")
    return max(number * steps_per_unit, 1.0) if number else 0.0


def is_time(step: int, every: float | None, total_steps: int | None) -> bool:
    """True after each `every` finished steps, rounded to a whole one, and after the last.

    `step` counts finished steps, so the first is 1. With `every` None or 0 only the last counts.
    Multiples are rounded, not the period: epochs of 2.5 steps end after steps 3, 5, 8 and 10, and
    every second of them is the end of two.
    """
    if step == total_steps or not (every and step):
        return step == total_steps
    return step == _whole(_whole(step / every) * every)


def _whole(x: float) -> int:
    """The nearest whole number, of two the larger; whatever the last bits of x."""
    return math.floor(x + 0.5 + 1e-6)
