"""Fine-tunes a BEiT checkpoint on CIFAR-10, by the recipe of a published report.

    python main.py --config=configs/cifar10.py --workdir=workdirs/cifar10
    python main.py --config=configs/cifar10.py:baseline   constant learning rate of 1e-4
    python main.py --config=configs/cifar10.py:runlocal   two minutes on a CPU, from scratch

Adam, cross-entropy, batch 32, 15 epochs, cosine from 2e-5 to 1e-6, 224 x 224 pixels, a checkpoint
kept every 10 epochs, validation after each. The report gives test accuracies of 0.9855 (CIFAR-10)
and 0.9714 (CIFAR-100), its baseline 0.9528 and 0.8554; they are its figures, not measured here.
Noise and flips, which it tried: --config.augment.noise_std=0.05 --config.augment.flip=0.5.
"""

from configs import common


def get_config(arg=None):
    """`arg`: "", "baseline" or "runlocal"."""
    arg = common.parse_arg(arg, "baseline", "runlocal")
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
        common.shrink(config)
    return config
