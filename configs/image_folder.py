"""Fine-tunes a BEiT checkpoint on images of your own, one folder per class.

    python main.py --config=configs/image_folder.py:PATH --workdir=workdirs/mine
    python main.py --config=configs/image_folder.py:PATH,lora --workdir=workdirs/adapted

PATH holds `class/*.jpg`, or `train/class/*.jpg` and `test/class/*.jpg`, or is a CSV file with the
columns image and label, and perhaps split. Classes are the folders' names. PATH may also be hf:NAME
or tfds:NAME, a dataset of these libraries. Its own splits are kept: train, val and test; of train
and one other, that one is the test set and 10 % of train is for validation. Otherwise train is
split 80 % / 10 % / 10 %, the same way on every machine. --config.data.train, val and test choose
others. With fewer than some thousand images a smaller --config.batch_size leaves enough steps.

    after PATH   trains                          from a checkpoint        learning rate  epochs
                 everything, layer decay 0.85    fine-tuned before        5e-5           20
    lora         adapters of rank 16, the head   likewise                 5e-4           20
    bias         biases, the head                likewise                 1e-3           20
    head         the head                        likewise                 5e-3           20
    pretrained   everything, layer decay 0.65    never fine-tuned         2.5e-4         50
    scratch      everything                      none: --config.preset    5e-4           100
    test         nothing: evaluates on the test split, or on all images of one split

The first is BEiT's own fine-tuning after an intermediate one. The rate of `pretrained` is BEiT's
4e-3 for a batch of 1024; it is for a run of configs/pretrain.py, or a checkpoint such as
microsoft/beit-base-patch16-224-pt22k, its default. None of the rates was chosen on data here.
"""

from configs import _shared, common

_HOW = ("lora", "bias", "head", "pretrained", "scratch", "test")


def get_config(arg=None):
    """`arg`: the folder or CSV file, and perhaps lora, bias, head, pretrained, scratch or test."""
    path, how = _shared.split_words(arg, (), _HOW)
    config = common.get_config()
    config.data.name = _shared.own_data(path)
    config.pretrained = "microsoft/beit-base-patch16-224"
    if how == "test":
        config.eval_only = True
        _shared.set_splits(config, "train", "", "train")
        config.data.val = ""
        return config
    _shared.set_splits(config, "train[:80%]", "train[80%:90%]", "train[90%:]")

    config.batch_size = 64
    config.num_epochs = 20.0
    config.augment.crop = "rrc"
    config.augment.scale = (0.35, 1.0)
    config.augment.color_jitter = 0.2
    config.model.drop_path_rate = 0.1
    config.label_smoothing = 0.1
    config.optim.name = "adamw"
    config.optim.learning_rate = 5e-5
    config.optim.end_value = 1e-6
    config.optim.warmup = "10%"
    config.optim.weight_decay = 0.05
    config.optim.layer_decay = 0.85
    config.optim.clip_norm = 1.0
    if how == "pretrained":
        config.pretrained = "microsoft/beit-base-patch16-224-pt22k"
        config.num_epochs = 50.0
        config.optim.learning_rate = 2.5e-4
        config.optim.layer_decay = 0.65
    elif how == "scratch":
        config.pretrained, config.preset = "", "small"
        config.num_epochs = 100.0
        config.optim.learning_rate = 5e-4
        config.optim.layer_decay = 1.0
    elif how:
        _train_a_part(config, how)
    return config


def _train_a_part(config, how):
    config.model.drop_path_rate = 0.0
    config.optim.layer_decay = 1.0
    config.optim.weight_decay = 0.0
    config.optim.learning_rate = {"lora": 5e-4, "bias": 1e-3, "head": 5e-3}[how]
    if how == "lora":
        config.lora.rank = 16
    else:
        config.trainable = how
