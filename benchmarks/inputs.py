"""Decoding and cropping on the host, beside torch's DataLoader and tf.data on the same files.

    python -m benchmarks.inputs --out benchmarks/results/inputs.json

The files are JPEGs of 500 x 375 pixels, made here. Each contender reads them in random order, cuts
a random part (8 % to 100 % of the area), resizes it to 224 x 224 by bicubic interpolation and
yields uint8 batches of 64. torch's workers use Pillow as torchvision's RandomResizedCrop does;
tf.data, where TensorFlow is installed, decodes only the part that is cut out.
"""

import argparse
import importlib.util
import os
import pathlib
import shlex
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image

from beit_jax.data import images, pipeline, sources
from beit_jax.data.augment import Augment
from beit_jax.fileio import write_json
from benchmarks.timing import RESULTS, SEED, machine

SIZE, BATCH = (224, 224), 64
SEEN = {"image": images.Rendering(SIZE)}


def make_files(folder: pathlib.Path, number: int) -> None:
    """Images with the detail of photographs, in two classes."""
    rng = np.random.default_rng(SEED)
    for i in range(number):
        coarse = rng.integers(0, 256, (24, 32, 3), np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(image).astype(np.int16) + rng.integers(-12, 13, (375, 500, 3))
        path = folder / str(i % 2) / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def ours(folder, workers):
    """Batches of the pipeline that `main.py` trains with."""
    source = sources.get_source(f"folder:{folder}", "all")
    order = pipeline.Order(len(source), BATCH, seed=SEED)
    return pipeline.train_batches(
        source, order, renderings=SEEN, seed=SEED, settings=Augment(crop="rrc"), threads=workers
    )


class Crops(torch.utils.data.Dataset):
    """A map-style dataset as torchvision's ImageFolder with RandomResizedCrop."""

    def __init__(self, folder):
        self._paths = sorted(pathlib.Path(folder).rglob("*.jpg"))

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index):
        with Image.open(self._paths[index]) as image:
            image = image.convert("RGB")
        top, left, tall, wide = images.sample_crop(
            (image.height, image.width), np.random.default_rng(torch.initial_seed() + index)
        )
        part = image.crop((left, top, left + wide, top + tall))
        pixels = np.array(part.resize(SIZE, Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels), int(self._paths[index].parent.name)


def torch_loader(folder, workers):
    """Batches of a DataLoader with as many worker processes as cores, without end."""
    loader = torch.utils.data.DataLoader(
        Crops(folder),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        prefetch_factor=4,
    )
    while True:
        yield from loader


def tf_data(folder, workers):
    """Batches of a tf.data pipeline in the way of big_vision, without end."""
    import tensorflow as tf

    def load(path):
        data = tf.io.read_file(path)
        shape = tf.io.extract_jpeg_shape(data)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape, tf.zeros([0, 0, 4]), area_range=(0.08, 1.0), use_image_if_no_bounding_boxes=True
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.io.decode_and_crop_jpeg(data, window, channels=3, dct_method="INTEGER_ACCURATE")
        image = tf.image.resize(image, SIZE, "bicubic", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

    paths = [str(path) for path in pathlib.Path(folder).rglob("*.jpg")]
    data = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat()
    data = data.map(load, num_parallel_calls=workers).batch(BATCH, drop_remainder=True)
    return data.prefetch(2).as_numpy_iterator()


def main():
    """Measures all contenders in turns, forth and back, and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=os.path.join(RESULTS, "inputs.json"))
    parser.add_argument("--files", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=16, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    contenders = {"ours": ours, "torch DataLoader": torch_loader}
    if importlib.util.find_spec("tensorflow"):
        contenders["tf.data"] = tf_data
    workers = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        make_files(pathlib.Path(folder), args.files)
        speeds = {name: [] for name in contenders}
        for _ in range(args.rounds):
            for name in (*contenders, *reversed(contenders)):
                batches = iter(contenders[name](folder, workers))  # anew: none works ahead of time
                for _ in range(3):
                    next(batches)
                start = time.perf_counter()
                for _ in range(args.batches):
                    next(batches)
                speeds[name].append(BATCH * args.batches / (time.perf_counter() - start))
                if hasattr(batches, "close"):
                    batches.close()
                del batches
    median = {name: statistics.median(values) for name, values in speeds.items()}
    best = max(value for name, value in median.items() if name != "ours")
    content = {
        "command": shlex.join(["python", "-m", "benchmarks.inputs", *sys.argv[1:]]),
        "machine": machine(),
        "seed": SEED,
        "images_per_second": {n: [median[n], min(v), max(v)] for n, v in speeds.items()},
        "speed_ratio": median["ours"] / best,
    }
    write_json(args.out, content)
    for name, value in median.items():
        print(f"{name:18} {value:8,.0f} images/s")
    print(f"ratio to the best peer {content['speed_ratio']:.2f}")


if __name__ == "__main__":
    main()
