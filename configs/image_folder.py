"""Fine-tunes a BEiT checkpoint on pictures of your own, one folder per class.

    python main.py --config=configs/image_folder.py:PATH --workdir=workdirs/mine

PATH holds `class/*.jpg`, or `train/class/*.jpg` and `test/class/*.jpg`, or is a CSV file with the
columns image and label, and perhaps split. Classes are the folders' names. Splits of its own are
kept: train, val and test; of train and one other, that one is the test and a tenth of train is for
validation. Otherwise pictures are split 80 % / 10 % / 10 %, the same way on every machine. A few
hundred pictures are enough. Defaults after BEiT's own fine-tuning from a checkpoint that was
fine-tuned before.
"""

from configs import common


def get_config(arg=None):
    """`arg`: the folder or CSV file."""
    config = common.get_config()
    config.data.name = f"folder:{arg}" if arg else "folder:"
    config.pretrained = "microsoft/beit-base-patch16-224"
    config.data.train, config.data.val, config.data.test = common.folder_splits(arg)

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
    return config
