"""Every legal key of a config, once, with its default. Recipes start from `get_config()`.

Durations are steps (`"500"`), epochs (`"2ep"`), a share of the run (`"5%"`) or examples
(`"50000ex"`); `"0"` is never. `None` in `model` and `image` means: as in the checkpoint, or else
the preset. Parameters are named as in a workdir's parameters.txt; regexes must match whole names.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The defaults, for fine-tuning a classifier; locked, so that unknown keys are errors."""
    config = ConfigDict()
    config.seed = 0
    config.task_name = "classify"  # classify, pretrain, train_tokenizer, linear_probe
    config.model_name = "auto"  # beit, vit, swin, swinv2, cnn; auto: the checkpoint's, or beit

    # Initial weights: a HuggingFace directory or hub id, a .pth of unilm or timm, or a workdir.
    # They bring their architecture, whose fields `model` overrides. "": random weights of `preset`.
    config.pretrained = ""
    config.pretrained_revision = ""  # of a hub id: branch, tag or commit
    config.pretrained_classes = "names"  # numbers: match classes by their order, not by name
    config.pretrained_reset = (  # parameters (regexes) that start afresh if they do not fit
        "(distillation_)?classifier/.*",
        "(pooler_|lm_)?layernorm/.*",
        "pooler/.*",
        "lm_head/.*",
        "embeddings/mask_token",
        r"(decoder|cls_pt_\w+)/.*",
    )
    config.resize_method = "unilm"  # of position tables: unilm, timm, hf; none of swin
    config.preset = "base"  # without `pretrained`: such as tiny, small, base, large

    config.model = model = ConfigDict()  # names as in transformers' configs
    model.image_size = config_dict.placeholder(object)  # pixels: 224, or (height, width)
    model.patch_size = config_dict.placeholder(int)
    model.num_channels = config_dict.placeholder(int)
    model.hidden_size = config_dict.placeholder(int)
    model.num_hidden_layers = config_dict.placeholder(int)
    model.num_attention_heads = config_dict.placeholder(int)
    model.intermediate_size = config_dict.placeholder(int)
    # gelu (erf), relu, silu, gelu_new or gelu_pytorch_tanh
    model.hidden_act = config_dict.placeholder(str)
    model.hidden_dropout_prob = config_dict.placeholder(float)
    model.attention_probs_dropout_prob = config_dict.placeholder(float)
    model.layer_norm_eps = config_dict.placeholder(float)
    model.use_mask_token = config_dict.placeholder(bool)
    model.use_absolute_position_embeddings = config_dict.placeholder(bool)
    model.use_relative_position_bias = config_dict.placeholder(bool)
    model.use_shared_relative_position_bias = config_dict.placeholder(bool)
    model.layer_scale_init_value = config_dict.placeholder(float)  # 0: without layer scale
    model.drop_path_rate = config_dict.placeholder(float)  # of the last layer, linear from 0
    model.use_mean_pooling = config_dict.placeholder(bool)  # or the class token
    model.vocab_size = config_dict.placeholder(int)  # of visual tokens
    model.num_labels = config_dict.placeholder(int)  # the data decides; set it to have it checked
    model.initializer_range = config_dict.placeholder(float)  # standard deviation
    model.initializer_bound = config_dict.placeholder(float)  # truncation, in deviations
    model.head_init_scale = config_dict.placeholder(float)  # multiplies the classifier's init
    model.rescale_init = config_dict.placeholder(bool)  # outputs of layer l by 1 / sqrt(2 l)
    model.use_post_norm = config_dict.placeholder(bool)  # of vit: norms after the sums
    model.qkv_bias = config_dict.placeholder(bool)  # of vit, swin
    model.use_distillation_token = config_dict.placeholder(bool)  # of vit: DeiT
    model.use_distillation_classifier = config_dict.placeholder(bool)  # of vit: DeiT's second head
    model.use_sincos_position_embeddings = config_dict.placeholder(bool)  # of vit: MAE's, fixed
    model.use_class_and_mean = config_dict.placeholder(bool)  # of vit: the head reads both
    model.num_register_tokens = config_dict.placeholder(int)  # of vit
    model.conv_channels = config_dict.placeholder(tuple)  # of cnn
    model.kernel_size = config_dict.placeholder(int)  # of cnn
    model.hidden_sizes = config_dict.placeholder(tuple)  # of cnn: dense layers
    model.embed_dim = config_dict.placeholder(int)  # of swin: width of the first stage
    model.depths = config_dict.placeholder(tuple)  # of swin: layers of each stage
    model.num_heads = config_dict.placeholder(tuple)  # of swin: heads of each stage
    model.window_size = config_dict.placeholder(int)  # of swin
    model.mlp_ratio = config_dict.placeholder(float)  # of swin: intermediate size / width
    model.use_absolute_embeddings = config_dict.placeholder(bool)  # of swin
    model.pretrained_window_sizes = config_dict.placeholder(tuple)  # of swinv2, for each stage
    model.early_layers = config_dict.placeholder(int)  # of BEiT v2: 9 of 12; 0: off
    model.head_layers = config_dict.placeholder(int)  # of BEiT v2: of its second branch
    model.shared_lm_head = config_dict.placeholder(bool)  # of BEiT v2: by both branches
    model.code_dim = config_dict.placeholder(int)  # of vq: width of the codes
    model.num_decoder_layers = config_dict.placeholder(int)  # of vq
    model.initial_size = config_dict.placeholder(int)  # of dvae: the decoder's first channels
    model.num_groups = config_dict.placeholder(int)  # of dvae: patch_size is 2 ** (num_groups - 1)
    model.blocks_per_group = config_dict.placeholder(int)  # of dvae
    model.dtype = "auto"  # of activations: float32, bfloat16; auto: float32 on CPU, else bfloat16
    model.attention = "auto"  # plain, xla, cudnn, pallas; auto: the fastest that works here
    model.remat = "none"  # dots recomputes all but matmuls and attention, full all of a layer
    model.fold = True  # norms' and layer scales are multiplied into kernels, which saves memory
    model.drop_path_mode = "sample"  # each image by itself; window: a block of the batch, faster

    config.trainable = "all"  # head; bias: BitFit and the head; last-N: N layers and the head
    config.lora = lora = ConfigDict()  # adapters; all is frozen but these, `trainable` and new ones
    lora.rank = 0  # 0 is off
    lora.alpha = 16.0  # adapters are multiplied by alpha / rank
    lora.dropout = 0.0
    lora.targets = ("query", "value")  # also key, output, fc1, fc2
    lora.trainable = ("(distillation_)?classifier/.*",)  # (regexes) trained as well
    lora.base_dtype = "float32"  # of frozen parameters; bfloat16 halves their memory

    # Pre-training.
    config.objective = "tokens"  # a file in beit_jax/objectives: tokens, simmim, mae, data2vec
    config.tokenizer = ""  # a workdir, or a directory with OpenAI's encoder.pkl and decoder.pkl
    config.tokenizer_interpolation = config_dict.placeholder(str)  # its input's; None: as trained
    config.cache_tokens = False  # computes tokens once; needs training without crops and flips
    config.mask = mask = ConfigDict()
    # None: as in the objective's paper; tokens: blockwise, 75/196; data2vec: blockwise, 120/196;
    # simmim: simmim, 0.6; mae: random, 0.75
    mask.kind = config_dict.placeholder(str)  # blockwise; beit_v1: at most so many; random; simmim
    mask.ratio = config_dict.placeholder(float)  # of the patches
    mask.num_mask_patches = config_dict.placeholder(int)  # overrides ratio
    # None: 16 for a grid of 14 x 14 patches as in BEiT, in proportion fewer for a smaller one
    mask.min_mask_patches_per_block = config_dict.placeholder(int)
    mask.max_mask_patches_per_block = config_dict.placeholder(int)
    # side of simmim's squares, in patches; None: 2, or 1 if a side of the grid is odd or below 12
    mask.unit = config_dict.placeholder(int)
    mask.bank = 65536  # masks made before the first step, of which each step draws some
    config.decoder = decoder = ConfigDict()  # of mae
    decoder.hidden_size = 512
    decoder.num_hidden_layers = 8
    decoder.num_attention_heads = 16
    decoder.norm_pixels = True  # each patch has mean 0 and standard deviation 1
    config.data2vec = data2vec = ConfigDict()
    data2vec.layers = 6  # the teacher's last ones, averaged, are the target
    data2vec.beta = 2.0  # where the smooth L1 loss turns from quadratic to linear
    data2vec.decay = 0.9998  # of the teacher's EMA, at first
    data2vec.end_decay = 0.9998
    data2vec.decay_steps = 0  # steps from one to the other

    # Training a tokenizer.
    config.tokenizer_name = "vq"  # a file in beit_jax/tokenizers: vq, dvae
    config.teacher = ""  # of vq: as `pretrained`, whose features are the target; "": pixels are
    config.codebook = codebook = ConfigDict()  # of vq
    codebook.decay = 0.99  # of the codes' EMA
    codebook.commitment = 1.0  # weight of the commitment loss
    codebook.kmeans_iterations = 10  # that initialise the codes on the first batch
    codebook.revive = 0.03  # codes used less than this share of the mean are replaced; 0 is off
    config.dvae = dvae = ConfigDict()
    dvae.temperature = 1.0  # of the Gumbel-softmax, at first
    dvae.end_temperature = 1 / 16
    dvae.temperature_steps = 150000  # from one to the other
    dvae.kl_weight = 6.6  # of the divergence from uniform tokens, after `kl_steps`
    dvae.kl_steps = 5000  # steps from 0

    config.data = data = ConfigDict()
    data.name = "cifar10"  # digits, cifar10, cifar100, tfds:NAME, hf:NAME, folder:PATH
    # of tfds ("": TFDS_DATA_DIR or ~/tensorflow_datasets), hf's cache, or what PATH is relative to
    data.data_dir = ""
    data.image_key = config_dict.placeholder(str)  # column; None: image, or the only one
    data.label_key = config_dict.placeholder(str)  # None: label, or the only one
    # None: the dataset's own splits, or without any by `shares`
    data.train = config_dict.FieldReference("train[:90%]", field_type=str)
    data.val = config_dict.FieldReference("train[90%:]", field_type=str)  # "" for no validation
    data.test = config_dict.FieldReference("test", field_type=str)  # "" for no final test
    data.shares = ()  # of one split: ("train[:80%]", "train[80%:90%]", "train[90%:]")
    data.folds = 0  # of stratified cross-validation over train and val; 0 is off
    data.fold = 0  # the one that validates, from 0
    data.labelled = True  # False: images without labels, in folders of any depth
    data.on_bad_image = "error"  # or skip: leaves out, and counts, what cannot be decoded
    # Splits stay on the device if their images have one size, of at most 1 MiB as uint8, and no
    # split is larger than this.
    data.resident_bytes = 4 << 30
    data.threads = 0  # that decode images; 0: one per core, at most 16
    data.prefetch = 2  # batches decoded ahead; 0: none, in the training thread

    config.augment = augment = ConfigDict()  # of training images
    augment.crop = "squash"  # the whole image; rrc: random resized crop; pad: random shift
    augment.pad = 4  # of crop "pad": shifts by up to so many pixels of the stored image
    augment.scale = (0.08, 1.0)  # of rrc: share of the area
    augment.ratio = (3 / 4, 4 / 3)  # of rrc: width / height
    augment.flip = 0.5  # probability
    augment.noise_std = 0.0  # Gaussian noise; pixels are in [0, 1]
    augment.color_jitter = 0.0  # of brightness, contrast, saturation; unused with randaugment
    augment.randaugment = ""  # such as rand-m9-mstd0.5-inc1; trivial: TrivialAugment
    augment.erasing = 0.0  # probability
    augment.mixup = 0.0  # alpha
    augment.cutmix = 0.0  # alpha
    augment.mix_prob = 1.0  # probability that a batch is mixed at all
    augment.mix_switch_prob = 0.5  # probability of cutmix, where both are on

    config.image = image = ConfigDict()  # preprocessing; None: as the checkpoint was trained
    image.mean = config_dict.placeholder(tuple)  # per channel; pixels are in [0, 1]
    image.std = config_dict.placeholder(tuple)
    image.interpolation = config_dict.placeholder(str)  # bicubic, bilinear, lanczos
    image.crop = config_dict.placeholder(str)  # squash: the whole image; center: the middle square
    image.crop_pct = config_dict.placeholder(float)  # of center: image_size / shorter side

    config.batch_size = 32  # images per optimizer step, over all devices and micro-batches
    config.eval_batch_size = 128
    config.num_epochs = 15.0
    config.total_steps = config_dict.placeholder(int)  # overrides num_epochs
    config.accumulate_steps = 1  # micro-batches per step, whose gradients are averaged: less memory
    config.label_smoothing = 0.0
    config.class_weights = "none"  # balanced: inversely to frequency
    # of an EMA of the parameters, which is evaluated and exported; 0 is off. At step t it is
    # min(ema_decay, (1 + t) / (10 + t)).
    config.ema_decay = 0.0

    config.optim = optim = ConfigDict()
    optim.name = "adam"  # adam, adamw, sgd, lion; the first three as in torch
    optim.learning_rate = 2e-5
    optim.schedule = "cosine"  # cosine; step-cosine: it changes once an epoch; linear; constant
    optim.end_value = 0.0  # learning rate at the end
    optim.warmup = "0"  # duration
    optim.warmup_init = 0.0  # learning rate at the start of the warm-up
    optim.b1 = 0.9
    optim.b2 = config_dict.placeholder(float)  # None: 0.999; of lion 0.99
    optim.eps = 1e-8
    optim.momentum = 0.9  # of sgd
    optim.nesterov = False  # of sgd
    optim.weight_decay = 0.0
    optim.weight_decay_end = config_dict.placeholder(float)  # by a cosine; None: constant
    optim.no_decay = ()  # parameters (regexes) without it, besides biases, norms and scales
    optim.decay_position_bias = True  # as unilm; timm and Swin do not
    optim.layer_decay = 1.0  # each layer's learning rate is this times that of the next; 1 is off
    optim.clip_norm = 0.0  # of the gradient's global norm; 0 is off
    optim.freeze = ()  # parameters (regexes) that are not trained

    config.log_every = "50"  # duration
    config.eval_every = "1ep"  # duration, between validations
    config.save_every = "1ep"  # duration: what a crash can cost; the last step is always saved
    config.keep_last = 2  # checkpoints
    config.keep_best = 1  # checkpoints, by `best_metric`; 0: the last step is the model
    config.keep_every = "0"  # duration: checkpoints at its multiples are kept for good
    config.best_metric = "accuracy"  # on the validation split
    config.best_mode = "max"  # or min, for a loss
    config.eval_only = False  # evaluates the workdir's best checkpoint, or `pretrained`
    config.tensorboard = True
    config.profile_steps = ""  # "10:15" leaves a trace of these steps in the workdir
    config.mistakes = 36  # images in mistakes.png, the most confident first
    config.compile_cache = "~/.cache/beit_jax"  # "" is off
    return config.lock()
