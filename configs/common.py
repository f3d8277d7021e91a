"""Every legal key of a config, once, with its default. Recipes start from `get_config()`.

Durations ("warmup", "eval_every", ...) are steps (`"500"`), epochs (`"2ep"`), a share of the
run (`"5%"`) or examples (`"50000ex"`); `"0"` is never. `None` in `model` and `image` means: as
the checkpoint has it, or the preset.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The defaults, for fine-tuning a classifier; locked, so that unknown keys are errors."""
    config = ConfigDict()
    config.seed = 0
    config.task_name = "classify"  # a file in beit_jax/tasks
    config.model_name = "auto"  # a file in beit_jax/models; auto: the checkpoint's, or beit

    # The start: a HuggingFace directory or hub id, a .pth of unilm or timm, or a workdir of ours.
    # Its architecture is taken, and single fields of `model` override it. "" starts from `preset`.
    config.pretrained = ""
    config.pretrained_revision = ""  # of a hub id: branch, tag or commit
    config.pretrained_classes = "names"  # numbers: its classes are ours, in order, by other names
    config.pretrained_reset = (  # parameters (regexes) that may differ from the checkpoint
        "(distillation_)?classifier/.*",
        "(pooler_|lm_)?layernorm/.*",
        "pooler/.*",
        "lm_head/.*",
        "embeddings/mask_token",
        r"(decoder|cls_pt_\w+)/.*",
    )
    config.resize_method = "unilm"  # of position tables: unilm, timm, hf; swin is always bicubic
    config.preset = "base"  # architecture without `pretrained`: the model's, such as tiny, base

    config.model = model = ConfigDict()  # names as in transformers' configs
    model.image_size = config_dict.placeholder(object)  # pixels: 224 or (192, 256)
    model.patch_size = config_dict.placeholder(int)
    model.num_channels = config_dict.placeholder(int)
    model.hidden_size = config_dict.placeholder(int)
    model.num_hidden_layers = config_dict.placeholder(int)
    model.num_attention_heads = config_dict.placeholder(int)
    model.intermediate_size = config_dict.placeholder(int)
    model.hidden_act = config_dict.placeholder(str)
    model.hidden_dropout_prob = config_dict.placeholder(float)
    model.attention_probs_dropout_prob = config_dict.placeholder(float)
    model.layer_norm_eps = config_dict.placeholder(float)
    model.use_mask_token = config_dict.placeholder(bool)
    model.use_absolute_position_embeddings = config_dict.placeholder(bool)
    model.use_relative_position_bias = config_dict.placeholder(bool)
    model.use_shared_relative_position_bias = config_dict.placeholder(bool)
    model.layer_scale_init_value = config_dict.placeholder(float)
    model.drop_path_rate = config_dict.placeholder(float)
    model.use_mean_pooling = config_dict.placeholder(bool)
    model.vocab_size = config_dict.placeholder(int)
    model.num_labels = config_dict.placeholder(int)  # the data decides; set it to have it checked
    model.initializer_range = config_dict.placeholder(float)
    model.initializer_bound = config_dict.placeholder(float)
    model.head_init_scale = config_dict.placeholder(float)
    model.rescale_init = config_dict.placeholder(bool)
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
    model.early_layers = config_dict.placeholder(int)  # BEiT v2's patch aggregation: 9 of 12
    model.head_layers = config_dict.placeholder(int)
    model.shared_lm_head = config_dict.placeholder(bool)
    model.code_dim = config_dict.placeholder(int)  # of vq: width of the codes
    model.num_decoder_layers = config_dict.placeholder(int)  # of vq
    model.initial_size = config_dict.placeholder(int)  # of dvae: the decoder's first channels
    model.num_groups = config_dict.placeholder(int)  # of dvae: patch_size is 2 ** (num_groups - 1)
    model.blocks_per_group = config_dict.placeholder(int)  # of dvae
    model.dtype = "auto"  # of the computation: float32, bfloat16; auto: bfloat16 but on CPU
    model.attention = "auto"  # plain, xla, cudnn, pallas
    model.remat = "none"  # full or dots save memory for time
    model.fold = True  # in training, kernels and biases take in the scales and shifts around them
    model.drop_path_mode = "sample"  # window: a fixed part of the batch, which saves work

    config.trainable = "all"  # head: linear probing; bias: BitFit; last-N: the last N layers
    config.lora = lora = ConfigDict()  # low-rank adapters; what they adapt is frozen
    lora.rank = 0  # 0 is off
    lora.alpha = 16.0  # adapters are scaled by alpha / rank
    lora.dropout = 0.0
    lora.targets = ("query", "value")  # also key, output, fc1, fc2
    lora.trainable = ("(distillation_)?classifier/.*",)  # parameters (regexes) trained beside them
    lora.base_dtype = "float32"  # of what is frozen; bfloat16 halves its memory
    # Pre-training.
    config.objective = "tokens"  # a file in beit_jax/objectives: tokens, simmim, mae, data2vec
    config.tokenizer = ""  # a workdir, or a directory with OpenAI's encoder.pkl and decoder.pkl
    config.tokenizer_interpolation = config_dict.placeholder(str)  # lanczos, or what it learnt by
    config.cache_tokens = False  # of training pictures, once for all; needs them unmoved
    config.mask = mask = ConfigDict()
    # None: as the objective's paper, blockwise 75/196 of tokens, 120/196 of data2vec; simmim 0.6;
    # random 0.75 of mae.
    mask.kind = config_dict.placeholder(str)  # blockwise; beit_v1: perhaps fewer; random; simmim
    mask.ratio = config_dict.placeholder(float)  # of the patches
    mask.num_mask_patches = config_dict.placeholder(int)  # overrides ratio
    # None: BEiT's 16 of 14 x 14 patches, in proportion fewer of a smaller grid
    mask.min_mask_patches_per_block = config_dict.placeholder(int)
    mask.max_mask_patches_per_block = config_dict.placeholder(int)
    # side of simmim's squares, in patches; None: 2, or 1 if a side of the grid is odd or below 12
    mask.unit = config_dict.placeholder(int)
    mask.bank = 65536  # masks drawn before the first step; each step takes some of them
    config.decoder = decoder = ConfigDict()  # of mae
    decoder.hidden_size = 512
    decoder.num_hidden_layers = 8
    decoder.num_attention_heads = 16
    decoder.norm_pixels = True  # each patch has mean 0 and standard deviation 1
    config.data2vec = data2vec = ConfigDict()
    data2vec.layers = 6  # last ones of the teacher, averaged
    data2vec.beta = 2.0  # where smooth L1 turns from quadratic to linear
    data2vec.decay = 0.9998  # of the teacher's average, at first
    data2vec.end_decay = 0.9998
    data2vec.decay_steps = 0  # from one to the other

    # Training a tokenizer.
    config.tokenizer_name = "vq"  # a file in beit_jax/tokenizers: vq, dvae
    config.teacher = ""  # of vq, as `pretrained`; "" learns from pixels
    config.codebook = codebook = ConfigDict()  # of vq
    codebook.decay = 0.99  # of its running averages
    codebook.commitment = 1.0  # weight of the encoder's distance from its codes
    codebook.kmeans_iterations = 10  # of its start on the first batch
    codebook.revive = 0.03  # codes used less than this share of the mean start anew; 0 is off
    config.dvae = dvae = ConfigDict()
    dvae.temperature = 1.0  # of the relaxed choice of a token, at first
    dvae.end_temperature = 1 / 16
    dvae.temperature_steps = 150000
    dvae.kl_weight = 6.6  # in the end; of the divergence from uniform tokens
    dvae.kl_steps = 5000

    config.data = data = ConfigDict()
    data.name = "cifar10"  # digits, cifar10, cifar100, tfds:NAME, hf:NAME, folder:PATH
    # of tfds, "": TFDS_DATA_DIR or ~/tensorflow_datasets; the cache of hf; where folder:PATH starts
    data.data_dir = ""
    data.image_key = config_dict.placeholder(str)  # column; None: image, or the only one
    data.label_key = config_dict.placeholder(str)  # None: label, or the only one
    # None: as the data are split, and else by `shares`
    data.train = config_dict.FieldReference("train[:90%]", field_type=str)
    data.val = config_dict.FieldReference("train[90%:]", field_type=str)  # "" for no validation
    data.test = config_dict.FieldReference("test", field_type=str)  # "" for no final test
    data.shares = ()  # the three, of data that are one split
    data.folds = 0  # of stratified cross-validation over train + val; val is then one fold of it
    data.fold = 0  # which, from 0
    data.labelled = True  # False: pictures alone, of a folder at any depth
    data.on_bad_image = "error"  # or skip: leave out, and count, what cannot be decoded
    # splits stay on the device where their pictures have one size, of 1 MiB at most as uint8, and
    # none of the splits needs more than this
    data.resident_bytes = 4 << 30
    data.threads = 0  # that decode; 0: one per core, 16 at most
    data.prefetch = 2  # batches decoded ahead; 0: when they are wanted, by the training thread

    config.augment = augment = ConfigDict()  # of training pictures
    augment.crop = "squash"  # the whole picture; rrc: random resized crop; pad: shift by `pad`
    augment.pad = 4  # pixels of the picture as it is stored
    augment.scale = (0.08, 1.0)  # of rrc: share of the area
    augment.ratio = (3 / 4, 4 / 3)  # of rrc: width / height
    augment.flip = 0.5  # probability
    augment.noise_std = 0.0  # Gaussian noise; pixels are in [0, 1]
    augment.color_jitter = 0.0  # strength of brightness, contrast, saturation
    augment.randaugment = ""  # such as rand-m9-mstd0.5-inc1
    augment.erasing = 0.0  # probability
    augment.mixup = 0.0  # alpha
    augment.cutmix = 0.0  # alpha
    augment.mix_prob = 1.0  # of mixing a batch at all
    augment.mix_switch_prob = 0.5  # of cutmix, where both are on

    config.image = image = ConfigDict()  # how pictures meet the model; None: as it was trained
    image.mean = config_dict.placeholder(tuple)  # per channel; pixels are in [0, 1]
    image.std = config_dict.placeholder(tuple)
    image.interpolation = config_dict.placeholder(str)  # bicubic, bilinear, lanczos
    image.crop = config_dict.placeholder(str)  # squash: whole picture; center: middle square
    image.crop_pct = config_dict.placeholder(float)  # of center: image_size / shorter side

    config.batch_size = 32
    config.eval_batch_size = 128
    config.num_epochs = 15.0
    config.total_steps = config_dict.placeholder(int)  # overrides num_epochs
    config.accumulate_steps = 1  # micro-batches per step: less memory, the mean of their gradients
    config.label_smoothing = 0.0
    config.class_weights = "none"  # balanced: by frequency; the loss stays a mean over pictures
    config.ema_decay = 0.0  # of averaged parameters, for evaluation; warms up; 0 is off

    config.optim = optim = ConfigDict()
    optim.name = "adam"  # adam, adamw, sgd, lion: the update rules of torch
    optim.learning_rate = 2e-5
    optim.schedule = "cosine"  # cosine, step-cosine, linear, constant
    optim.end_value = 0.0  # learning rate at the end
    optim.warmup = "0"  # duration
    optim.warmup_init = 0.0  # learning rate at the start of the warm-up
    optim.b1 = 0.9
    optim.b2 = config_dict.placeholder(float)  # None: 0.999; of lion 0.99
    optim.eps = 1e-8
    optim.momentum = 0.9  # of sgd
    optim.nesterov = False  # of sgd
    optim.weight_decay = 0.0
    optim.weight_decay_end = config_dict.placeholder(float)  # where half a cosine takes it
    optim.no_decay = ()  # more parameters (regexes) without decay than biases, norms, scales
    optim.decay_position_bias = True  # as unilm; timm and Swin do not
    optim.layer_decay = 1.0  # learning rate of each layer against the one above
    optim.clip_norm = 0.0  # of the gradient; 0 is off
    optim.freeze = ()  # parameters (regexes) that do not learn

    config.log_every = "50"
    config.eval_every = "1ep"
    config.save_every = "1ep"  # what kill -9 can cost at most; the last step is always saved
    config.keep_last = 2  # checkpoints
    config.keep_best = 1  # by `best_metric`; 0: nothing is chosen, the last step is the model
    config.keep_every = "0"  # checkpoints at multiples of this are kept for good
    config.best_metric = "accuracy"  # on the validation split
    config.best_mode = "max"  # or min, for a loss
    config.eval_only = False  # evaluate the workdir's best checkpoint, or `pretrained`
    config.tensorboard = True
    config.profile_steps = ""  # "10:15" leaves a trace of these steps in the workdir
    config.mistakes = 36  # pictures on the sheet of most confident mistakes
    config.compile_cache = "~/.cache/beit_jax"  # "" is off
    return config.lock()
