"""Fine-tunes BEiT on ImageNet-1k by the official recipes (microsoft/unilm, beit and beit2).

    python main.py --config=configs/imagenet.py:base_pt22k --workdir=workdirs/imagenet

The arguments are the keys of the table below, and start from the checkpoint of that name; those of
v2_*_pt1k are unilm's .pth files, expected in the current directory. Batch sizes are effective ones:
--config.accumulate_steps=N splits each into N micro-batches. From 384 pixels on the whole image is
evaluated, not its middle: --config.model.image_size=384 --config.image.crop=squash
--config.image.crop_pct=1.0.

The dataset is TFDS's imagenet2012 (--config.data.data_dir), prepared as array_record.
None of these recipes was run here: they are the published ones.
"""

from configs import _shared, common

#             batch  lr    min   warm ep  decay drop  wd    mix
_RECIPES = {
    "base_pt22k": (1024, 4e-3, 1e-6, 20, 100, 0.65, 0.1, 0.05, True),
    "large_pt22k": (1024, 1e-3, 1e-6, 5, 50, 0.75, 0.2, 0.05, True),
    "base_ft22k": (512, 2e-5, 1e-6, 5, 30, 0.85, 0.1, 1e-8, False),
    "large_ft22k": (512, 2e-5, 1e-6, 5, 30, 0.9, 0.4, 1e-8, False),
    "v2_base_pt1k": (1024, 5e-4, 1e-6, 20, 100, 0.6, 0.2, 0.05, True),
    "v2_base_ft21k": (1024, 5e-5, 1e-6, 20, 30, 0.75, 0.1, 0.05, False),
    "v2_large_pt1k": (1024, 2e-4, 1e-6, 5, 50, 0.8, 0.2, 0.05, True),
    "v2_large_ft21k": (1024, 7e-5, 1e-6, 5, 20, 0.8, 0.25, 0.05, False),
}
_CHECKPOINTS = {  # those of v2_*_pt1k are files of microsoft/unilm
    "v2_base_pt1k": "beitv2_base_patch16_224_pt1k.pth",
    "v2_large_pt1k": "beitv2_large_patch16_224_pt1k.pth",
    "v2_base_ft21k": "timm/beitv2_base_patch16_224.in1k_ft_in22k",
    "v2_large_ft21k": "timm/beitv2_large_patch16_224.in1k_ft_in22k",
    "base_pt22k": "microsoft/beit-base-patch16-224-pt22k",
    "large_pt22k": "microsoft/beit-large-patch16-224-pt22k",
    "base_ft22k": "microsoft/beit-base-patch16-224-pt22k-ft22k",
    "large_ft22k": "microsoft/beit-large-patch16-224-pt22k-ft22k",
}
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config(arg=None):
    """`arg`: a recipe, "base_ft22k" by default."""
    arg = _shared.parse_arg(arg, *_RECIPES) or "base_ft22k"
    batch, rate, end, warmup, epochs, layer_decay, drop_path, decay, mix = _RECIPES[arg]
    config = common.get_config()
    config.data.name = "tfds:imagenet2012"
    config.data.train, config.data.val, config.data.test = "train", "validation", ""
    config.pretrained = _CHECKPOINTS[arg]
    if arg.startswith("v2"):
        config.image.mean, config.image.std = _IMAGENET_MEAN, _IMAGENET_STD
    config.image.crop, config.image.crop_pct = "center", 0.875
    config.image.interpolation = "bicubic"  # whatever preprocessor_config.json says

    config.batch_size = batch
    config.num_epochs = float(epochs)
    config.optim.name = "adamw"
    config.optim.learning_rate = rate
    config.optim.end_value = end
    config.optim.warmup = f"{warmup}ep"
    config.optim.weight_decay = decay
    config.optim.layer_decay = layer_decay
    config.model.drop_path_rate = drop_path
    config.label_smoothing = 0.1
    config.augment.crop = "rrc"
    config.augment.randaugment = "rand-m9-mstd0.5-inc1"
    config.augment.erasing = 0.25
    if mix:
        config.augment.mixup, config.augment.cutmix = 0.8, 1.0
    return config
