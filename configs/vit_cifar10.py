"""A small ViT from scratch on CIFAR-10 beside a small CNN, by the recipe of a published report.

    python main.py --config=configs/vit_cifar10.py --workdir=workdirs/vit_cifar10
    python main.py --config=configs/vit_cifar10.py:cnn      the CNN, 500 epochs
    python main.py --config=configs/vit_cifar10.py:modern   the ViT by a recipe of today
    python main.py --config=configs/vit_cifar10.py:runlocal a few minutes on a CPU

The ViT: patch 4, hidden 288, MLP 512, norms after attention and MLP, about 8 M parameters; here 13
layers of 9 heads, 8,223,306 parameters. Adam, 1.5e-4, betas 0.9 and 0.999, 300 epochs. The CNN:
two convolutions with pooling and three dense layers, 44,110 parameters, 500 epochs (see
`beit_jax/models/cnn.py`). The report names neither the number of layers and heads, nor the CNN's
widths, nor the batch size and augmentation: layers and widths are chosen for its counts, batches
are of 128, and the images stay as they are. `modern` has the same size with norms before, AdamW,
warm-up and cosine, crops, flips, RandAugment, mixup, CutMix, erasing, label smoothing, drop path
and averaged weights.

The report reads the test accuracy every five epochs. So the validation split is the test split
here: the curve val/accuracy is that curve, and all of train is trained on. Nothing is chosen by
it: only the last checkpoint is kept, and the final test is of that. None of this was run for the
full number of epochs here.
"""

from configs import _shared, common


def get_config(arg=None):
    """`arg`: "", "cnn", "modern" or "runlocal"."""
    arg = _shared.parse_arg(arg, "cnn", "modern", "runlocal")
    config = common.get_config()
    config.data.name = "cifar10"
    config.data.train, config.data.val, config.data.test = "train", "test", "test"
    config.eval_every = config.save_every = "5ep"
    config.keep_last, config.keep_best = 1, 0
    config.log_every = "1ep"

    config.model_name = "vit"
    config.preset = "cifar_8m"
    config.batch_size = 128
    config.eval_batch_size = 1000
    config.num_epochs = 300.0
    config.augment.flip = 0.0
    config.optim.name = "adam"
    config.optim.learning_rate = 1.5e-4
    config.optim.b1, config.optim.b2 = 0.9, 0.999
    config.optim.schedule = "constant"
    if arg == "cnn":
        config.model_name = "cnn"
        config.preset = "cifar"
        config.num_epochs = 500.0
    elif arg == "modern":
        _modernise(config)
    else:
        config.model.use_post_norm = True
    if arg == "runlocal":
        _shared.shrink(config)
        config.data.val = config.data.test
        config.eval_every = config.save_every = "1ep"
    return config


def _modernise(config):
    config.model.drop_path_rate = 0.1
    config.batch_size = 256
    config.augment.crop = "pad"
    config.augment.flip = 0.5
    config.augment.randaugment = "rand-m9-mstd0.5-inc1"
    config.augment.erasing = 0.25
    config.augment.mixup, config.augment.cutmix = 0.8, 1.0
    config.label_smoothing = 0.1
    config.ema_decay = 0.999
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "cosine"
    config.optim.end_value = 1e-5
    config.optim.warmup = "10ep"
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 1.0
