"""Fine-tunes a BEiT checkpoint on CIFAR-100; everything as in cifar10.py.

    python main.py --config=configs/cifar100.py --workdir=workdirs/cifar100

and with `:baseline`, `:runlocal` or `:small`.
"""

from configs import cifar10


def get_config(arg=None):
    """`arg`: "", "baseline", "runlocal" or "small"."""
    config = cifar10.get_config(arg)
    config.data.name = "cifar100"
    return config
