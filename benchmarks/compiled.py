"""What XLA makes of our steps for an NVIDIA H200, on a machine that need not have one.

    pip install "jax[cuda13]"
    python -m benchmarks.compiled

The compiler is given the description of the GPU, compiles the very step that `benchmarks` times,
and tells the memory that it needs; its kernels are counted, and the bytes that each has to read
and write. Nothing is run, so no figure is a speed. As no kernel can be timed, products are
cuBLAS's. `at_most` is an estimate, of products at the rate below and other kernels at the bandwidth
of the memory, one after the other: good for comparing options, but not for batches so small that
the cache holds what they read. The workspace of cuDNN's kernels is not in the memory.
"""

import argparse
import collections
import os
import re
import shlex
import sys
import tempfile
import unittest.mock

import jax
import numpy as np
from jax.experimental import topologies

from beit_jax import build, sharding
from beit_jax.fileio import write_json
from beit_jax.models import kernels
from benchmarks import ours, peers
from benchmarks.sizes import SIZES, flops, title
from benchmarks.timing import RESULTS, machine

FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
PRODUCTS, BANDWIDTH = 790e12, 4.3e12  # FLOP/s and bytes/s that good kernels reach on an H200
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
ROWS = [  # size, kind, batch of a GPU, options: of config.model, and the number of GPUs
    ("BEiT-B/16 @224", "training", 256, {}),
    ("BEiT-B/16 @224", "training", 256, {"fold": False}),
    ("BEiT-B/16 @224", "training", 256, {"attention": "cudnn"}),
    ("BEiT-B/16 @224", "training", 256, {"attention": "xla"}),
    ("BEiT-B/16 @224", "training", 256, {"remat": "dots"}),
    ("BEiT-B/16 @224", "training", 256, {"remat": "full"}),
    ("BEiT-B/16 @224", "training", 256, {"gpus": 8}),
    ("BEiT-B/16 @224", "training", 256, {"concurrent": True}),
    ("BEiT-B/16 @224", "mim, tokenizer", 128, {}),
    ("BEiT-B/16 @224", "inference", 512, {}),
    ("BEiT-B/16 @224", "inference", 1, {}),
    ("BEiT-L/16 @224", "training", 256, {}),
    ("BEiT-L/16 @384", "training", 64, {}),
    ("BEiT-L/16 @384", "training", 64, {"attention": "xla"}),
    ("BEiT-L/16 @384", "training", 2, {}),
    ("BEiT-L/16 @384", "lora", 2, {}),
    ("BEiT-L/16 @384", "lora", 2, {"concurrent": True}),
    ("BEiT-L/16 @384", "inference", 64, {}),
    ("BEiT-L/16 @512", "training", 32, {}),
    ("ViT-8M/4 @32", "training", 1024, {}),
    ("ViT-8M/4 @32", "training", 1024, {"attention": "xla"}),
]
_SCHEDULING = "xla_gpu_command_buffer_scheduling_mode"  # one after the other by default
_BYTES = {"pred": 1, "bf16": 2, "f16": 2} | {f"{t}{b}": b // 8 for t in "fsu" for b in (8, 32, 64)}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"}


def traffic(program: str) -> dict[str, collections.Counter]:
    """Counts "kernels" and "bytes" of an optimized HLO program, each by what the kernel is:
    "product", "attention", "convolution" or "other". Loops count once."""
    entry = program[program.index("\nENTRY ") :]
    shapes, found = {}, {"kernels": collections.Counter(), "bytes": collections.Counter()}
    for name, shape, operation, rest in filter(None, map(_match, entry.splitlines())):
        shapes[name] = shape
        if operation in _FREE:
            continue
        operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
        target = re.search(r'custom_call_target="([^"]+)"', rest)
        kind = _kind(target[1] if target else "")
        found["kernels"][kind] += 1
        found["bytes"][kind] += sum(map(_size, [shape, *(shapes[x] for x in set(operands))]))
    return found


def _match(line):
    match = _INSTRUCTION.match(line)
    return match and match.groups()


def _kind(target):
    names = {"cublas": "product", "fmha": "attention", "conv": "convolution"}
    return next((kind for part, kind in names.items() if part in target), "other")


def _size(shape):
    """Bytes of an array, or of all of a tuple, such as "(bf16[2,3]{1,0}, f32[])"."""
    return sum(
        _BYTES[kind] * int(np.prod([int(n) for n in sides.split(",") if n]))
        for kind, sides in _ARRAY.findall(shape)
    )


def make_mesh(gpus: int) -> jax.sharding.Mesh:
    """GPUs of one machine, as `sharding.make_mesh` makes it of those that are there."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology=f"1x1x{gpus}"
    )
    return topologies.make_mesh(topology, (gpus,), ("data",))


def compile_for(size, kind, batch, options):
    """The compiled step of a row, as one GPU runs it."""
    architecture = SIZES["gpu"][size].architecture
    side = architecture["image_size"]
    runtime = {"attention": "pallas", "remat": "none"} | options
    dtype = runtime.pop("dtype", "bfloat16")
    mesh = make_mesh(runtime.pop("gpus", 1))
    flags = {_SCHEDULING: "CONCURRENT"} if runtime.pop("concurrent", False) else {}
    batch *= mesh.size
    image = np.zeros((batch, side, side, 3), np.uint8)
    target = peers.make_target(kind, architecture, batch)
    with tempfile.TemporaryDirectory() as directory:
        peers.transformers_model(architecture, kind).save_pretrained(directory)
        program = ours.make_program(kind, directory, dtype, image, target, runtime)

    def describe(tree, place):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                np.shape(x), jax.dtypes.canonicalize_dtype(x.dtype), sharding=place
            ),
            tree,
        )

    *held, images = program.args
    args = (*describe(held, sharding.replicated(mesh)), describe(images, sharding.split(mesh)))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells Pallas of the GPU
        lowered = program.function.trace(*args).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options=flags)


def row(size, kind, batch, options) -> dict:
    """What one step needs, of each GPU."""
    compiled = compile_for(size, kind, batch, options)
    found, architecture = traffic(compiled.as_text()), SIZES["gpu"][size].architecture
    operations = flops(architecture, kind) * batch
    if options.get("remat") == "full":
        operations += flops(architecture, "inference") * batch
    moved = sum(n for kind, n in found["bytes"].items() if kind != "product")
    return {
        "model": size,
        "kind": kind,
        "batch": batch,
        "options": options,
        "kernels": found["kernels"].total(),
        "memory_bytes": build.memory_of(compiled),
        "flops": operations,
        "bytes": dict(found["bytes"]),
        "at_most": batch / (operations / PRODUCTS + moved / BANDWIDTH),
    }


def table(rows: list[dict]) -> str:
    """The table of docs/step.md, in Markdown."""
    lines = [
        "| | batch | kernels | memory, GB | other traffic, MB/image | images/s, estimate |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        what = ", ".join([title(r), *map(_option, r["options"].items())])
        moved = sum(n for kind, n in r["bytes"].items() if kind != "product") / r["batch"] / 1e6
        memory, bound = r["memory_bytes"] / 1e9, r["at_most"]
        lines.append(
            f"| {what} | {r['batch']} | {r['kernels']:,} | {memory:.2f} | {moved:,.0f} "
            f"| {bound:,.0f} |"
        )
    return "\n".join(lines)


def _option(item):
    name, value = item
    names = {
        "fold": "not folded",
        "dtype": value,
        "gpus": f"each of {value} GPUs",
        "concurrent": "kernels side by side",
    }
    return names.get(name, f"{name} {value}")


def main():
    """Compiles all rows, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=os.path.join(RESULTS, "compiled_h200.json"))
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = FLAGS
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # which ask the driver
    rows = []
    patch = unittest.mock.patch.object
    with patch(jax, "default_backend", lambda: "gpu"), patch(kernels, "try_out", lambda *_: True):
        for settings in ROWS:
            rows.append(row(*settings))
            print(table(rows).splitlines()[-1], flush=True)
    content = {
        "command": shlex.join(["python", "-m", "benchmarks.compiled", *sys.argv[1:]]),
        "machine": machine() | {"device": "NVIDIA H200, described"},
        "flags": FLAGS,
        "product_flops_per_second": PRODUCTS,
        "bytes_per_second": BANDWIDTH,
        "rows": rows,
    }
    write_json(args.out, content)
    print(table(rows))


if __name__ == "__main__":
    main()
