"""A trace of some steps, to see where their time goes."""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator

import jax


@contextlib.contextmanager
def at_steps(
    steps: str, workdir: str, start_step: int, total_steps: int
) -> Iterator[dict[int, Callable[[], None]]]:
    """Yields what to call before which step, once the device has done those before, so that
    `workdir/profile` gets a trace; one that still goes on at the end, because the run was stopped,
    is written then.

    Args:
      steps: "10:15" traces the steps 11 to 15; "" none. The first ones compile and warm up.
      workdir: of the run. TensorBoard's profiler (xprof) and ui.perfetto.dev show what it gets.
      start_step: from which the run goes on; steps that are done already are not traced.
      total_steps: of the run.

    Raises:
      ValueError: that is no range of steps of the run.
    """
    if not steps:
        yield {}
        return
    match = re.fullmatch(r"(\d+):(\d+)", steps)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 0 < first < last < total_steps:
        raise ValueError(
            f"config.profile_steps is {steps!r}; expected FIRST:LAST, such as 10:15, with 0 < "
            f"FIRST < LAST < {total_steps}, the steps of the run."
        )
    if first < start_step:
        logging.warning("Nothing is traced: the run resumes at step %d.", start_step)
        yield {}
        return
    trace = contextlib.ExitStack()

    def start():
        directory = os.path.join(workdir, "profile")
        trace.enter_context(jax.profiler.trace(directory, create_perfetto_trace=True))

    with trace:
        yield {first: start, last: trace.close}
