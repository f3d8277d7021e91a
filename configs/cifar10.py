"""Fine-tunes a BEiT checkpoint on CIFAR-10, by the recipe of a published report.

    python main.py --config=configs/cifar10.py --workdir=workdirs/cifar10
    python main.py --config=configs/cifar10.py:baseline   constant learning rate of 1e-4
    python main.py --config=configs/cifar10.py:runlocal   two minutes on a CPU, from scratch
    python main.py --config=configs/cifar10.py:small      a BEiT of 5.4 M parameters for 32 x 32

Adam, cross-entropy, batch 32, 15 epochs, cosine from 2e-5 to 1e-6, 224 x 224 pixels, validation
after every epoch, a checkpoint kept for good every 10. The report gives test accuracies of 0.9855
(CIFAR-10) and 0.9714 (CIFAR-100), its baseline 0.9528 and 0.8554; they are its figures, not
measured here.
Noise and flips, which it tried: --config.augment.noise_std=0.05 --config.augment.flip=0.5.

`small` starts from nothing, or from a run of configs/pretrain.py (--config.pretrained=WORKDIR): the
fine-tuning of Gani et al. (arXiv:2210.07240), 100 epochs at batch 256, AdamW 1e-3, weight decay
0.05, mixup and CutMix of alpha 1, erasing 0.25, drop path 0.1, label smoothing 0.1; RandAugment in
the place of AutoAugment, and each image once an epoch, not three times.
"""

from configs import _shared, common


def get_config(arg=None):
    """`arg`: "", "baseline", "runlocal" or "small"."""
    arg = _shared.parse_arg(arg, "baseline", "runlocal", "small")
    config = common.get_config()
    config.data.name = "cifar10"
    config.pretrained = "microsoft/beit-base-patch16-224"

    config.batch_size = 32
    config.num_epochs = 15.0
    config.augment.flip = 0.0
    config.optim.name = "adam"
    config.optim.learning_rate = 2e-5
    config.optim.schedule = "cosine"
    config.optim.end_value = 1e-6
    config.keep_every = "10ep"
    if arg == "baseline":
        config.optim.learning_rate = 1e-4
        config.optim.schedule = "constant"
    if arg == "runlocal":
        config.pretrained = ""
        _shared.shrink(config)
    if arg == "small":
        _small(config)
    return config


def _small(config):
    config.pretrained = ""
    config.preset = "cifar"
    config.model.drop_path_rate = 0.1
    config.model.layer_scale_init_value = 0.1
    config.batch_size = 256
    config.eval_batch_size = 1000
    config.num_epochs = 100.0
    config.label_smoothing = 0.1
    config.augment.crop = "pad"
    config.augment.flip = 0.5
    config.augment.randaugment = "rand-m9-mstd0.5-inc1"
    config.augment.erasing = 0.25
    config.augment.mixup, config.augment.cutmix = 1.0, 1.0
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    config.optim.end_value = 1e-6
    config.optim.warmup = "10ep"
    config.optim.weight_decay = 0.05
    config.eval_every = config.save_every = "5ep"
    config.keep_every = "0"
