"""Draws attention maps: python -m beit_jax.attention_maps --checkpoint WORKDIR --images
PATH --out FILE.png

Each image as the network sees it, how the attention of one layer weighs its patches, and the
attention rolled out through all layers (arXiv:2005.00928). The weights are those of what the head
reads: of the class token, or of the mean of all patches. Images that cannot be read are named on
stderr, left out, and make the exit status 3; bad arguments make it 2.
"""

import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import architecture, command, plots, pretrained
from beit_jax.data import image_files, images, views
from beit_jax.models import features


class Maps(NamedTuple):
    """Of B images that a network sees as h x w patches.

    Attributes:
      image: as it is seen, uint8 [B, H, W, 3].
      layers: the weight of each patch in each layer and head, float32 [L, B, heads, h, w].
      rollout: its weight through all layers, [B, h, w].
      bad: an error for each image that could not be read, and is not among the B.
    """

    image: np.ndarray
    layers: np.ndarray
    rollout: np.ndarray
    bad: list[images.BadImageError]


def look(
    start: pretrained.Pretrained, paths: list[pathlib.Path], *, batch_size: int = 4, dtype="auto"
) -> Maps:
    """The attention maps of image files.

    Raises:
      ValueError: no image can be read, or the network has no attention from all patches to all.
    """
    info = start.info
    model = architecture.make_model(info, dtype=dtype)
    rendering = views.rendering(info.image, model.config.image_size)
    found, bad = image_files.read(paths, views.host_crop(info.image, {"image": rendering}))
    image = views.as_batch(found)["image"]

    @jax.jit
    def describe(params, image):
        view = views.eval_view(image, info.image, model.config.image_size, resized=True)
        maps = features.attention_maps(model, params, view)
        layers = [features.seen_patches(model.config, x) for x in maps]  # [B, heads, h, w]
        return jnp.stack(layers), features.seen_patches(model.config, features.rollout(maps))

    parts = [
        jax.device_get(describe(start.params, image[i : i + batch_size]))
        for i in range(0, len(image), batch_size)
    ]
    layers, rolled_out = zip(*parts, strict=True)
    return Maps(image, np.concatenate(layers, 1), np.concatenate(rolled_out), bad)


def act(args, paths: list[pathlib.Path]) -> list[images.BadImageError]:
    """Writes `args.out`; returns the images that could not be read."""
    start = pretrained.load(args.checkpoint)
    layer = features.check_layer(args.layer, architecture.make_model(start.info))
    maps = look(start, paths)
    heads = maps.layers[layer].swapaxes(0, 1)  # [heads, B, h, w]
    columns = {f"layer {layer}": heads.mean(0)}
    if args.heads:
        columns = {f"layer {layer}, head {i}": head for i, head in enumerate(heads)}
    columns["rollout"] = maps.rollout
    bad = {error.name for error in maps.bad}
    names = [f"{path.parent.name}/{path.name}" for path in paths if str(path) not in bad]
    cells, captions = [], []
    for i, (name, image) in enumerate(zip(names, maps.image, strict=True)):
        cells += [image, *(plots.heat(image, weights[i]) for weights in columns.values())]
        captions += [name, *columns]
    across = 1 + len(columns)
    across *= max(1, 6 // across)
    title = "Attention, each map from its smallest weight (dark) to its largest (bright)"
    plots.contact_sheet(cells, captions, args.out, title=title, columns=across)
    return maps.bad


def main(argv=None) -> int:
    """The command; returns the exit status."""
    parser = command.make_parser("attention_maps", __doc__, "the sheet, a .png")
    parser.add_argument("--checkpoint", required=True, help=command.CHECKPOINT)
    command.add_limit(parser)
    command.add_layer(parser)
    parser.add_argument("--heads", action="store_true", help="each head of that layer")
    return command.run(parser, argv, act, ".png")


if __name__ == "__main__":
    sys.exit(main())
