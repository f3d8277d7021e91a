"""OpenAI's dVAE (openai/DALL-E): encoder.pkl and decoder.pkl, which are pickled torch modules.

Neither torch nor dall_e is needed, and nothing of either is run: the unpickler here knows plain
containers and tensors, makes inert objects of all modules, and refuses everything else.
"""

import collections
import io
import os
import pickle
import re
import zipfile
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from beit_jax.fileio import FileFormatError

FILES = ("encoder.pkl", "decoder.pkl")
_SOURCE = "https://cdn.openai.com/dall-e/"
_DTYPES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "DoubleStorage": np.float64}
_MODULES = re.compile(r"(dall_e|torch\.nn\.modules)(\.\w+)*|torch\.nn")
_MAGIC = 0x1950A86A20F9469CFC6C  # of torch's files before version 1.6
_NAME = re.compile(
    r"blocks\.(?:(input|output)(?:\.conv)?|(group_\d+)\.(block_\d+)\.(?:res_path\.)?(conv_\d|id_path))"
    r"\.([wb])"
)


def is_here(directory: str | os.PathLike) -> bool:
    """Whether a directory holds one of the two files."""
    return any(os.path.isfile(os.path.join(directory, name)) for name in FILES)


def load(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns parameters of `tokenizers/dvae.py`, nested, and their architecture.

    Raises:
      FileNotFoundError: one of the files is not there.
      FileFormatError: a file is damaged, is not a dVAE, or holds more than tensors and modules.
    """
    params = {}
    for part, name in zip(("encoder", "decoder"), FILES, strict=True):
        path = os.path.join(directory, name)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no {path}; it is at {_SOURCE}{name}.")
        try:
            params |= {f"{part}/{key}": x for key, x in _rename(_tensors(read(path))).items()}
        except FileFormatError:
            raise
        except Exception as error:  # an unpickler fails in many ways
            raise FileFormatError(
                path, f"cannot be read: {error}", f"Download it again from {_SOURCE}{name}"
            ) from error
    return traverse_util.unflatten_dict(params, sep="/"), _architecture(params, directory)


def _rename(tensors):
    renamed = {}
    for name, x in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no parameter of a dVAE")
        end, group, block, conv, kind = match.groups()
        parent = end or f"{group}_{block}/{conv}"
        is_kernel = kind == "w"
        x = np.asarray(x, np.float32)
        renamed[f"{parent}/{'kernel' if is_kernel else 'bias'}"] = (
            x.transpose(2, 3, 1, 0) if is_kernel else x
        )
    return renamed


def _architecture(params, directory) -> dict[str, Any]:
    try:
        groups, blocks = zip(
            *re.findall(r"encoder/group_(\d+)_block_(\d+)/conv_1/kernel", "\n".join(params)),
            strict=True,
        )
        channels, width = params["encoder/input/kernel"].shape[2:]
        initial = params["decoder/input/kernel"].shape[3]
        vocab_size = params["encoder/output/kernel"].shape[3]
        if params["decoder/input/kernel"].shape[2] != vocab_size:
            raise ValueError("encoder and decoder differ in their vocabulary")
    except (KeyError, ValueError) as error:
        raise FileFormatError(directory, f"is no dVAE: {error}") from error
    return {
        "num_channels": channels,
        "vocab_size": vocab_size,
        "hidden_size": width,
        "initial_size": initial,
        "num_groups": max(map(int, groups)),
        "blocks_per_group": max(map(int, blocks)),
    }


class _Object:
    """Stands for an object of a class that is not imported; keeps its attributes."""

    def __new__(cls, *args):
        return object.__new__(cls)

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("an object with a state that is no dictionary")
        self.__dict__.update(state)


class _Storage(NamedTuple):
    key: str
    dtype: type
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage, offset, shape, stride, *_):
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "device"): lambda *_: None,
    ("torch", "Size"): tuple,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if _MODULES.fullmatch(module):
            return _Object
        raise pickle.UnpicklingError(f"{module}.{name} is neither a tensor nor a module")

    def persistent_load(self, saved):
        if saved[0] == "module":  # of old files: the class with its source
            return saved[1]
        _, dtype, key, _, size = saved[:5]
        return _Storage(str(key), dtype, size)


def read(path: str | os.PathLike) -> Any:
    """The content of a file of `torch.save`: plain containers, numpy arrays and inert objects.

    Raises:
      pickle.UnpicklingError: it holds anything else.
      Exception: it is damaged.
    """
    with open(path, "rb") as file:
        content = file.read()
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (main,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            root = main.removesuffix("data.pkl")
            found = _Unpickler(io.BytesIO(archive.read(main))).load()
            return _fill(found, lambda storage: archive.read(f"{root}data/{storage.key}"))
    stream = io.BytesIO(content)
    if _Unpickler(stream).load() != _MAGIC:
        raise ValueError("it is no file of torch")
    for _ in range(2):  # the version, and sizes of numbers
        _Unpickler(stream).load()
    found, keys = _Unpickler(stream).load(), _Unpickler(stream).load()
    sizes = {storage.key: storage for storage in _storages(found)}
    data = {}
    for key in map(str, keys):
        stream.seek(8, io.SEEK_CUR)  # the number of elements, which the pickle has told
        data[key] = stream.read(sizes[key].size * np.dtype(sizes[key].dtype).itemsize)
    return _fill(found, lambda storage: data[storage.key])


def _children(x):
    if isinstance(x, _Object):
        return vars(x)
    return x if isinstance(x, dict) else dict(enumerate(x)) if isinstance(x, list) else {}


def _storages(x):
    if isinstance(x, _Tensor):
        yield x.storage
    for child in _children(x).values():
        yield from _storages(child)


def _fill(x, data):
    """The same with arrays in place of tensors."""
    if isinstance(x, _Tensor):
        return _array(x, data(x.storage))
    children = _children(x)
    for key, child in children.items():
        filled = _fill(child, data)
        if filled is not child:
            (x if isinstance(x, list) else children)[key] = filled
    return x


def _array(tensor, data):
    contiguous = tuple(int(n) for n in np.cumprod((1, *tensor.shape[:0:-1]))[::-1])
    if tensor.shape and tensor.stride != contiguous:
        raise ValueError(f"a tensor of shape {tensor.shape} is not contiguous")
    count = int(np.prod(tensor.shape))
    values = np.frombuffer(data, tensor.storage.dtype)
    if tensor.offset < 0 or tensor.offset + count > values.size:
        raise ValueError(f"a tensor of shape {tensor.shape} is cut off")
    return values[tensor.offset : tensor.offset + count].reshape(tensor.shape)


def _tensors(x, prefix=""):
    """The arrays, by name, of a module or a state dictionary."""
    if isinstance(x, dict):
        return {prefix + name: value for name, value in x.items() if isinstance(value, np.ndarray)}
    if not isinstance(x, _Object):
        raise ValueError("it holds neither a module nor a dictionary of tensors")
    found = _tensors(getattr(x, "_parameters", {}), prefix)
    for name, child in getattr(x, "_modules", {}).items():
        found |= _tensors(child, f"{prefix}{name}.")
    return found
