"""Visual tokenizers: the codebook's arithmetic, what learns from what, and whole runs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, traverse_util
from scipy import integrate

from beit_jax import checkpoint, report, tokenizers
from beit_jax import train as loop
from beit_jax.data import pipeline
from beit_jax.models import layers
from beit_jax.tokenizers import codebook, dvae, trainer, vq
from configs import common, quickstart, train_tokenizer

TINY = dict(
    image_size=8,
    patch_size=4,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    initializer_range=0.3,
    vocab_size=6,
    code_dim=3,
)


def unit_vectors(count, width=3, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, width))
    return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


def test_nearest_is_the_largest_cosine():
    z, embedding = unit_vectors(50), unit_vectors(7, seed=1)
    distance = np.square(z[:, None] - embedding).sum(-1)
    token = codebook.nearest(embedding, z)
    assert token.dtype == jnp.int32
    np.testing.assert_array_equal(token, distance.argmin(-1))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_token_is_the_first_of_the_largest_logits(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    logits = np.random.default_rng(0).integers(0, 9, (3, 40, 50)).astype(np.float32)
    logits[0, 0] = -np.inf
    logits[0, 1, [2, 5]] = np.nan

    def argmax(x):  # a function of this case alone, which no other has compiled
        return layers.argmax(x)

    given = jnp.asarray(logits, jnp.bfloat16)
    token = jax.jit(argmax)(given)
    assert token.dtype == jnp.int32
    np.testing.assert_array_equal(token, logits.argmax(-1))
    assert ("argmax" in str(jax.make_jaxpr(lambda x: argmax(x))(given))) == (backend == "gpu")


def test_kmeans_finds_clusters():
    centres = unit_vectors(5, width=8)
    z = np.repeat(centres, 20, axis=0) + np.random.default_rng(1).normal(0, 0.01, (100, 8))
    found = codebook.kmeans(jax.random.key(3), layers.l2_normalize(z), 5, 10)
    cosine = np.asarray(found["embedding"]) @ centres.T
    assert found["size"].sum() == 100
    for centre in range(5):  # a start may have put two into one cluster, none may be nowhere
        assert (cosine[:, centre].max() > 0.99) or (np.asarray(found["size"]) > 20).any()
    assert (cosine.max(1) > 0.9).all()


def test_it_starts_once():
    z = unit_vectors(30)
    empty = codebook.init(4, 3)
    started = codebook.start(empty, z, jax.random.key(0), 3)
    assert started["size"].sum() == 30
    again = codebook.start(started, unit_vectors(30, seed=9), jax.random.key(1), 3)
    jax.tree.map(np.testing.assert_array_equal, started, again)
    few = codebook.start(codebook.init(50, 3), z, jax.random.key(0), 2)  # more codes than vectors
    np.testing.assert_allclose(np.linalg.norm(few["embedding"], axis=-1), 1, atol=1e-5)


def test_running_averages_are_those_of_the_paper():
    """The equations of BEiT v2's NormEMAVectorQuantizer, in numpy."""
    z, embedding = unit_vectors(40), unit_vectors(6, seed=1)
    size, decay = np.float32([5, 4, 3, 2, 1, 0]), 0.9
    token = np.asarray(codebook.nearest(embedding[:5], z))  # nothing falls to the last
    book = {"embedding": jnp.asarray(embedding), "size": jnp.asarray(size)}
    new = codebook.update(book, z, token, jax.random.key(0), decay=decay, revive=0.0)
    for code in range(6):
        mine = z[token == code]
        np.testing.assert_allclose(
            new["size"][code], decay * size[code] + (1 - decay) * len(mine), rtol=1e-6
        )
        mean = embedding[code]
        if len(mine):
            mean = mine.mean(0) / np.linalg.norm(mine.mean(0))
        expected = decay * embedding[code] + (1 - decay) * mean
        np.testing.assert_allclose(
            new["embedding"][code], expected / np.linalg.norm(expected), atol=1e-6
        )
    np.testing.assert_allclose(new["embedding"][5], embedding[5], atol=1e-6)


def test_dead_codes_start_anew():
    z = unit_vectors(60)
    book = {"embedding": jnp.asarray(unit_vectors(6, seed=1)), "size": jnp.full(6, 10.0)}
    book["size"] = book["size"].at[2].set(0.1)
    token = np.where(np.arange(60) % 2, 1, 4)
    new = codebook.update(book, z, token, jax.random.key(0), decay=0.9, revive=0.1)
    assert (np.abs(z - np.asarray(new["embedding"][2])).max(-1) < 1e-6).any()
    assert new["size"][2] == 10
    np.testing.assert_allclose(new["embedding"][0], book["embedding"][0], atol=1e-6)
    assert new["size"][0] == 9


def vq_trainer(teacher_dim=0):
    model = vq.Model(**TINY, teacher_dim=teacher_dim)
    train = vq.make(common.get_config(), model, teacher_dim)
    params, state = train.init(jax.random.key(0))
    return model, train, params, state


@pytest.fixture
def image():
    return jax.random.uniform(jax.random.key(5), (4, 8, 8, 3))


def test_gradient_passes_straight_through(image):
    model, train, params, state = vq_trainer()
    weight = jnp.ones(4)
    _, state = train.loss(params, state, image, None, weight, jax.random.key(0))

    def error(params):
        return train.loss(params, state, image, None, weight, None)[0]["pixel_error"]

    def without_codes(params):
        """The same error with the codes as constants added to the encoder's output."""
        z = model.apply({"params": params}, image, method="encode")
        token = codebook.nearest(state["codebook"]["embedding"], z)
        code = state["codebook"]["embedding"][token]
        pixels, _ = model.apply({"params": params}, z + (code - z_before), method="predict")
        return jnp.square(2 * (pixels - vq.patchify(image, 4))).mean((1, 2)).sum()

    z_before = model.apply({"params": params}, image, method="encode")
    found, expected = (jax.jit(jax.grad(f))(params) for f in (error, without_codes))
    assert np.abs(found["patch_embeddings"]["kernel"]).max() > 1e-6
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found, expected)


def test_pixels_beside_a_teacher_change_no_token(image):
    _, train, params, state = vq_trainer(teacher_dim=5)
    features = jax.random.normal(jax.random.key(1), (4, 4, 5))
    weight = jnp.ones(4)
    _, state = train.loss(params, state, image, features, weight, jax.random.key(0))

    def part(name):
        def of(params):
            return train.loss(params, state, image, features, weight, None)[0][name]

        return traverse_util.flatten_dict(jax.jit(jax.grad(of))(params), sep="/")

    pixels, teacher = part("pixel_error"), part("teacher_distance")
    for name, gradient in pixels.items():
        learns = bool(np.abs(gradient).max() > 0)
        assert learns == name.startswith("pixel_head"), name
    assert np.abs(teacher["patch_embeddings/kernel"]).max() > 0
    assert np.abs(teacher["pixel_head/fc2/kernel"]).max() == 0


def test_what_draws_beside_a_teacher_does_not_rank_tokenizers(image):
    _, train, params, state = vq_trainer(teacher_dim=5)
    features, weight = jax.random.normal(jax.random.key(1), (4, 4, 5)), jnp.ones(4)
    sums, _ = train.loss(params, state, image, features, weight, None)
    expected = float(sums["commitment"] + sums["teacher_distance"])
    assert float(sums["loss"]) == pytest.approx(expected, rel=1e-5) and sums["pixel_error"] > 0.01
    sums, _ = train.loss(params, state, image, features, weight, jax.random.key(0))
    expected = float(sums["commitment"] + sums["teacher_distance"] + sums["pixel_error"])
    assert float(sums["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_decides_tokens_is_not_rounded(dtype):
    """To bfloat16 rounded, float32 numbers stay as they are: it would be seen."""
    changes = {"image_size": 16, "vocab_size": 64, "num_groups": 2, "blocks_per_group": 1}
    network = dvae.Model(**changes, hidden_size=8, initial_size=8, dtype=dtype)
    image = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3))
    variables = network.init(jax.random.key(0), image)
    logits = network.apply(variables, image, method="encode")
    assert logits.dtype == jnp.float32
    assert (logits.astype(jnp.bfloat16).astype(jnp.float32) != logits).mean() > 0.9
    model = vq.Model(**TINY | {"dtype": dtype})
    image = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
    seen = {}

    def keep(call, args, kwargs, context):
        seen[context.module.name] = out = call(*args, **kwargs)
        return out

    variables = model.init(jax.random.key(0), image)
    with linen.intercept_methods(keep):
        model.apply(variables, image, method="encode")
    code = seen["code_head"]
    assert code.dtype == jnp.float32
    assert (code.astype(jnp.bfloat16).astype(jnp.float32) != code).mean() > 0.9


def test_a_damaged_item_makes_no_tokenizer_of_two_steps(tmp_path):
    content = {
        step: {
            "params": {"kernel": np.full(3, step, np.float32)},
            "model_state": {"codebook": {"embedding": np.full(2, step, np.float32)}},
        }
        for step in (1, 2)
    }
    with checkpoint.Checkpointer(tmp_path) as saver:
        for step, state in content.items():
            saver.save(step, state)
    params, state = checkpoint.load_model(tmp_path)
    assert params["kernel"][0] == state["codebook"]["embedding"][0] == 2
    for path in (tmp_path / "checkpoints" / "2" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    params, state = checkpoint.load_model(tmp_path)
    assert params["kernel"][0] == state["codebook"]["embedding"][0] == 1


def test_padding_counts_for_nothing(image):
    _, train, params, state = vq_trainer()
    _, state = train.loss(params, state, image, None, jnp.ones(4), jax.random.key(0))
    weight = jnp.float32([1, 1, 1, 0])
    padded = image.at[3].set(0.0)
    a, _ = train.loss(params, state, padded, None, weight, None)
    b, _ = train.loss(params, state, padded[:3], None, jnp.ones(3), None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), a, b)
    assert a["counts"].sum() == 12


def test_tokens_and_their_image(image):
    model, train, params, state = vq_trainer()
    _, state = train.loss(params, state, image, None, jnp.ones(4), jax.random.key(0))
    variables = train.variables(params, state)
    token = model.apply(variables, image, method="tokenize")
    assert token.shape == (4, 4) and token.dtype == jnp.int32
    decoded = model.apply(variables, token, method="decode")
    assert decoded.shape == image.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1


@pytest.mark.parametrize("kind", ["vq", "dvae"])
def test_tokens_of_some_patches(kind, image):
    if kind == "vq":
        model, train, params, state = vq_trainer()
        _, state = train.loss(params, state, image, None, jnp.ones(4), jax.random.key(0))
        variables = train.variables(params, state)
    else:
        model = dvae.Model(
            image_size=image.shape[1], vocab_size=12, hidden_size=8, initial_size=8, num_groups=2
        )
        variables = model.init(jax.random.key(0), image)
    every = model.apply(variables, image, method="tokenize")
    index = jnp.asarray([[3, 0], [1, 2], [2, 1], [0, 3]])
    some = model.apply(variables, image, index, method="tokenize")
    np.testing.assert_array_equal(some, jnp.take_along_axis(every, index, 1))
    assert len(np.unique(some)) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["vq", "dvae"])
def test_nothing_changes_for_inference(kind, dtype, image):
    """But that kernels are no longer float32, where the computation is not."""
    changes = {"image_size": image.shape[1], "vocab_size": 12, "hidden_size": 16, "num_groups": 2}
    if kind == "vq":
        module, changes = vq, TINY
    else:
        module, changes = dvae, changes | {"initial_size": 8}
    model = module.Model(**changes | {"dtype": dtype})
    variables = model.init(jax.random.key(0), image)
    noise = functools.partial(jax.random.normal, jax.random.key(2))
    variables = jax.tree.map(lambda x: x + 0.1 * noise(x.shape), variables)  # biases too
    if kind == "vq":
        book = jax.random.normal(jax.random.key(1), (TINY["vocab_size"], TINY["code_dim"]))
        variables["codebook"] = {"embedding": layers.l2_normalize(book)}
    found = module.for_inference(model, variables)
    converted = sum(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found[1]))
    assert bool(converted) == (dtype == "bfloat16")

    def results(model, variables):
        token = model.apply(variables, image, method="tokenize")
        return token, model.apply(variables, token, method="decode")

    for a, b in zip(results(*found), results(model, variables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_summary_of_use():
    sums = {"loss": 6.0, "error": 3.0, "weight": 3.0, "counts": jnp.float32([2, 2, 0, 0])}
    found = trainer.summarize(sums)
    assert found["loss"] == 2 and found["error"] == 1
    assert found["codebook_usage"] == 0.5
    np.testing.assert_allclose(found["perplexity"], 2, rtol=1e-6)


def test_logit_laplace_is_a_density():
    location, log_scale = 0.4, -1.0

    def density(x):
        return math.exp(-float(dvae.logit_laplace(jnp.float32(x), location, log_scale)))

    middle = 1 / (1 + math.exp(-location))  # where it has a kink
    total, _ = integrate.quad(density, 1e-6, 1 - 1e-6, points=[middle], epsabs=1e-3, limit=60)
    assert abs(total - 1) < 5e-3


def test_squeezed_pixels_come_back():
    x = jnp.linspace(0, 1, 11)
    squeezed = dvae.squeeze(x)
    np.testing.assert_allclose([squeezed.min(), squeezed.max()], [0.1, 0.9], atol=1e-6)
    np.testing.assert_allclose(dvae.unsqueeze(squeezed), x, atol=1e-6)
    assert dvae.unsqueeze(jnp.float32(0.95)) == 1


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1.0), (50, 0.53125), (100, 0.0625), (500, 0.0625)]
)
def test_temperature_falls(step, expected):
    np.testing.assert_allclose(dvae.anneal(step, 1.0, 1 / 16, 100), expected, rtol=1e-6)


def test_divergence_from_uniform_tokens(image):
    config = common.get_config()
    config.dvae.kl_steps = 0
    model = dvae.Model(image_size=8, num_groups=2, blocks_per_group=1, hidden_size=4, vocab_size=6)
    train = dvae.make(config, model, 0)
    params, state = train.init(jax.random.key(0))
    loss = jax.jit(train.loss)
    sums, after = loss(params, state, image, None, jnp.ones(4), jax.random.key(1))
    assert after["step"] == 1
    logits = np.asarray(model.apply({"params": params}, image, method="encode"), np.float64)
    share = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    expected = (share * np.log(share * 6)).sum() / (8 * 8 * 3)
    np.testing.assert_allclose(sums["divergence"], expected, rtol=1e-4)
    total = sums["reconstruction"] + 6.6 * sums["divergence"]
    np.testing.assert_allclose(sums["loss"], total, rtol=1e-5)
    flat = jax.tree.map(jnp.zeros_like, params)
    uniform, _ = loss(flat, state, image, None, jnp.ones(4), None)
    np.testing.assert_allclose(uniform["divergence"], 0, atol=1e-6)


SHORT = {
    "data.train": "train[:400]",
    "data.val": "train[400:500]",
    "data.test": "",
    "model.image_size": 8,
    "total_steps": 60,
    "eval_every": "30",
    "save_every": "30",
    "log_every": "1",
    "tensorboard": False,
    "compile_cache": "",
}
SMALL_VQ = {
    "model.patch_size": 2,
    "model.hidden_size": 16,
    "model.intermediate_size": 32,
    "model.vocab_size": 12,
}
SMALL_DVAE = {
    "tokenizer_name": "dvae",
    "model.num_groups": 2,
    "model.vocab_size": 12,
    "dvae.temperature_steps": 40,
    "dvae.kl_steps": 10,
    "dvae.kl_weight": 1.0,
    "optim.learning_rate": 1e-2,
}


def train(workdir, changes):
    config = train_tokenizer.get_config("digits")
    config.update_from_flattened_dict(SHORT | changes)
    return loop.run(config, str(workdir))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The workdir of a tiny classifier with a grid of 4 x 4."""
    config = quickstart.get_config()
    changes = SHORT | SMALL_VQ | {"total_steps": 40, "model.num_hidden_layers": 2}
    changes.pop("model.vocab_size")
    config.update_from_flattened_dict(changes)
    workdir = tmp_path_factory.mktemp("teacher")
    loop.run(config, str(workdir))
    return workdir


@pytest.mark.parametrize("kind", ["pixels", "teacher", "dvae"])
def test_it_learns_to_tell_digits(kind, tmp_path, teacher):
    changes = {"pixels": SMALL_VQ, "teacher": SMALL_VQ, "dvae": SMALL_DVAE}[kind]
    if kind == "teacher":
        changes = changes | {"teacher": str(teacher)}
    results = train(tmp_path, changes)
    losses = [x["train/loss"] for x in report.read_metrics(tmp_path) if "train/loss" in x]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05, losses
    val = results["val"]
    assert 0.3 < val["codebook_usage"] <= 1
    assert 2 < val["perplexity"] <= 12
    if kind == "teacher":
        assert val["teacher_distance"] < 0.75
    assert (tmp_path / "reconstructions.png").exists()

    tokenizer = tokenizers.load(str(tmp_path), grid=(4, 4))
    assert tokenizer.model.config.grid == (4, 4)
    assert tokenizers.vocab_size(str(tmp_path)) == 12
    image = np.float32(pipeline.load_all(digits())["image"][:32]) / 255
    token = tokenizer.model.apply(tokenizer.variables, image, method="tokenize")
    assert token.shape == (32, 16) and len(np.unique(token)) > 3
    if kind != "teacher":
        decoded = tokenizer.model.apply(tokenizer.variables, token, method="decode")
        error = np.square(decoded - image).mean()
        assert error < 0.75 * image.var(), (error, image.var())


def digits():
    from beit_jax.data import sources

    return sources.get_source("digits", "train[:32]", data_dir=None, on_bad_image="error")


def test_a_convolutional_tokenizer_takes_the_grid_that_is_wanted(tmp_path):
    train(tmp_path, SMALL_DVAE | {"total_steps": 1})
    tokenizer = tokenizers.load(str(tmp_path), grid=(3, 5))
    assert tokenizer.model.config.image_size == (6, 10)
    token = tokenizer.model.apply(tokenizer.variables, np.zeros((1, 6, 10, 3)), method="tokenize")
    assert token.shape == (1, 15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_name": "vqvae"}, "Unknown name 'vqvae' in tokenizers; available: dvae, vq"),
        ({"preset": "huge"}, "Unknown config.preset 'huge'; available: .*digits"),
        ({"accumulate_steps": 2}, "set config.accumulate_steps=1, got 2"),
        ({"ema_decay": 0.99}, "would not fit an average of it: set config.ema_decay=0, got 0.99"),
        ({"augment.erasing": 0.5}, "config.augment.erasing is 0.5, and the task 'train_tokenizer'"),
        ({"codebook.decay": 1.0}, "needs 0 < decay < 1"),
        ({"augment.crop": "cut"}, "Unknown config.augment.crop 'cut'"),
        ({"model.code_dim": 0}, "code_dim must be above 0, got 0"),
        (SMALL_DVAE | {"dvae.end_temperature": 0.0}, "temperatures above 0"),
        (SMALL_DVAE | {"model.image_size": 7}, "image_size .7, 7. must be a multiple of 2"),
        (SMALL_DVAE | {"teacher": "TEACHER"}, "A dVAE learns from pixels alone"),
        ({"pretrained": "TEACHER"}, "leave config.pretrained empty"),
        ({"teacher": "TEACHER"}, "gives features of 4 x 4 patches, the tokenizer has 2 x 2"),
        ({"teacher": "nowhere/at-all"}, "nowhere/at-all"),
    ],
)
def test_bad_input_is_told(changes, message, tmp_path, teacher):
    changes = {k: str(teacher) if v == "TEACHER" else v for k, v in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(tmp_path, changes)


def test_what_is_no_tokenizer_is_told(teacher, tmp_path):
    with pytest.raises(ValueError, match="of the task 'classify'; expected a tokenizer"):
        tokenizers.load(str(teacher), grid=(4, 4))
    with pytest.raises(FileNotFoundError, match="is no tokenizer: expected the workdir"):
        tokenizers.vocab_size(str(tmp_path))


def test_a_teacher_with_merged_patches_is_told(tmp_path):
    from beit_jax.models import swin
    from beit_jax.tasks.train_tokenizer import load_teacher

    architecture = dict(
        image_size=8, patch_size=1, embed_dim=4, depths=(1, 1), num_heads=(1, 1), window_size=2
    )
    model = swin.Model(**architecture)
    params = jax.device_get(model.init(jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"])
    image = {"mean": [0.5], "std": [0.5], "interpolation": "bicubic", "crop": "squash"}
    info = checkpoint.ModelInfo("swin", "classify", architecture, None, image, None)
    with checkpoint.Checkpointer(tmp_path) as saver:
        saver.save(0, {"params": params})
    checkpoint.write_model_info(tmp_path, info)
    with pytest.raises(ValueError, match="ends in 16 tokens, not in one for each of 8 x 8"):
        load_teacher(str(tmp_path))
