"""Fine-tunes a BEiT checkpoint on CIFAR-100; everything as in cifar10.py.

python main.py --config=configs/cifar100.py --workdir=workdirs/cifar100
python main.py --config=configs/cifar100.py:baseline
python main.py --config=configs/cifar100.py:runlocal
"""

from configs import cifar10


def get_config(arg=None):
    """`arg`: "", "baseline" or "runlocal"."""
    config = cifar10.get_config(arg)
    config.data.name = "cifar100"
    return config
