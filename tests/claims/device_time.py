"""Time on a GPU itself, kernel by kernel, from JAX's profiler: what a call costs where the host is fast."""

import tempfile
from collections import defaultdict
from pathlib import Path

import jax

__all__ = ["kernel_seconds"]


def kernel_seconds(call, *, repeats=10):
    """{kernel: seconds a call} of call(), run once before; RuntimeError where no kernel is recorded."""
    jax.block_until_ready(call())
    took = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                result = call()
            jax.block_until_ready(result)
        (path,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if plane.name.startswith("/device:GPU"):
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            took[event.name] += event.duration_ns * 1e-9 / repeats
    if not took:
        raise RuntimeError("the profiler recorded no kernel")
    return dict(took)
