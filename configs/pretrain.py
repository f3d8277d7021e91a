"""Pre-trains BEiT on pictures without labels.

    python main.py --config=configs/pretrain.py:digits --workdir=workdirs/mim
    python main.py --config=configs/pretrain.py:cifar10 --config.tokenizer=workdirs/tokenizer ...
    python main.py --config=configs/pretrain.py:folder=PATH --config.objective=mae ...

and then fine-tunes: python main.py --config=configs/quickstart.py
--config.pretrained=workdirs/mim ...

Of these, digits runs without a tokenizer (SimMIM); the others predict visual tokens and need
--config.tokenizer, or another --config.objective: simmim, mae or data2vec. Pictures of a folder are
found at any depth; the tenth that configs/image_folder.py tests on, if it is given the same folder,
is left out. A size may follow: imagenet,large or folder=PATH,tiny; other sizes are flags:
--config.model.image_size=192, --config.num_epochs=300.

imagenet is the published recipe of BEiT (microsoft/unilm), 800 epochs of ImageNet-1k at batch size
2048, but for masks, which all have 75 of 196 patches, as in BEiT v2; some have fewer with
--config.mask.kind=beit_v1. BEiT v2's own recipe is that with a tokenizer that had a teacher and
--config.model.early_layers=9 (21 of large) --config.augment.scale="(0.2, 1.0)"
--config.num_epochs=1600. None was run here.
"""

from configs import common

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config(arg=None):
    """`arg`: digits, cifar10 (default), imagenet or folder=PATH, and perhaps a size."""
    config, kind, size = common.unlabelled(arg, "pretrain")
    config.optim.name = "adamw"
    config.optim.learning_rate = 1.5e-3
    config.optim.end_value = 1e-5
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 3.0
    {"digits": _digits, "cifar10": _cifar10, "imagenet": _imagenet, "folder": _folder}[kind](config)
    common.set_size(config, kind, size)
    return config


def _digits(config):
    config.objective = "simmim"
    config.mask.kind = "random"
    config.mask.ratio = 0.5
    config.mask.min_mask_patches_per_block = 2
    config.mask.bank = 4096
    config.decoder.hidden_size = 32
    config.decoder.num_hidden_layers = 1
    config.decoder.num_attention_heads = 4
    config.data2vec.layers = 2
    config.data2vec.decay, config.data2vec.end_decay = 0.99, 0.999
    config.data2vec.decay_steps = 500
    config.preset = "digits"
    config.augment.scale = (0.7, 1.0)
    config.augment.flip = 0.0
    config.batch_size = 64
    config.num_epochs = 60.0
    config.optim.warmup = "2ep"
    config.eval_every = "10ep"
    config.save_every = "10ep"
    config.log_every = "100"


def _cifar10(config):
    config.preset = "cifar"  # patch 4: a grid of 8 x 8
    config.mask.num_mask_patches = 26
    config.mask.min_mask_patches_per_block = 4
    config.decoder.hidden_size = 128
    config.decoder.num_hidden_layers = 2
    config.decoder.num_attention_heads = 4
    config.augment.scale = (0.2, 1.0)
    config.batch_size = 512
    config.num_epochs = 200.0
    config.optim.warmup = "10ep"
    config.eval_every = "10ep"
    config.save_every = "10ep"


def _imagenet(config):
    config.data.name = "tfds:imagenet2012"
    config.data.train, config.data.val, config.data.test = "train", "validation[:5000]", ""
    config.image.mean, config.image.std = _IMAGENET_MEAN, _IMAGENET_STD
    config.image.crop, config.image.crop_pct = "center", 0.875
    config.preset = "base"
    config.mask.ratio = 75 / 196
    config.augment.color_jitter = 0.4
    config.batch_size = 2048
    config.num_epochs = 800.0
    config.optim.warmup = "10ep"


def _folder(config):
    config.data.train, config.data.val, config.data.test = "train[:80%]", "train[80%:90%]", ""
    config.preset = "small"
    config.mask.ratio = 75 / 196
    config.augment.scale = (0.2, 1.0)
    config.augment.color_jitter = 0.4
    config.batch_size = 256
    config.num_epochs = 300.0
    config.optim.warmup = "5%"
