"""Trains a visual tokenizer, whose tokens configs/pretrain.py predicts.

    python main.py --config=configs/train_tokenizer.py:digits --workdir=workdirs/tokenizer
    python main.py --config=configs/train_tokenizer.py:cifar10 ...
    python main.py --config=configs/train_tokenizer.py:folder:PATH --config.teacher=CHECKPOINT ...

Without --config.teacher it learns to tell pixels; with one (a BEiT, ViT, DINO; a HuggingFace
directory or hub id, or a workdir) it learns to tell that network's features, as in BEiT v2. Then
--config.image.* stays, and the grids must agree: --config.model.image_size, patch_size.
--config.tokenizer_name=dvae trains DALL-E's discrete VAE. A size may follow: imagenet,large.
imagenet is the recipe of BEiT v2 (microsoft/unilm beit2/TOKENIZER.md), 100 epochs at batch size
512 with a decoder of one layer (--config.model.num_decoder_layers=3 is its other); its networks
have a class token too, ours patches only. It was not run here.
"""

from configs import _shared


def get_config(arg=None):
    """`arg`: digits, cifar10 (default), imagenet, folder:PATH, hf:NAME or tfds:NAME, and perhaps a
    size."""
    kind, data, size = _shared.parse_data(arg, _shared.UNLABELLED, _shared.SIZES)
    config = _shared.unlabelled(data, "train_tokenizer")
    config.optim.name = "adamw"
    config.optim.b2 = 0.99
    config.optim.weight_decay = 1e-4
    config.optim.warmup = "5%"
    {"digits": _digits, "cifar10": _cifar10, "imagenet": _imagenet, "folder": _folder}[kind](config)
    _shared.set_size(config, kind, size)
    return config


def _digits(config):
    config.preset = "digits"
    config.augment.scale = (0.7, 1.0)
    config.augment.flip = 0.0
    config.batch_size = 64
    config.num_epochs = 30.0
    config.optim.learning_rate = 2e-3
    config.dvae.temperature_steps = 400
    config.dvae.kl_steps = 100
    config.eval_every = "10ep"
    config.save_every = "10ep"
    config.log_every = "100"


def _cifar10(config):
    config.preset = "cifar"
    config.augment.scale = (0.2, 1.0)
    config.batch_size = 256
    config.num_epochs = 50.0
    config.optim.learning_rate = 1e-3
    config.dvae.temperature_steps = 8000
    config.eval_every = "5ep"
    config.save_every = "5ep"


def _imagenet(config):
    config.data.name = "tfds:imagenet2012"
    config.data.train, config.data.val, config.data.test = "train", "validation[:5000]", ""
    config.image.crop, config.image.crop_pct = "center", 0.875
    config.tokenizer_interpolation = "bicubic"
    config.codebook.revive = 0.0
    config.batch_size = 512
    config.num_epochs = 100.0
    config.optim.learning_rate = 2e-4  # 5e-5 for each 128 images
    config.optim.end_value = 1e-5
    config.optim.warmup = "10ep"


def _folder(config):
    _shared.set_splits(config, "train[:80%]", "train[80%:90%]", "")
    config.data.test = ""
    config.preset = "small"
    config.augment.scale = (0.2, 1.0)
    config.batch_size = 128
    config.num_epochs = 100.0
    config.optim.learning_rate = 2e-4
