"""Linear probes on every layer of a frozen network, by the protocol of BEiT.

    python main.py --config=configs/linear_probe.py:DATA --config.pretrained=RUN --workdir=DIR

DATA is digits, cifar10, cifar100, imagenet, folder:PATH, hf:NAME or tfds:NAME. AdamW with
weight decay 1e-4, 1e-3 per 256 images of a batch, cosine to zero, batch 1024 (64 of a folder),
100 epochs, random resized crops and flips; --config.batch_size=512 alone leaves the learning rate
as it is. results.json has the accuracy of each layer.
`python -m beit_jax.knn` asks the same of the nearest neighbours, without training.
"""

from configs import _shared, common

_SPLITS = {  # train, validation, test
    "cifar10": ("train[:90%]", "train[90%:]", "test"),
    "cifar100": ("train[:90%]", "train[90%:]", "test"),
    "digits": ("train[:90%]", "train[90%:]", "test"),
    "imagenet": ("train[:99%]", "train[99%:]", "validation"),
}
_SHARES = ("train[:80%]", "train[80%:90%]", "train[90%:]")  # of data without splits


def get_config(arg=None):
    """`arg`: the dataset, cifar10 by default."""
    kind, data = _shared.parse_data(arg, tuple(_SPLITS))
    config = common.get_config()
    config.task_name = "linear_probe"
    config.data.name = "tfds:imagenet2012" if kind == "imagenet" else data
    if kind == "folder":
        _shared.set_splits(config, *_SHARES)
    else:
        config.data.train, config.data.val, config.data.test = _SPLITS[kind]
    if kind == "imagenet":
        config.image.crop, config.image.crop_pct = "center", 0.875
        config.image.interpolation = "bicubic"

    config.augment.crop = "rrc"
    config.augment.flip = 0.0 if kind == "digits" else 0.5
    config.batch_size = 64 if kind == "folder" else 1024
    config.num_epochs = 100.0
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3 * config.batch_size / 256
    config.optim.weight_decay = 1e-4
    return config
