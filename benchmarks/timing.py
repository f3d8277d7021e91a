"""How anything here is timed: in turns, after warming up, beside a description of the machine."""

import hashlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

SEED = 0
RESULTS = os.path.join(os.path.dirname(__file__), "results")
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # that matrix products use
_ENVIRONMENT = {
    "cpu": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    "gpu": {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}


def use(device: str) -> None:
    """Keeps this process and those that it starts to the "cpu" or "gpu", without another to fall
    back to, and without memory that is taken in advance. To be called before JAX is used."""
    os.environ.update(_ENVIRONMENT[device])
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def measure(contenders: dict, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per step of each contender in each block, in turns, forth and back.

    A block has as many steps as fill about `seconds`, at least one, and one before them that does
    not count: while others had their turn, memory and clocks may have been taken away.
    """
    steps = {}
    for name, run in contenders.items():
        run(1)  # compiles
        run(1)
        start = time.perf_counter()
        run(1)
        steps[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in (*contenders, *reversed(contenders)):
            contenders[name](1)
            start = time.perf_counter()
            contenders[name](steps[name])
            times[name].append((time.perf_counter() - start) / steps[name])
    return times


class Step(NamedTuple):
    """What is timed.

    Attributes:
      run: does n steps and waits for the last.
      number: what the last step came to, its loss or the mean size of its logits.
      tell: facts, such as the memory that a step needs.
    """

    run: Callable[[int], None]
    number: Callable[[], float]
    tell: Callable[[], dict]


class ContenderError(RuntimeError):
    """The process of the contender `name` failed."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


class Contender:
    """A step in a process of its own, so that no allocator and no thread is shared.

    `make(*args)` is called there, and returns a `Step`; `begin` does its first steps. `facts` are
    what that tells, "losses", the numbers that the first three steps came to, and the time that
    making it and the first step took; `wait` adds "latency_seconds", the median time of single
    steps that are each waited for.

    Called as a function, it does so many steps and waits for the last.

    Raises:
      ContenderError: by a call, too: the process failed, or took longer than `limit` seconds.
    """

    limit = 600

    def __init__(self, name: str, make, *args):
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args))
        self._process.start()
        theirs.close()
        self.facts = None
        self._closing_on_error(self._receive)

    def begin(self):
        """Does the first steps, if that was not done; returns itself."""
        if self.facts is None:
            self.facts = self._closing_on_error(self, "begin")
        return self

    def wait(self):
        """Times single steps; returns itself."""
        self.facts["latency_seconds"] = self._closing_on_error(self, "wait")
        return self

    def _closing_on_error(self, ask, *args):
        try:
            return ask(*args)
        except ContenderError:
            self.close()
            raise

    def __call__(self, n: int | str):
        try:
            self._pipe.send(n)
        except OSError:
            pass  # its last words, if it had any, are still to be read
        return self._receive()

    def _receive(self):
        try:
            if not self._pipe.poll(self.limit):
                self._process.kill()
                raise ContenderError(self._name, f"nothing came for {self.limit} s")
            answer = self._pipe.recv()
        except (EOFError, OSError):
            message = "the process died, perhaps for want of memory"
            raise ContenderError(self._name, message) from None
        if isinstance(answer, str):
            raise ContenderError(self._name, answer)
        return answer

    def close(self):
        """Ends the process."""
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()


def _serve(pipe, make, args):
    """The process: makes a step, tells of it, and does as many as it is told."""
    try:
        start = time.perf_counter()
        step = make(*args)
        seconds = time.perf_counter() - start
        pipe.send(None)
        while True:
            asked = pipe.recv()
            if asked == "begin":
                pipe.send(_begin(step, seconds))
            elif asked == "wait":
                pipe.send(_latency(step.run))
            else:
                pipe.send(step.run(asked))
    except EOFError:
        return
    except Exception as error:  # no memory, no compiler, no library: the table has a gap
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _begin(step, seconds):
    start = time.perf_counter()
    step.run(1)
    seconds += time.perf_counter() - start
    losses = [step.number()]
    for _ in range(2):
        step.run(1)
        losses.append(step.number())
    return {"losses": losses, "first_step_seconds": seconds, **step.tell()}


def _latency(run):
    """Of up to twenty steps, or as many as fill a second."""
    times, start = [], time.perf_counter()
    while len(times) < 20 and time.perf_counter() - start < 1:
        before = time.perf_counter()
        run(1)
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def environment() -> dict:
    """Variables that change what is measured; None where they are not set."""
    names = ("GLIBC_TUNABLES", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE")
    return {name: os.environ.get(name) for name in names}


def machine() -> dict:
    """The commit, hardware with its clocks as they are now, and versions."""
    cpu = re.search(r"model name\s*: (.*)", _cpuinfo())
    names = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "timm", "peft", "numpy")
    found = [name for name in (*names, "tensorflow", "triton") if importlib.util.find_spec(name)]
    return {
        "commit": os.environ.get("BEIT_JAX_COMMIT")  # of a copy without .git, or with another's
        or _output("git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"),
        "source": _source(),
        "cpu": cpu[1].strip() if cpu else platform.processor(),
        "cpu_features": [name for name in _FEATURES if re.search(rf"\b{name}\b", _cpuinfo())],
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        **clocks(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in found},
        **_cuda(),
    }


def _source():
    """A checksum of the code, which is known without git too and tells of changes not committed."""
    checksum, root = hashlib.sha256(), pathlib.Path(__file__).parents[1]
    for folder in ("beit_jax", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            checksum.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return checksum.hexdigest()[:16]


def _cuda():
    """Versions of NVIDIA's libraries, of which JAX and PyTorch may have their own."""
    found = importlib.metadata.distributions()
    versions = {d.metadata["Name"]: d.version for d in found}
    kinds = ("jax-cuda", "nvidia-cudnn", "nvidia-cublas", "nvidia-cuda-runtime")
    return {k: v for k, v in sorted(versions.items()) if k and k.startswith(kinds)}


def clocks() -> dict:
    """As they are now: of the CPU in MHz, and of the first NVIDIA GPU as nvidia-smi tells them."""
    mhz = {"cpu_mhz": [float(x) for x in re.findall(r"cpu MHz\s*: ([\d.]+)", _cpuinfo())]}
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    told = _output("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader").splitlines()
    return mhz | (dict(zip(asked.split(","), told[0].split(", "), strict=False)) if told else {})


def _cpuinfo():
    return open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""


def _output(*command):
    """What a command says; nothing where it is not installed or fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode else done.stdout.strip()
