"""Draws what pre-training predicts: python -m beit_jax.reconstruct --checkpoint WORKDIR --images
PATH --out FILE.png

Each image as the network sees it, with the masked patches grey, and with them predicted, as
pixels or as visual tokens. The tokenizer draws all tokens of an image, those that it finds itself
and again with the masked ones predicted. Images that cannot be read are named on
stderr, left out, and make the exit status 3; bad arguments make it 2.
"""

import pathlib
import sys

import numpy as np
from ml_collections import ConfigDict

from beit_jax import checkpoint, command, fileio, pretrained
from beit_jax.data import image_files, images, views
from beit_jax.tasks import pretrain


def reconstruct(
    workdir, paths: list[pathlib.Path], *, step="best"
) -> tuple[dict[str, np.ndarray], list[images.BadImageError]]:
    """Originals, masked and predicted images, each uint8 [B, h, w, C], of image files, by
    caption.

    Those that cannot be read are left out; beside the images are their errors.

    Args:
      workdir: of a pre-training run.
      paths: the files; their masks are of the run's kind, the same in every call with as many.
      step: as of `checkpoint.load_params`.

    Raises:
      FileNotFoundError, ValueError: no such run, no image that can be read, or nothing to draw.
    """
    info = checkpoint.read_model_info(workdir)
    if info.task != "pretrain":
        raise ValueError(f"{workdir} is of the task {info.task!r}; expected a pre-training run.")
    config = _config(workdir)
    config.mask.bank = len(paths)
    info, model, objective, bank = pretrain.make_parts(config, info=info)
    if objective.reconstruct is None:
        raise ValueError(f"The objective {config.objective!r} predicts features, not images.")
    size = model.config.image_size
    crop = views.host_crop(info.image, pretrain.make_renderings(info, objective, size))
    found, bad = image_files.read(paths, crop)
    batch = views.as_batch(found)
    draw = pretrain.make_reconstruction(info, objective, size, True)
    params = pretrained.load_workdir(workdir, step).params
    frozen = {**objective.frozen, "masks": bank}
    return draw(params, frozen, batch, np.arange(len(found))), bad


def _config(workdir) -> ConfigDict:
    path = pathlib.Path(workdir, "config.json")
    content = fileio.read_json(path, "Restore it")
    if content is None:
        raise FileNotFoundError(f"{workdir} has no config.json: it was not made by a run.")
    if missing := [key for key in ("objective", "mask") if key not in content]:
        raise ValueError(
            f"{path} has no {' and no '.join(missing)}: it is not that of a pre-training run. "
            "Restore it."
        )
    return ConfigDict(content)


def act(args, paths) -> list[images.BadImageError]:
    """Writes `args.out`; returns the images that could not be read."""
    found, bad = reconstruct(args.checkpoint, paths)
    pretrain.draw_reconstructions(found, args.out)
    return bad


def main(argv=None) -> int:
    """The command; returns the exit status."""
    parser = command.make_parser("reconstruct", __doc__, "the sheet, a .png")
    parser.add_argument("--checkpoint", required=True, help="workdir of a pre-training run")
    command.add_limit(parser)
    return command.run(parser, argv, act, ".png")


if __name__ == "__main__":
    sys.exit(main())
