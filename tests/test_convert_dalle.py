"""OpenAI's dVAE files: as torch reads them, and without a way in for anything else."""

import collections
import pickle
import sys
import types

import jax
import numpy as np
import pytest

from beit_jax import tokenizers
from beit_jax.convert import FileFormatError, dalle
from beit_jax.tokenizers import dvae

torch = pytest.importorskip("torch")
nn = torch.nn
GROUPS, BLOCKS, WIDTH, VOCAB = 3, 2, 8, 20


class Conv2d(nn.Module):
    def __init__(self, n_in, n_out, kw):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / (n_in * kw**2) ** 0.5)
        self.b = nn.Parameter(torch.randn(n_out) * 0.1)
        self.device = torch.device("cpu")

    def forward(self, x):
        return nn.functional.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    def __init__(self, n_in, n_out, sizes):
        super().__init__()
        self.post_gain = 1 / (GROUPS * BLOCKS) ** 2
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = [n_in, n_out // 4, n_out // 4, n_out // 4, n_out]
        steps = []
        for i, size in enumerate(sizes):
            steps += [(f"relu_{i + 1}", nn.ReLU())]
            steps += [(f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], size))]
        self.res_path = nn.Sequential(collections.OrderedDict(steps))

    def forward(self, x):
        return self.id_path(x) + self.post_gain * self.res_path(x)


class Half(nn.Module):
    """Encoder or decoder, by its sizes."""

    def __init__(self, first, widths, sizes, between, last):
        super().__init__()
        blocks, width = [("input", first)], first.w.shape[0]
        for group, new in enumerate(widths, 1):
            layers = []
            for block in range(BLOCKS):
                layers.append((f"block_{block + 1}", Block(width, new, sizes)))
                width = new
            if group < len(widths):
                layers.append(between)
            blocks.append((f"group_{group}", nn.Sequential(collections.OrderedDict(layers))))
        output = collections.OrderedDict(relu=nn.ReLU(), conv=Conv2d(width, last, 1))
        self.blocks = nn.Sequential(
            collections.OrderedDict([*blocks, ("output", nn.Sequential(output))])
        )

    def forward(self, x):
        return self.blocks(x)


@pytest.fixture(scope="module")
def twins():
    """(encoder, decoder) of torch; their classes are those of a module dall_e, as in the files."""
    module = types.ModuleType("dall_e")
    for cls in (Conv2d, Block, Half):
        cls.__module__ = "dall_e"
        setattr(module, cls.__name__, cls)
    sys.modules["dall_e"] = module
    torch.manual_seed(0)
    widths = [WIDTH * 2**i for i in range(GROUPS)]
    encoder = Half(Conv2d(3, WIDTH, 7), widths, (3, 3, 3, 1), ("pool", nn.MaxPool2d(2)), VOCAB)
    up = ("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
    decoder = Half(Conv2d(VOCAB, 12, 1), widths[::-1], (1, 3, 3, 3), up, 6)
    yield encoder, decoder
    del sys.modules["dall_e"]


def save(twins, directory, **options):
    for name, twin in zip(dalle.FILES, twins, strict=True):
        torch.save(twin, directory / name, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_zip", [True, False])
def test_it_is_the_network_of_torch(twins, tmp_path, is_zip):
    save(twins, tmp_path, _use_new_zipfile_serialization=is_zip)
    params, architecture = dalle.load(tmp_path)
    assert architecture == {
        "num_channels": 3,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "initial_size": 12,
        "num_groups": GROUPS,
        "blocks_per_group": BLOCKS,
    }
    model = dvae.Model(**architecture, image_size=16)
    expected = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 16, 3)))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, expected)

    image = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        logits = twins[0](torch.tensor(image.transpose(0, 3, 1, 2)) * 0.8 + 0.1)
        code = nn.functional.one_hot(logits.argmax(1), VOCAB).permute(0, 3, 1, 2).float()
        location = torch.sigmoid(twins[1](code)[:, :3])
        decoded = ((location - 0.1) / 0.8).clamp(0, 1).numpy().transpose(0, 2, 3, 1)
    variables = {"params": params}
    found = model.apply(variables, image, method="encode")
    np.testing.assert_allclose(found, logits.numpy().transpose(0, 2, 3, 1), atol=1e-5)
    token = model.apply(variables, image, method="tokenize")
    np.testing.assert_array_equal(token, logits.argmax(1).numpy().reshape(2, -1))
    np.testing.assert_allclose(model.apply(variables, token, method="decode"), decoded, atol=1e-5)


def test_it_is_a_tokenizer_of_any_grid(twins, tmp_path):
    save(twins, tmp_path)
    tokenizer = tokenizers.load(str(tmp_path), grid=(3, 2))
    assert tokenizer.model.config.image_size == (12, 8)
    assert tokenizers.vocab_size(str(tmp_path)) == VOCAB


class Malicious:
    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return open, (str(self.touched), "w")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_zip", [True, False])
def test_nothing_in_a_file_is_run(twins, tmp_path, is_zip):
    save(twins, tmp_path)
    touched = tmp_path / "touched"
    content = {"blocks.input.w": torch.zeros(1), "more": Malicious(touched)}
    torch.save(content, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(FileFormatError, match="open is neither a tensor nor a module"):
        dalle.load(tmp_path)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch.hub", "load"),
        ("torch", "load"),
        ("torch.nn.utils", "x"),
        ("dall_e_evil", "x"),
        ("functools", "partial"),
    ],
)
def test_unknown_names_are_refused(module, name, tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(pickle.UnpicklingError, match="neither a tensor nor a module"):
        dalle.read(path)


def test_damage_is_told(twins, tmp_path):
    save(twins, tmp_path)
    whole = (tmp_path / "decoder.pkl").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"<html>not found</html>", pickle.dumps([1])):
        (tmp_path / "decoder.pkl").write_bytes(damaged)
        with pytest.raises(FileFormatError, match=r"decoder\.pkl: cannot be read"):
            dalle.load(tmp_path)
    (tmp_path / "decoder.pkl").unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no .*decoder\.pkl; it is at https"):
        dalle.load(tmp_path)


def test_other_networks_are_told(twins, tmp_path):
    save(twins, tmp_path)
    torch.save(nn.Linear(2, 2), tmp_path / "encoder.pkl")
    with pytest.raises(FileFormatError, match="weight is no parameter of a dVAE"):
        dalle.load(tmp_path)
    torch.save(twins[1], tmp_path / "encoder.pkl")
    with pytest.raises(FileFormatError, match="encoder and decoder differ|is no dVAE"):
        dalle.load(tmp_path)
