"""What recipes share: how their arguments are read, and starts."""

import os
from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import common

SIZES = ("tiny", "small", "base", "large")  # presets that may be arguments
UNLABELLED = ("cifar10", "digits", "imagenet")  # data to pre-train on
_PREFIXES = ("folder:", "hf:", "tfds:")  # of data of one's own


def parse_arg(arg: str | None, *allowed: str) -> str:
    """The argument after the colon of --config=FILE:ARG, "" for none.

    Raises:
      ValueError: it is not among `allowed`.
    """
    if arg and arg not in allowed:
        available = ", ".join(allowed) or "none"
        raise ValueError(f"Unknown config argument {arg!r}; available: {available}.")
    return arg or ""


def split_words(arg: str | None, names: Sequence[str], *options: Sequence[str]) -> tuple[str, ...]:
    """What an argument names, and of each of `options` the word that follows, or ""; in any order.

    ("folder:a,b", "", "mae") of "folder:a,b,mae", where the last of two options has "mae".

    Raises:
      ValueError: another word follows one of the `names`, or a path that is there.
    """
    words, chosen = (arg or "").split(","), [""] * len(options)
    while of := [i for i, option in enumerate(options) if words[-1:] and words[-1] in option]:
        if chosen[of[0]]:
            break
        chosen[of[0]] = words.pop()
    data = ",".join(words)
    before, comma, word = data.rpartition(",")
    known_before = before in names or before.startswith(_PREFIXES[1:]) or _is_there(before)
    if comma and not _is_there(data) and known_before:
        known = " and ".join(f"one of {', '.join(option)}" for option in options) or "nothing"
        found = ", ".join(filter(None, (word, *chosen)))
        raise ValueError(f"After {before} may follow {known}; got {found}.")
    return data, *chosen


def parse_data(arg: str | None, names: Sequence[str], *options: Sequence[str]) -> tuple[str, ...]:
    """As `split_words` of an argument for data, and before that their kind: one of `names`, the
    first by default, or "folder" for data of one's own.

    Raises:
      ValueError: it is none of these.
    """
    data, *chosen = split_words(arg, names, *options)
    if data.startswith(_PREFIXES) and not data.endswith(":"):
        return "folder", data, *chosen
    if data not in names and os.path.exists(os.path.expanduser(data)):
        raise ValueError(f"Unknown config argument {data!r}; a folder is folder:{data}.")
    kind = parse_arg(data, *names, "folder:PATH", "hf:NAME", "tfds:NAME") or names[0]
    return kind, kind, *chosen


def _is_there(data):
    return os.path.exists(os.path.expanduser(data.removeprefix("folder:").removeprefix("hf:")))


def own_data(path: str) -> str:
    """What `config.data.name` is for a folder or CSV file, or for hf:NAME and tfds:NAME."""
    return path if path.startswith(_PREFIXES) else f"folder:{path}"


def set_splits(config: ConfigDict, *shares: str) -> None:
    """Leaves training, validation and test to the splits that data of one's own have, or else to
    these shares of its images."""
    config.data.train = config.data.val = config.data.test = None
    config.data.shares = shares


def unlabelled(data: str, task_name: str) -> ConfigDict:
    """A config for a task that looks at images only."""
    config = common.get_config()
    config.task_name = task_name
    config.data.name = data
    config.data.labelled = False
    config.best_metric, config.best_mode = "loss", "min"
    config.augment.crop = "rrc"
    return config


def set_size(config: ConfigDict, kind: str, size: str) -> None:
    """The preset of a size, in the place of the recipe's; small images keep small patches.

    Raises:
      ValueError: a size of digits, which have one network.
    """
    if not size:
        return
    if kind == "digits":
        raise ValueError(f"Digits have one size of network, got {size!r}; leave it out.")
    config.preset = size
    if kind == "cifar10":
        config.model.image_size, config.model.patch_size = 32, 4


def shrink(config: ConfigDict) -> None:
    """Makes a recipe a two-minute check on CPU: few images, a small network, two epochs."""
    config.preset = "cifar"
    config.data.train = "train[:2000]"
    config.data.val = "train[-500:]"
    config.data.test = "test[:500]"
    config.num_epochs = 2.0
    config.optim.learning_rate = 1e-3
    config.log_every = "10"
