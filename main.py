"""python main.py --config=configs/NAME.py[:ARG] --workdir=DIR [--config.key=value ...]

Each recipe says at the top of its file what it does and what ARG may be. The keys, with their
defaults, are those of configs/common.py. README.md shows both in use.
"""

import logging
import pathlib
import sys
import traceback

try:
    from absl import app, flags
    from ml_collections import ConfigDict, config_flags

    from configs import common
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}: activate the environment that `make quickstart` makes, by "
        "`. .venv/bin/activate`, or `pip install -r requirements-cpu.txt`."
    )

CONFIG = config_flags.DEFINE_config_file("config", help_string="A file in configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run leaves everything.")
flags.mark_flags_as_required(["config", "workdir"])


def parse_flags(argv):
    """Returns the arguments that are no flags; a mistake is one message and exit status 1."""
    if not {"--help", "-help", "-h"}.isdisjoint(argv):
        print(f"{__doc__}\nRecipes: {recipes()}")
        sys.exit()
    try:
        arguments = flags.FLAGS(argv)
        CONFIG.value.keys()  # a file that is not there is an error only now
        return arguments
    except flags.UnrecognizedFlagError as error:
        message = str(error).strip().splitlines()[-1]
        sys.exit(f"{message}; settings are --config.KEY=VALUE, see configs/common.py")
    except flags.Error as error:
        message = str(error).strip().splitlines()[-1]
        if "other than None" in message:
            message = "Expected python main.py --config=configs/NAME.py --workdir=DIR; " + message
        sys.exit(message)
    except OSError as error:
        sys.exit(f"{str(error).splitlines()[-1].strip()}; available: {recipes()}")
    except (AttributeError, KeyError, TypeError) as error:
        # of the last name of a key, of one before it, or of one that stands below a setting
        unknown = error.__context__ if isinstance(error, AttributeError) else error
        is_key = isinstance(unknown, KeyError | TypeError)
        if not is_key or "ml_collections" not in raised_in(unknown):
            raise
        message = "Unknown config key"
        if isinstance(unknown, KeyError):
            message += ": " + str(unknown.args[0]).replace("\n", ". ")
        sys.exit(message if "Did you mean" in message else message + siblings(argv))


def recipes() -> str:
    """The files of configs/ that are recipes, or where they would be."""
    files = sorted(map(str, pathlib.Path("configs").glob("[!_]*.py")))
    found = ", ".join(file for file in files if file != "configs/common.py")
    return found or "none here, main.py is run from the top of the repository"


def raised_in(error) -> str:
    """The file whose code raised it."""
    return traceback.extract_tb(error.__traceback__)[-1].filename


def siblings(argv) -> str:
    """The keys beside which the first unknown one of the arguments would stand."""
    for argument in argv:
        group, keys = common.get_config(), argument.partition("=")[0].split(".")
        for i, key in enumerate(keys[1:] if keys[0] in ("--config", "-config") else ()):
            if not isinstance(group, ConfigDict):
                return f": {key!r}; {'.'.join(keys[1 : i + 1])} is a setting and has no keys"
            if key not in group:
                return f"; available: {', '.join(sorted(group))}"
            group = group[key]
    return ""


def main(argv):
    """Runs the config; bad input is one message and exit status 1, and a run that was stopped has
    that of its signal."""
    if len(argv) > 1:
        sys.exit(f"Unexpected arguments: {' '.join(argv[1:])}. Flags start with --.")
    logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
    logging.captureWarnings(True)
    for chatty in ("absl", "jax", "matplotlib"):  # failed saves are told by checkpoint.py
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    for chatty in ("datasets", "fsspec", "httpx", "httpx2", "huggingface_hub", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from beit_jax import interrupt

    with interrupt.exits():
        from beit_jax import errors, train  # and what it imports, which talks as it is imported

        try:
            results = train.run(CONFIG.value, WORKDIR.value)
        except errors.KINDS as error:
            sys.exit(f"{type(error).__name__}: {errors.message(error)}")
    if isinstance(results, int):
        sys.exit(128 + results)  # of a signal: what was to follow the run has to wait


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
