"""Handwritten digits with a tiny BEiT: the whole main job on a CPU, without a network.

    python main.py --config=configs/quickstart.py --workdir=workdirs/quickstart

scikit-learn's 1,797 digits of 8 x 8 pixels, an 80 % / 20 % split, trained from scratch.

And the whole story of BEiT: a tokenizer, pre-training on images without labels, fine-tuning on
50 labels, beside the same network from scratch (`make story` does it with five seeds):

    python main.py --config=configs/quickstart.py:tokenizer --workdir=workdirs/tokenizer
    python main.py --config=configs/quickstart.py:pretrain --workdir=workdirs/pretrain \
        --config.tokenizer=workdirs/tokenizer
    python main.py --config=configs/quickstart.py:few --workdir=workdirs/few \
        --config.pretrained=workdirs/pretrain
    python main.py --config=configs/quickstart.py:few --workdir=workdirs/few_scratch
    python -m beit_jax.compare workdirs/few workdirs/few_scratch --out workdirs/few_compared
"""

from configs import _shared, common, pretrain, train_tokenizer


def get_config(arg=None):
    """`arg`: "", "tokenizer", "pretrain" or "few"."""
    arg = _shared.parse_arg(arg, "tokenizer", "pretrain", "few")
    if arg == "tokenizer":
        return train_tokenizer.get_config("digits")
    if arg == "pretrain":
        config = pretrain.get_config("digits")
        config.objective = "tokens"
        config.num_epochs = 200.0
        config.eval_every = config.save_every = "20ep"
        return config
    config = common.get_config()
    config.data.name = "digits"
    config.preset = "digits"

    config.augment.crop = "rrc"
    config.augment.scale = (0.7, 1.0)
    config.augment.flip = 0.0

    config.batch_size = 32
    config.num_epochs = 40.0
    config.optim.name = "adamw"
    config.optim.learning_rate = 1.5e-3
    config.optim.warmup = "2ep"
    config.optim.weight_decay = 0.05
    config.eval_every = "5ep"
    config.save_every = "10ep"
    config.log_every = "100"
    if arg == "few":
        config.data.train, config.data.val = "train[:50]", ""
        config.num_epochs = 200.0
        config.optim.warmup = "5%"
        config.save_every = "100ep"
    return config
