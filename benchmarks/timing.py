"""How anything here is timed: in turns, after warming up, beside a description of the machine."""

import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import time

import jax

SEED = 0
RESULTS = os.path.join(os.path.dirname(__file__), "results")


def measure(contenders: dict, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per step of each contender in each block, in turns, forth and back.

    A block has as many steps as fill about `seconds`, at least one.
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
            start = time.perf_counter()
            contenders[name](steps[name])
            times[name].append((time.perf_counter() - start) / steps[name])
    return times


class Contender:
    """A step in a process of its own, so that no allocator and no thread is shared; run(n)."""

    def __init__(self, make, *args):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args))
        self._process.start()
        theirs.close()
        try:
            self.facts = self._receive()
        except RuntimeError:
            self.close()
            raise

    def __call__(self, n: int):
        self._pipe.send(n)
        return self._receive()

    def _receive(self):
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process died, perhaps for want of memory") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self):
        """Ends the process."""
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def _serve(pipe, make, args):
    """The process: makes a step, tells of it, and does as many as it is told."""
    try:
        start = time.perf_counter()
        run, memory = make(*args)
        facts = {"loss": run(1), "first_step": time.perf_counter() - start}
        run(1)
        pipe.send({**facts, "memory": memory()})
        while True:
            pipe.send(run(pipe.recv()))
    except EOFError:
        return
    except Exception as error:  # no memory, no compiler, no library: the table has a gap
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")


def machine() -> dict:
    """The commit, hardware with its clocks as they are now, and versions."""
    about = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
    cpu = re.search(r"model name\s*: (.*)", about)
    names = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "timm", "peft", "numpy")
    found = [name for name in (*names, "tensorflow") if importlib.util.find_spec(name)]
    return {
        "commit": _output("git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"),
        "cpu": cpu[1].strip() if cpu else platform.processor(),
        "cpu_mhz": [float(x) for x in re.findall(r"cpu MHz\s*: ([\d.]+)", about)],
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        **_gpu(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in found},
    }


def _gpu():
    """Driver and clocks of the first NVIDIA GPU, as nvidia-smi tells them."""
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    told = _output("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader").splitlines()
    return dict(zip(asked.split(","), told[0].split(", "), strict=False)) if told else {}


def _output(*command):
    """What a command says; nothing where it is not installed or fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode else done.stdout.strip()
