"""Where the time of a step on a GPU goes, by the kernels of a trace.

    python -m benchmarks.trace --steps 5 WORKDIR/profile
    python -m benchmarks.trace --steps 2 --out FILE.json "BEiT-B/16, training=DIRECTORY" ...

A trace is what `--config.profile_steps=10:15` leaves in the workdir. Times are sums over kernels,
also of those beside each other; "idle" is time without any, from the first to the last.
"""

import argparse
import collections
import pathlib
import re
import shlex
import sys

import jax

from beit_jax import command
from beit_jax.fileio import write_json

KINDS = {  # of kernels, by the first of these that is found in their names
    "attention": r"^(forward|shifting|backward|query)_kernel|^sum_o(ver|f)_|fmha|sdpa",
    "norms": r"^norm(_gradient)?$",
    "GELU": r"^gelu_",
    "convolutions": r"fprop|dgrad|wgrad|conv2d",
    "matmuls": r"gemm|nvjet|cutlass|cublas",
    "reductions": r"reduce",
    "copies": r"(?i)memcpy|memset|nccl",
}


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name; "other" besides those of `KINDS`."""
    return next((kind for kind, name in KINDS.items() if re.search(name, kernel)), "other")


def summarize(profile: jax.profiler.ProfileData, steps: int) -> dict:
    """Milliseconds of a step and numbers of kernels: "ms", "idle_ms", "kinds" and "kernels", the
    longest first, each {name: {"ms", "count"}}; and on what, "device" and "jax".

    Raises:
      ValueError: the trace has no kernels of a GPU.
    """
    planes = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    events = [e for plane in planes[:1] for line in plane.lines for e in line.events]
    if not events:
        found = ", ".join(plane.name for plane in profile.planes) or "nothing"
        raise ValueError(f"no kernels of a GPU in the trace, which has {found}")
    time, count = collections.Counter(), collections.Counter()
    for event in events:
        name = re.sub(r"_\d+$", "", event.name)
        for part in (("kinds", kind_of(name)), ("kernels", name)):
            time[part] += event.duration_ns / steps / 1e6
            count[part] += 1 / steps
    start = end = min(event.start_ns for event in events)
    idle = 0
    for event in sorted(events, key=lambda event: event.start_ns):
        idle += max(event.start_ns - end, 0)
        end = max(end, event.start_ns + event.duration_ns)
    told = {name: value for plane in profile.planes for name, value in plane.stats if name}
    result = {"device": told.get("gpu_device_name"), "jax": told.get("jax_version")}
    result |= {"ms": (end - start) / steps / 1e6, "idle_ms": idle / steps / 1e6}
    for part in ("kinds", "kernels"):
        names = [name for (which, name), _ in time.most_common() if which == part]
        result[part] = {n: {"ms": time[part, n], "count": count[part, n]} for n in names}
    return result


def table(found: dict[str, dict], part: str, rows: int | None = None) -> str:
    """Shares of the time of each trace, in Markdown: of `part`, "kinds" or "kernels"."""
    total = collections.Counter()
    for trace in found.values():
        total.update({name: x["ms"] / trace["ms"] for name, x in trace[part].items()})
    lines = [f"| | {' | '.join(found)} |", "|---|" + "---:|" * len(found)]
    lines.append(
        "| " + " | ".join(["ms", *(f"{trace['ms']:.1f}" for trace in found.values())]) + " |"
    )
    for name, _ in total.most_common(rows):
        cells = [trace[part].get(name) for trace in found.values()]
        shares = [
            f"{cell['ms'] / trace['ms']:.1%} ({cell['count']:,.4g})" if cell else "–"
            for cell, trace in zip(cells, found.values(), strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    idle = [f"{trace['idle_ms'] / trace['ms']:.1%}" for trace in found.values()]
    return "\n".join([*lines, f"| idle | {' | '.join(idle)} |"])


def main():
    """Prints two tables, and writes JSON where a file is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", help="DIRECTORY, or NAME=DIRECTORY")
    parser.add_argument(
        "--steps", type=command.positive, required=True, help="that each trace is of"
    )
    parser.add_argument("--note", help="what else is to be known of them, such as the commit")
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    found = {}
    for given in args.traces:
        name, directory = "", given
        if not pathlib.Path(given).exists():
            name, _, directory = given.rpartition("=")
        if (name or directory) in found:
            parser.error(f"two traces are named {name or directory}")
        paths = sorted(pathlib.Path(directory).rglob("*.xplane.pb"))
        if not paths:
            parser.error(f"{directory} has no trace (*.xplane.pb)")
        profile = jax.profiler.ProfileData.from_file(str(paths[-1]))
        try:
            found[name or directory] = summarize(profile, args.steps)
        except ValueError as error:
            parser.error(f"{directory}: {error}")
    print(table(found, "kinds"), table(found, "kernels", 20), sep="\n\n")
    if args.out:
        line = shlex.join(["python", "-m", "benchmarks.trace", *sys.argv[1:]])
        write_json(args.out, {"command": line, "note": args.note, "traces": found})


if __name__ == "__main__":
    main()
