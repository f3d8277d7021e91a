"""Checkpoints: what is restored is what was saved, whatever happened to the disk or the process."""

import contextlib
import json
import logging
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beit_jax import checkpoint, errors, optim, state
from beit_jax.checkpoint import Checkpointer, CheckpointError, load_params

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def quiet():
    """Orbax logs every save that fails, with pages of JSON."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def make_params(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {
        "layer_0": {"kernel": normal(3, 4), "bias": jnp.zeros(4)},
        "classifier": {"kernel": normal(4, 2), "bias": normal(2)},
    }


def make_state(seed=0, *, freeze=(), ema=True):
    """A state after one step, so that nothing in it is zero by chance."""
    params = make_params(seed)
    trainable = optim.trainable_mask(params, freeze=freeze)
    tx = optim.make_optimizer("adamw", learning_rate=0.1, params=params, trainable=trainable)
    first = state.create(params, {"teacher": params["classifier"]}, tx, ema=ema)
    gradient = make_params(seed + 100)
    updates, opt_state = tx.update(gradient, first.opt_state, params)
    return first.replace(
        step=first.step + seed + 1,
        params=optax.apply_updates(params, updates),
        opt_state=opt_state,
    )


def assert_same(actual, expected):
    """Structure, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def simple(value):
    """A state that is known by its step."""
    return {
        "step": np.int32(value),
        "params": {"kernel": np.full((2, 3), value, np.float32), "bias": np.zeros(2, np.float32)},
        "ema_params": {"kernel": np.full((2, 3), -value, np.float32), "bias": np.ones(2)},
        "opt_state": {"mu": np.arange(5.0) * value, "nu": np.zeros(2, np.float32)},
    }


def listing(workdir):
    return sorted(os.listdir(pathlib.Path(workdir, "checkpoints")))


# ---------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("freeze", [(), ("layer_0/.*",)])
def test_state_round_trip_is_bit_exact(tmp_path, freeze, ema):
    saved = make_state(freeze=freeze, ema=ema)
    with Checkpointer(tmp_path) as saver:
        saver.save(1, saved)
    target = jax.eval_shape(lambda: make_state(1, freeze=freeze, ema=ema))
    with Checkpointer(tmp_path) as saver:
        assert_same(saver.restore(target), saved)
        assert_same(saver.restore(make_state(2, freeze=freeze, ema=ema)), saved)


def test_odd_values_and_dtypes_round_trip(tmp_path):
    saved = {
        "params": {
            "special": np.array([np.nan, -0.0, np.inf, -np.inf, 1e-45], np.float32),
            "half": jnp.asarray([1.5, -3.25], jnp.bfloat16),
            "scalar": jnp.float32(3),
            "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        },
        "flags": np.array([True, False]),
        "bytes": np.arange(5, dtype=np.uint8),
    }
    with Checkpointer(tmp_path) as saver:
        saver.save(0, saved)
        assert_same(saver.restore(), jax.device_get(saved))


def test_buffers_may_be_donated_right_after_save(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    now = {"params": {"kernel": jnp.zeros((256, 1024))}, "step": jnp.zeros((), jnp.int32)}
    with Checkpointer(tmp_path, keep_last=8) as saver:
        for i in range(8):
            saver.save(i, now)
            for _ in range(3):
                now = step(now)
        for i in range(8):
            restored = saver.restore(step=i)
            assert restored["step"] == 3 * i
            assert (restored["params"]["kernel"] == 3 * i).all()


def test_numpy_arrays_may_be_changed_right_after_save(tmp_path):
    array = np.zeros((256, 1024), np.float32)
    with Checkpointer(tmp_path, keep_last=4) as saver:
        for i in range(4):
            saver.save(i, {"params": {"kernel": array}})
            array += 1
        for i in range(4):
            assert (saver.restore(step=i)["params"]["kernel"] == i).all()


def test_restore_without_target_gives_nested_dicts_of_numpy(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(3, make_state(ema=False))
        restored = saver.restore()
    assert set(restored) == {"step", "params", "model_state", "opt_state"}
    assert isinstance(restored["params"]["classifier"]["kernel"], np.ndarray)


def test_restore_of_an_empty_workdir_is_none(tmp_path):
    with Checkpointer(tmp_path) as saver:
        assert saver.restore(simple(0)) is None
        assert (saver.all_steps(), saver.latest_step(), saver.best_step()) == ([], None, None)


def test_restore_waits_for_the_save_under_way(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(7, simple(7), metrics={"accuracy": 0.5})
        assert_same(saver.restore(), simple(7))
        saver.save(8, simple(8), metrics={"accuracy": 0.6})
        assert (saver.latest_step(), saver.best_step()) == (8, 8)
    assert listing(tmp_path) == ["7", "8"]


def test_a_step_is_saved_once(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(1, simple(1))
        saver.save(1, simple(2))
        assert_same(saver.restore(), simple(1))


SHARDING = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from beit_jax import checkpoint

def place(devices):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices], axis_types=auto)
    specs = {"params": {"kernel": PartitionSpec("data")}, "step": PartitionSpec()}
    kernel = np.arange(12, dtype=np.float32).reshape(4, 3)
    state = {"params": {"kernel": kernel}, "step": np.int32(1)}
    return jax.device_put(state, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))

def shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

assert jax.device_count() == 2
for saved, restored in ((1, 2), (2, 1), (2, 2)):
    with checkpoint.Checkpointer(f"{sys.argv[1]}/{saved}{restored}") as saver:
        saver.save(1, place(saved))
        expected = place(restored)
        actual = saver.restore(jax.tree.map(shape, expected))
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.sharding == y.sharding and len(x.addressable_shards) == restored
        np.testing.assert_array_equal(x, y)
    print(saved, restored)
"""


def test_restore_onto_two_devices_and_back(run_python, tmp_path):
    result = run_python(SHARDING, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert result.stdout == "1 2\n2 1\n2 2\n", result.stderr


# ---------------------------------------------------------------------------- what is kept


def test_keeps_the_last_and_the_best(tmp_path):
    accuracies = [0.1, 0.9, 0.2, np.nan, 0.3]
    with Checkpointer(tmp_path, keep_last=2) as saver:
        for step, accuracy in enumerate(accuracies):
            saver.save(step, simple(step), metrics={"accuracy": accuracy})
        assert saver.all_steps() == [1, 3, 4]
        assert saver.best_step() == 1
        assert saver.latest_step() == 4
    assert listing(tmp_path) == ["1", "3", "4"]
    with Checkpointer(tmp_path, keep_last=2) as saver:  # the scores are on the disk
        assert saver.best_step() == 1
        saver.save(5, simple(5), metrics={"accuracy": 0.95})
        assert saver.best_step() == 5
        saver.save(6, simple(6))
        saver.save(7, simple(7))
    assert listing(tmp_path) == ["5", "6", "7"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, None])
def test_what_is_not_finite_is_never_best(tmp_path, value):
    metrics = {} if value is None else {"accuracy": value}
    with Checkpointer(tmp_path, keep_last=1) as saver:
        saver.save(0, simple(0), metrics=metrics)
        assert saver.best_step() is None
        saver.save(1, simple(1), metrics={"accuracy": -5.0})
        saver.save(2, simple(2), metrics=metrics)
        assert saver.best_step() == 1
    assert listing(tmp_path) == ["1", "2"]


def test_of_equal_metrics_the_later_is_best(tmp_path):
    with Checkpointer(tmp_path, keep_last=1) as saver:
        for step in range(4):
            saver.save(step, simple(step), metrics={"accuracy": 0.5 if step < 3 else 0.1})
        assert saver.best_step() == 2
        assert saver.all_steps() == [2, 3]


def test_best_by_the_smallest(tmp_path):
    options = {"keep_last": 1, "best_metric": "loss", "best_mode": "min"}
    with Checkpointer(tmp_path, **options) as saver:
        for step, loss in enumerate([3.0, 1.0, 2.0, 4.0]):
            saver.save(step, simple(step), metrics={"loss": loss, "accuracy": loss})
        assert saver.best_step() == 1
        assert saver.all_steps() == [1, 3]


def test_keeps_two_best(tmp_path):
    with Checkpointer(tmp_path, keep_last=1, keep_best=2) as saver:
        for step, accuracy in enumerate([0.5, 0.1, 0.9, 0.2, 0.3]):
            saver.save(step, simple(step), metrics={"accuracy": accuracy})
        assert saver.all_steps() == [0, 2, 4]


def test_saving_what_is_among_the_best_keeps_the_best(tmp_path):
    with Checkpointer(tmp_path, keep_last=1, keep_best=3) as saver:
        for step, accuracy in enumerate([0.5, 0.9, 0.8, 0.4, 0.85, 0.9, np.nan, 0.7]):
            if saver.is_best({"accuracy": accuracy}, among=3) or step == 7:
                saver.save(step, simple(step), metrics={"accuracy": accuracy})
        assert saver.all_steps() == [1, 4, 5, 7]
        assert saver.is_best({"accuracy": 0.9}) and not saver.is_best({"accuracy": 0.89})
        assert not saver.is_best({"accuracy": 0.95}, among=0)


def test_without_keep_best_nothing_is_chosen(tmp_path):
    """Also of steps that were saved when something was to be chosen; as config.json says."""
    with Checkpointer(tmp_path, keep_last=3) as saver:
        saver.save(0, simple(0), metrics={"accuracy": 0.9})
    (tmp_path / "config.json").write_text('{"keep_best": 0}')
    with Checkpointer(tmp_path, keep_last=3, keep_best=0) as saver:
        for step, accuracy in enumerate([0.5, 0.4], 1):
            saver.save(step, simple(step), metrics={"accuracy": accuracy})
        assert saver.all_steps() == [0, 1, 2]
        assert saver.best_step() is None
        assert saver.restore(step="best")["step"] == 2
    assert load_params(tmp_path)["kernel"][0, 0] == -2


def test_keep_every(tmp_path):
    with Checkpointer(tmp_path, keep_last=1, keep_every=3) as saver:
        for step in range(1, 9):
            saver.save(step, simple(step))
        assert saver.all_steps() == [3, 6, 8]


def test_a_step_made_again_has_its_new_score(tmp_path):
    with Checkpointer(tmp_path, keep_last=3) as saver:
        saver.save(1, simple(1), metrics={"accuracy": 0.1})
        saver.save(2, simple(2), metrics={"accuracy": 0.9})
        saver.wait()
        next(iter(tmp_path.glob("checkpoints/2/meta/metadata"))).write_text("{")
        assert_same(saver.restore(), simple(1))
        assert saver.best_step() == 1
        saver.save(2, simple(2), metrics={"accuracy": np.nan})
        assert saver.best_step() == 1


# ---------------------------------------------------------------------------- another target


def test_another_target_lists_the_arrays_and_leaves_the_checkpoint(tmp_path):
    target = simple(0)
    target["params"]["kernel"] = np.zeros((4, 3), np.float32)
    target["params"]["bias"] = np.zeros(2, np.float16)
    target["params"]["extra"] = np.zeros(7, np.int8)
    del target["opt_state"]["nu"]
    with Checkpointer(tmp_path) as saver:
        saver.save(1, simple(1))
        with pytest.raises(ValueError) as raised:
            saver.restore(target)
        for line in (
            "params/kernel: float32[2, 3] saved, float32[4, 3] expected",
            "params/bias: float32[2] saved, float16[2] expected",
            "params/extra: nothing saved, int8[7] expected",
            "opt_state/nu: float32[2] saved, nothing expected",
        ):
            assert line in str(raised.value)
        assert "opt_state/mu" not in str(raised.value)
        assert listing(tmp_path) == ["1"]
        assert_same(saver.restore(simple(0)), simple(1))


def test_another_optimizer_is_named(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(1, make_state(freeze=("layer_0/.*",)))
        with pytest.raises(ValueError, match="layer_0/kernel: nothing saved"):
            saver.restore(make_state())


def test_restore_of_a_step_that_is_not_there(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(1, simple(1))
        with pytest.raises(FileNotFoundError, match="no step 5; available: 1"):
            saver.restore(step=5)


# ---------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two_steps")
    with Checkpointer(workdir) as saver:
        saver.save(1, simple(1), metrics={"accuracy": 0.1})
        saver.save(2, simple(2), metrics={"accuracy": 0.2})
    return workdir


def files_of(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def truncate(content):
    return content[: len(content) // 2]


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def zero(content):
    quarter = len(content) // 4
    return content[:quarter] + bytes(len(content) - 2 * quarter) + content[-quarter:]


def is_needed(path):
    """Whether the state hangs on the file; orbax keeps others that it does not read."""
    name = path.as_posix()
    return "/d/" in name.replace("/ocdbt.process_0/d/", "/") or name.endswith(
        ("meta/metadata", "params/manifest.ocdbt", "rest/manifest.ocdbt")
    )


def restore_newest(workdir, caplog=None):
    """What is restored, which must be what was saved as that step."""
    with Checkpointer(workdir) as saver:
        restored = saver.restore(simple(0))
        step = int(restored["step"])
        assert_same(restored, simple(step))
        assert saver.latest_step() == step
        return step


@pytest.mark.parametrize("damage", [truncate, flip, zero, None], ids=lambda x: x and x.__name__)
def test_any_damaged_file(two_steps, tmp_path, caplog, damage):
    needed = 0
    for i, path in enumerate(files_of(two_steps / "checkpoints/2")):
        copy = tmp_path / str(i)
        shutil.copytree(two_steps, copy)
        victim = copy / path.relative_to(two_steps)
        if damage:
            victim.write_bytes(damage(path.read_bytes()))
        else:
            victim.unlink()
        caplog.clear()
        step = restore_newest(copy)
        if is_needed(path.relative_to(two_steps)):
            needed += 1
            assert step == 1, path
        if step == 1:
            assert "Checkpoint 2 cannot be read and is moved to" in caplog.text
            (quarantined,) = os.listdir(copy / "checkpoints/_quarantine")
            assert quarantined.startswith("2-")
            assert listing(copy) == ["1", "_quarantine"]
        else:
            assert listing(copy) == ["1", "2"]
    assert needed >= 7  # data and manifest of three items, and the description


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_short_file_is_told_once(tmp_path, capfd):
    """Without a traceback for each of orbax's other reads, which would find its loop closed."""
    rng = np.random.default_rng(0)
    params = {f"layer_{i}": rng.standard_normal((64, 64)) for i in range(40)}
    with Checkpointer(tmp_path) as saver:
        saver.save(1, {"params": params})
    for path in (tmp_path / "checkpoints/1/params").rglob("d/*"):
        os.truncate(path, min(path.stat().st_size, 1000))
    with pytest.raises(CheckpointError, match="1 is damaged"):
        load_params(tmp_path)
    time.sleep(0.2)  # for reads that would come late
    assert capfd.readouterr().err == ""


def test_an_empty_step_directory(two_steps, tmp_path, caplog):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints/3").mkdir()
    assert restore_newest(tmp_path) == 2
    assert "Checkpoint 3 cannot be read" in caplog.text
    assert listing(tmp_path) == ["1", "2", "_quarantine"]


@pytest.mark.parametrize("item", ["params", "ema_params", "rest", "meta"])
def test_a_missing_item(two_steps, tmp_path, item):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints/2" / item)
    if item in ("ema_params", "meta"):  # not the other parameters instead
        with pytest.raises(CheckpointError, match="2 is damaged"):
            load_params(tmp_path, 2)
    assert restore_newest(tmp_path) == 1


@pytest.mark.parametrize("key", ["score", "params/kernel", "crc32"])
def test_a_changed_description(two_steps, tmp_path, key):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints/2/meta/metadata"
    meta = json.loads(path.read_text())
    if key in meta["arrays"]:
        del meta["arrays"][key]
    else:
        meta[key] = 5
    path.write_text(json.dumps(meta))
    assert restore_newest(tmp_path) == 1


def test_arrays_of_another_step(two_steps, tmp_path):
    """What a mix-up of files leaves is sound for orbax."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints/2/params")
    shutil.copytree(tmp_path / "checkpoints/1/params", tmp_path / "checkpoints/2/params")
    assert restore_newest(tmp_path) == 1


def test_nothing_that_can_be_read(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("checkpoints/*/meta/metadata"):
        path.write_text("")
    with Checkpointer(tmp_path) as saver:
        for _ in range(2):  # nothing is moved: a second start does not begin anew in silence
            with pytest.raises(CheckpointError, match=r"None of the checkpoints \[1, 2\]"):
                saver.restore()
    assert listing(tmp_path) == ["1", "2"]


def test_steps_only_grow(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(5, simple(5))
        with pytest.raises(ValueError, match="older than the newest checkpoint, 5"):
            saver.save(2, simple(2))


def fuzz(two_steps, workdir, rounds):
    """Flips random bytes; a flip may go unnoticed only where the state is as it was."""
    rng = random.Random(0)
    files = files_of(two_steps / "checkpoints/2")
    outcomes = []
    for i in range(rounds):
        copy = workdir / str(i)
        shutil.copytree(two_steps, copy)
        victim = copy / rng.choice(files).relative_to(two_steps)
        content = bytearray(victim.read_bytes())
        for _ in range(rng.choice([1, 1, 4])):
            content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        victim.write_bytes(content)
        outcomes.append(restore_newest(copy))
        shutil.rmtree(copy)
    assert set(outcomes) == {1, 2}


def test_random_damage(two_steps, tmp_path):
    fuzz(two_steps, tmp_path, 30)


@pytest.mark.slow
def test_much_random_damage(two_steps, tmp_path):
    fuzz(two_steps, tmp_path, 200)


# ---------------------------------------------------------------------------- failing saves

DISK_FULL = """
import os, resource, signal, sys
import numpy as np
from beit_jax.checkpoint import Checkpointer, CheckpointError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def limit(size):  # of every file that is written
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def state(i):
    kernels = {f"kernel_{n}": np.full(100_000, i) + np.random.rand(100_000) for n in range(8)}
    return {"params": kernels, "step": np.int32(i)}

with Checkpointer(sys.argv[1]) as saver:
    saver.save(1, state(1))
    saver.save(2, state(2))
    saver.wait()
    limit(100_000)
    saver.save(3, state(3))
    saver.wait()
    print("first failure", saver.all_steps())
    saver.save(4, state(4))
    try:
        saver.wait()
    except CheckpointError as error:
        print("second failure", saver.all_steps(), error)
    limit(resource.RLIM_INFINITY)
    saver.save(5, state(5))
    saver.wait()
    limit(100_000)
    saver.save(6, state(6))
    saver.wait()
    print("counts anew", saver.all_steps())
    saver.save(7, state(7))
    try:
        saver.close()
    except CheckpointError as error:
        print("close", error)
    limit(resource.RLIM_INFINITY)
"""


def test_full_disk(run_python, tmp_path):
    result = run_python(DISK_FULL, tmp_path)
    lines = result.stdout.splitlines()
    assert [line.split(" Saving")[0] for line in lines] == [
        "first failure [1, 2]",
        "second failure [1, 2]",
        "counts anew [2, 5]",
        "close",
    ], result.stderr[-2000:]
    assert "MiB free" in lines[1] and "File too large" in lines[1]
    assert f"ERROR:root:Saving to {tmp_path}/checkpoints failed" in result.stderr
    assert "Event loop is closed" not in result.stderr
    with Checkpointer(tmp_path) as saver:
        assert saver.restore()["step"] == 5
    assert listing(tmp_path) == ["2", "5"]


def test_a_file_that_cannot_be_opened_now_is_not_damaged(tmp_path, monkeypatch):
    """By tensorstore, which tells it in words of its own."""
    deserialize = checkpoint._ArrayHandler.deserialize

    async def without_files(self, infos, args=None):
        taken = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(open(os.devnull))  # noqa: SIM115
            return await deserialize(self, infos, args)
        finally:
            for file in taken:
                file.close()

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Checkpointer(tmp_path) as saver:
        for step in (1, 2):
            saver.save(step, simple(step), metrics={"accuracy": step})
        saver.wait()
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
            monkeypatch.setattr(checkpoint._ArrayHandler, "deserialize", without_files)
            for read in (saver.restore, lambda: load_params(tmp_path)):
                with pytest.raises((OSError, ValueError), match="Too many open files"):
                    read()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            monkeypatch.undo()
        assert saver.restore()["step"] == 2 and listing(tmp_path) == ["1", "2"]


@pytest.fixture
def broken(monkeypatch):
    """A switch that makes orbax fail at once."""

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def switch(on):
        monkeypatch.undo()
        if on:
            monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", fail)

    return switch


def test_failure_at_once(tmp_path, broken, caplog):
    with Checkpointer(tmp_path) as saver:
        saver.save(1, simple(1))
        broken(True)
        saver.save(2, simple(2))
        assert "No space left on device" in caplog.text
        assert saver.all_steps() == [1]
        with pytest.raises(CheckpointError, match="No space left on device. With room for it, the"):
            saver.save(3, simple(3))
        broken(False)
        saver.save(3, simple(3))  # a success counts anew
        assert_same(saver.restore(), simple(3))
        broken(True)
        saver.save(4, simple(4))
        assert_same(saver.restore(), simple(3))
        broken(False)
        saver.save(4, simple(4))
    assert listing(tmp_path) == ["3", "4"]


def test_a_full_disk_is_no_device_without_memory():
    text = 'RESOURCE_EXHAUSTED: Error writing "a": No space left on device [source locations'
    reason = checkpoint._reason(ValueError(text))
    assert reason == "No space left on device"
    assert errors.message(OSError("RESOURCE_EXHAUSTED: quota")) == "RESOURCE_EXHAUSTED: quota"
    told = errors.message(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert "The device has too little memory" in told


@pytest.mark.parametrize("waits", [True, False])
def test_close_raises_if_the_last_save_failed(tmp_path, broken, waits):
    saver = Checkpointer(tmp_path)
    saver.save(1, simple(1))
    broken(True)
    saver.save(2, simple(2))
    if waits:
        saver.wait()
    with pytest.raises(CheckpointError):
        saver.close()
    assert listing(tmp_path) == ["1"]


def test_an_error_in_the_block_is_the_one_to_see(tmp_path, broken):
    broken(True)
    with pytest.raises(FloatingPointError), Checkpointer(tmp_path) as saver:
        saver.save(1, simple(1))
        raise FloatingPointError


# ---------------------------------------------------------------------------- kill -9

SAVE_FOR_EVER = """
import itertools, os, sys
import numpy as np
from beit_jax.checkpoint import Checkpointer

for line in sys.stdin:  # one child each: what takes seconds here are the imports
    if child := os.fork():
        os.waitpid(child, 0)
        print("gone", flush=True)
        continue
    print("child", os.getpid(), flush=True)
    with Checkpointer(sys.argv[1], keep_last=2) as saver:
        state = saver.restore()
        start = 0 if state is None else int(state["step"])
        for i in itertools.count(start + 1):
            saver.save(i, {
                "params": {str(k): np.full((50, 50), i, np.float32) for k in range(4)},
                "opt_state": {str(k): np.full((50, 50), -i, np.float32) for k in range(4)},
                "step": np.int32(i),
            }, metrics={"accuracy": np.sin(i)})
            print(i, flush=True)
"""


def kill_often(workdir, kills):
    rng = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, workdir],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as parent:
        try:
            for _ in range(kills):
                print("again", file=parent.stdin, flush=True)
                child = next(line for line in parent.stdout if line.startswith("child"))
                reached = [int(next(parent.stdout)) for _ in range(rng.randrange(2, 6))][-1]
                time.sleep(rng.uniform(0, 0.1))
                os.kill(int(child.split()[1]), signal.SIGKILL)
                # after what may be half a line: without a buffer, print writes its end by itself
                assert any(line.endswith("gone\n") for line in parent.stdout)
                check_after_kill(workdir, reached)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def check_after_kill(workdir, reached):
    with Checkpointer(workdir) as saver:
        restored = saver.restore()
        steps, best = saver.all_steps(), saver.best_step()
    step = int(restored["step"])
    assert step == steps[-1] >= reached - 1  # the one before had been waited for
    assert best == max(steps, key=np.sin)
    for sign, item in ((1, "params"), (-1, "opt_state")):
        assert all((x == sign * step).all() for x in restored[item].values())
    assert listing(workdir) == sorted(map(str, steps))  # no half ones, nothing set aside
    assert len(steps) <= 4  # two last, the best, and one that was to go


def test_kill(tmp_path):
    kill_often(tmp_path, 6)


@pytest.mark.slow
def test_many_kills(tmp_path):
    kill_often(tmp_path, 20)


def test_what_a_kill_left_is_removed(tmp_path):
    for name in ("5.orbax-checkpoint-tmp/params", "_trash/1/params", "_quarantine/2-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with Checkpointer(tmp_path) as saver:
        assert listing(tmp_path) == ["_quarantine"]
        saver.save(5, simple(5))
    assert listing(tmp_path) == ["5", "_quarantine"]


def test_nothing_runs_on_after_close(tmp_path):
    before = set(threading.enumerate())
    for i in range(200):
        (tmp_path / f"checkpoints/{i}.orbax-checkpoint-tmp/params").mkdir(parents=True)
    with Checkpointer(tmp_path) as saver:
        assert saver.restore() is None
    assert set(threading.enumerate()) <= before
    assert listing(tmp_path) == []


# ---------------------------------------------------------------------------- load_params


def test_load_params_prefers_the_average(tmp_path):
    saved = make_state()
    with Checkpointer(tmp_path / "a") as saver:
        saver.save(1, saved)
    assert_same(load_params(tmp_path / "a"), jax.device_get(saved.ema_params))
    with Checkpointer(tmp_path / "b") as saver:
        saver.save(1, saved.replace(ema_params=None))
    assert_same(load_params(tmp_path / "b"), jax.device_get(saved.params))
    assert not np.array_equal(saved.params["classifier"]["bias"], make_params()["classifier"])


def test_load_params_of_a_step(tmp_path):
    with Checkpointer(tmp_path, keep_last=3) as saver:
        for step, accuracy in enumerate([0.1, 0.9, 0.3], 1):
            saver.save(step, simple(step), metrics={"accuracy": accuracy})
    for step, expected in {"best": 2, "latest": 3, 1: 1}.items():
        assert (load_params(tmp_path, step)["kernel"] == -expected).all()
    with pytest.raises(FileNotFoundError, match="no step 9; available: 1, 2, 3"):
        load_params(tmp_path, 9)
    (tmp_path / "checkpoints/2/meta/metadata").write_text("{")
    with pytest.raises(CheckpointError, match="checkpoints/2 is damaged"):
        load_params(tmp_path, 2)
    assert listing(tmp_path) == ["1", "2", "3"]  # it only reads


def test_best_is_the_latest_where_nothing_was_measured(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(1, simple(1))
        saver.save(2, simple(2))
    assert (load_params(tmp_path, "best")["kernel"] == -2).all()


def test_a_damaged_best_gives_way_to_the_next(tmp_path, caplog):
    """And then to the newest; only a run sets the damaged ones aside."""
    with Checkpointer(tmp_path, keep_last=4) as saver:
        for step, accuracy in ((1, 0.8), (2, 0.9), (3, 0.7), (4, None)):
            saver.save(step, simple(step), metrics=accuracy and {"accuracy": accuracy})
    (tmp_path / "checkpoints/2/meta/metadata").write_text("{")
    shutil.rmtree(tmp_path / "checkpoints/1/ema_params")
    assert (load_params(tmp_path)["kernel"] == -3).all()
    assert "checkpoints/1 cannot be read" in caplog.text and "is used instead" in caplog.text
    assert listing(tmp_path) == ["1", "2", "3", "4"]
    with Checkpointer(tmp_path, keep_last=4) as saver:
        assert saver.restore(step="best")["step"] == 3
        assert saver.best_step() == 3
    shutil.rmtree(tmp_path / "checkpoints/3/rest")
    with Checkpointer(tmp_path, keep_last=4) as saver:
        assert saver.restore(step="best")["step"] == 4
    assert listing(tmp_path) == ["2", "4", "_quarantine"]


def test_load_params_without_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoints"):
        load_params(tmp_path)
    Checkpointer(tmp_path).close()
    for step in ("best", "latest", 3):
        with pytest.raises(FileNotFoundError, match="has no checkpoint: its run"):
            load_params(tmp_path, step)
