"""Pre-trains BEiT on images without labels.

    python main.py --config=configs/pretrain.py:digits --workdir=workdirs/mim
    python main.py --config=configs/pretrain.py:cifar10 --config.tokenizer=workdirs/tokenizer ...
    python main.py --config=configs/pretrain.py:folder:PATH,mae ...

and then fine-tunes: python main.py --config=configs/quickstart.py
--config.pretrained=workdirs/mim ...

Of these, digits predicts pixels (SimMIM); the others predict visual tokens and need
--config.tokenizer, or another objective as a further argument: simmim, mae or data2vec. Images of
a folder are found at any depth; the tenth that configs/image_folder.py tests on, if it is given the
same folder, is left out. A size may follow the data: imagenet,large or folder:PATH,tiny,simmim;
other sizes are flags: --config.model.image_size=192, --config.num_epochs=300.

imagenet is the published recipe of BEiT (microsoft/unilm), 800 epochs of ImageNet-1k at batch size
2048, but for masks, which all have 75 of 196 patches, as in BEiT v2; some have fewer with
--config.mask.kind=beit_v1, which does not go with accumulate_steps. imagenet,v2 is that of BEiT v2,
1600 epochs with patch aggregation, for a tokenizer that had a teacher. imagenet,mae is MAE's (800
epochs at batch size 4096), and imagenet,data2vec data2vec's (base). imagenet,simmim is SimMIM's,
but that its learning rate falls along a cosine and not by a tenth after epoch 700. With other data
these arguments change what an objective wants (masks, regularisation, augmentation) and leave
durations as they are. None of those of ImageNet was run here.
"""

from configs import _shared

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OBJECTIVES = ("tokens", "v2", "simmim", "mae", "data2vec")


def get_config(arg=None):
    """`arg`: digits, cifar10 (default), imagenet, folder:PATH, hf:NAME or tfds:NAME, and perhaps a
    size, and perhaps tokens, v2, simmim, mae or data2vec."""
    kind, data, size, objective = _shared.parse_data(
        arg, _shared.UNLABELLED, _shared.SIZES, _OBJECTIVES
    )
    config = _shared.unlabelled(data, "pretrain")
    config.optim.name = "adamw"
    config.optim.learning_rate = 1.5e-3
    config.optim.end_value = 1e-5
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 3.0
    {"digits": _digits, "cifar10": _cifar10, "imagenet": _imagenet, "folder": _folder}[kind](config)
    _shared.set_size(config, kind, size)
    if objective:
        _set_objective(config, objective, kind, large=size == "large")
        if kind == "imagenet":
            _as_published(config, objective)
    return config


def _set_objective(config, objective, kind, large):
    """What the papers of the objectives change beside the loss."""
    config.objective = "tokens" if objective == "v2" else objective
    if config.objective != "tokens":
        config.mask.kind = config.mask.ratio = config.mask.num_mask_patches = None
    if objective == "v2":
        config.model.early_layers = 3 if kind == "digits" else 21 if large else 9
        config.augment.scale = (0.2, 1.0)
    if objective == "simmim":
        config.augment.scale = (0.67, 1.0)
        config.augment.color_jitter = 0.0
    if objective == "mae":
        config.model.drop_path_rate = 0.0
        config.model.layer_scale_init_value = 0.0
        config.model.rescale_init = False
        config.augment.scale = (0.2, 1.0)
        config.augment.color_jitter = 0.0
        config.optim.b2 = 0.95
        config.optim.clip_norm = 0.0
    if objective == "data2vec":
        config.keep_best = 0  # its targets change, so that losses of two steps do not compare
        config.model.drop_path_rate = 0.2 if large else 0.25
        config.model.layer_scale_init_value = 1e-5 if large else 1e-4
        config.model.attention_probs_dropout_prob = 0.15 if large else 0.05


def _as_published(config, objective):
    """Durations and learning rates of ImageNet."""
    if objective == "v2":
        config.num_epochs = 1600.0
    if objective == "simmim":
        config.optim.learning_rate = 4e-4  # 1e-4 for each 512 images
        config.optim.end_value = 4e-5
        config.optim.warmup_init = 2e-6
        config.optim.clip_norm = 5.0
    if objective == "mae":
        config.batch_size = 4096
        config.optim.learning_rate = 2.4e-3  # 1.5e-4 for each 256 images
        config.optim.end_value = 0.0
        config.optim.warmup = "40ep"
    if objective == "data2vec":
        config.optim.learning_rate = 2e-3


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
    config.augment.color_jitter = 0.4
    config.batch_size = 2048
    config.num_epochs = 800.0
    config.optim.warmup = "10ep"


def _folder(config):
    _shared.set_splits(config, "train[:80%]", "train[80%:90%]", "")
    config.data.test = ""
    config.preset = "small"
    config.augment.scale = (0.2, 1.0)
    config.augment.color_jitter = 0.4
    config.batch_size = 256
    config.num_epochs = 300.0
    config.optim.warmup = "5%"
