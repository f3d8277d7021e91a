"""What tests of whole runs share: tiny models and data, and main.py in processes of its own."""

import itertools
import logging
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
TINY = {
    "model.image_size": 8,
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 32,
    "data.train": "train[:400]",
    "data.val": "",
    "data.test": "",
    "total_steps": 20,
    "optim.warmup": "0",
    "eval_every": "10",
    "save_every": "5",
    "log_every": "1",
    "tensorboard": False,
    "mistakes": 0,
    "compile_cache": "",
}

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/beit_jax_tests")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


class Finished(NamedTuple):
    """A program that has ended; `output` is stdout and stderr together."""

    status: int
    output: str


class Program:
    """main.py, or a module with a command line, at work in another process."""

    def __init__(self, process, log):
        self._process, self._log = process, log
        self.pid, self.terminate, self.kill = process.pid, process.terminate, process.kill

    @property
    def output(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float = 120) -> Finished:
        self._process.join(seconds)
        if self.is_alive():
            self.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.output}")
        return Finished(self._process.exitcode, self.output)


@pytest.fixture(autouse=True)
def log_level_stays():
    """What a test does not see in the log would depend on the tests before it."""
    yield
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.WARNING)
    assert level == logging.WARNING


@pytest.fixture
def run_python():
    """run_python(code, *arguments, **environment) -> a finished interpreter, on CPU devices."""

    def run(code, *args, **env):
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """start("main.py" or a module, *arguments, **environment) -> Program, on CPU devices.

    Processes are forked from one that has imported everything: they start in a fraction of a
    second, and are otherwise as started from a shell.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["beit_jax.train", "beit_jax.predict", "sklearn.datasets"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        forkserver.ensure_running()
    logs, number = tmp_path_factory.mktemp("logs"), itertools.count()

    def start(program, *arguments, **environment):
        log = logs / f"{next(number)}.txt"
        process = context.Process(target=_run, args=(program, arguments, environment, log))
        process.start()
        return Program(process, log)

    return start


def _run(program, arguments, environment, log):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.argv = [program, *map(str, arguments)]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


@pytest.fixture(scope="session")
def flags():
    """flags(workdir, {"optim.learning_rate": 0.1}) -> arguments of main.py for a tiny run."""

    def flags(workdir, changes=(), config="configs/quickstart.py"):
        values = TINY | dict(changes)
        pairs = [f"--config.{key}={value}" for key, value in values.items()]
        return [f"--config={config}", f"--workdir={workdir}", *pairs]

    return flags


@pytest.fixture(scope="session")
def train():
    """train(workdir, {"optim.learning_rate": 0.1}) does a tiny run on digits in this process."""
    from beit_jax import train
    from configs import quickstart

    def run(workdir, changes=()):
        config = quickstart.get_config()
        config.update_from_flattened_dict(TINY | dict(changes))
        return train.run(config, str(workdir))

    return run


@pytest.fixture(scope="session")
def state_of():
    """state_of(workdir) -> {path: array} of its newest checkpoint, verified."""
    from flax import traverse_util

    from beit_jax import checkpoint

    def state_of(workdir, step=None):
        with checkpoint.Checkpointer(workdir) as saver:
            return traverse_util.flatten_dict(saver.restore(step=step), sep="/")

    return state_of


@pytest.fixture(scope="session")
def image_dir(tmp_path_factory):
    """A folder of 3 x 20 images in two sizes; the classes differ in colour."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for channel, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir()
        for i in range(20):
            shape = (20, 24, 3) if i % 2 else (16, 16, 3)
            pixels = rng.integers(0, 128, shape, np.uint8)
            pixels[..., 2 - channel] += 100
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def random_classifier():
    """Makes a classifier of 16 x 16 pixels and three classes that has learnt nothing."""
    import jax

    from beit_jax import architecture, checkpoint, modules, pretrained
    from beit_jax.convert import preprocessor

    def make(family="beit", **changes):
        presets = modules.load("models", family).PRESETS
        fields = {**presets["digits"], "num_labels": 3, **changes}
        names, image = ["red", "blue", "green"], preprocessor.DEFAULT
        info = checkpoint.ModelInfo(family, "classify", fields, names, image, None)
        network = architecture.make_model(info)
        c = network.config
        image = np.zeros((1, *c.image_size, c.num_channels), np.float32)
        params = jax.jit(network.init)(jax.random.key(0), image)["params"]
        return pretrained.Pretrained(jax.device_get(params), info)

    return make


@pytest.fixture(scope="session")
def classifier_directory(tmp_path_factory, random_classifier):
    """One of them in the files of HuggingFace; unlike `hf_directory` it needs no torch."""
    from beit_jax import convert

    params, info = random_classifier()
    path = tmp_path_factory.mktemp("classifier") / "hf"
    convert.save_hf(path, params, info.architecture, info.class_names, info.image)
    return path


@pytest.fixture(scope="session")
def mim_directory(tmp_path_factory):
    """A HuggingFace directory with a random BEiT of 16 x 16 pixels for masked image modelling; its
    shared table of positions is random, too."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BeitConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=20,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        initializer_range=0.2,
    )
    model = transformers.BeitForMaskedImageModeling(config)
    (shared,) = (p for name, p in model.named_parameters() if "position_bias_table" in name)
    torch.nn.init.normal_(shared)
    path = tmp_path_factory.mktemp("mim")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory):
    """A HuggingFace directory with a random BEiT of 16 x 16 pixels and classes out of order."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = {0: "red", 1: "blue", 2: "green"}
    config = transformers.BeitConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        use_relative_position_bias=True,
        drop_path_rate=0.1,
        initializer_range=0.2,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    model = transformers.BeitForImageClassification(config)
    path = tmp_path_factory.mktemp("hf")
    model.save_pretrained(path)
    size = {"height": 16, "width": 16}
    transformers.BeitImageProcessorPil(size=size, do_center_crop=False).save_pretrained(path)
    return path
