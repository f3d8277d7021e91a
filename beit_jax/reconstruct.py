"""Draws what pre-training predicts: python -m beit_jax.reconstruct --checkpoint WORKDIR --images
PATH --out FILE.png

Each picture as the network sees it, with the masked patches grey, and with them predicted: as
pixels, or as visual tokens that the tokenizer decodes. Bad arguments make the exit status 2.
"""

import argparse
import json
import os
import pathlib
import sys

import numpy as np
from ml_collections import ConfigDict

from beit_jax import checkpoint, pretrained
from beit_jax.data import images, views
from beit_jax.predict import check_folder, find_pictures
from beit_jax.tasks import pretrain


def _open(path):
    with images.naming(lambda: str(path)):
        return images.open_image(path)


def reconstruct(workdir, paths: list[pathlib.Path], *, step="best") -> list[np.ndarray]:
    """Originals, masked and predicted pictures, each uint8 [B, h, w, C], of picture files.

    Args:
      workdir: of a pre-training run.
      paths: the files; picture i gets mask i of the run's bank.
      step: as of `checkpoint.load_params`.

    Raises:
      FileNotFoundError, ValueError: no such run, picture, or nothing to draw.
    """
    info = checkpoint.read_model_info(workdir)
    if info.task != "pretrain":
        raise ValueError(f"{workdir} is of the task {info.task!r}; expected a pre-training run.")
    config = _config(workdir)
    info, model, objective, bank = pretrain.make_parts(config, info=info)
    if objective.reconstruct is None:
        raise ValueError(f"The objective {config.objective!r} predicts features, not pictures.")
    size = model.config.image_size
    crop = views.host_crop(info.image, pretrain.make_renderings(config, info, objective, size))
    batch = views.as_batch([crop(_open(path)) for path in paths])
    draw = pretrain.make_reconstruction(config, info, objective, size, True)
    params = pretrained.load_workdir(workdir, step).params
    return draw(params, {**objective.frozen, "masks": bank}, batch, np.arange(len(paths)))


def _config(workdir) -> ConfigDict:
    path = os.path.join(workdir, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{workdir} has no config.json: it was not made by a run.")
    with open(path) as file:
        return ConfigDict(json.load(file))


def main(argv=None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m beit_jax.reconstruct", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("--checkpoint", required=True, help="workdir of a pre-training run")
    parser.add_argument("--images", required=True, nargs="+", help="pictures and folders of them")
    parser.add_argument("--out", required=True, help="the sheet, a .png")
    parser.add_argument("--max-images", type=int, default=16)
    args = parser.parse_args(argv)
    if not args.out.endswith(".png"):
        parser.error(f"--out {args.out}: expected a file ending in .png")
    check_folder(parser, args.out)
    if args.max_images < 1:
        parser.error("--max-images must be at least 1")
    try:
        paths = find_pictures(args.images)[: args.max_images]
        pictures = reconstruct(args.checkpoint, paths)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    pretrain.draw_reconstructions(pictures, args.out)
    print(f"{len(paths)} pictures: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
