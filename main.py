"""python main.py --config=configs/NAME.py[:ARG] --workdir=DIR [--config.key=value ...]"""

import logging
import sys

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", help_string="A file in configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run leaves everything.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    """Runs the config; bad input is one message and exit status 1."""
    if len(argv) > 1:
        sys.exit(f"Unexpected arguments: {' '.join(argv[1:])}. Flags start with --.")
    from beit_jax import train

    logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
    for chatty in ("absl", "jax", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        train.run(CONFIG.value, WORKDIR.value)
    except (OSError, ValueError, FloatingPointError, RuntimeError) as error:
        notes = "\n".join(getattr(error, "__notes__", ()))
        sys.exit(f"{type(error).__name__}: {error}\n{notes}".rstrip())


if __name__ == "__main__":
    app.run(main)
