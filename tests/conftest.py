"""Shared settings of the suite: hypothesis profiles, strict JAX types, the time budget of each technique."""

import gc
import os
import statistics
import time
from collections import defaultdict, deque
from pathlib import Path

# The suite compares values and compiles thousands of small programs: without LLVM's optimisations each takes
# half the time, and without XLA's newer emitters of fusions a third less again. Read when JAX is imported;
# on a machine with a GPU the defaults stay. What is sharded is tested on a CPU of eight devices.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
if not Path("/dev/nvidia0").exists():
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    emitters = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ["XLA_FLAGS"] = f"{quick} {emitters} {os.environ['XLA_FLAGS']}"

import jax
import pytest
from hypothesis import HealthCheck, settings

from accel.blocks.backend import hopper_obstacle
from ref.catalog import BY_SLUG

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# plain functions, but their asserts should explain themselves
for laws in Path(__file__).parent.rglob("laws_*.py"):
    pytest.register_assert_rewrite(
        ".".join(laws.relative_to(Path(__file__).parent.parent).with_suffix("").parts)
    )

ROOT = Path(__file__).resolve().parent.parent
SHARED = (
    "tests/blocks/",
    "tests/models/",
    "tests/tasks/",
    "tests/docs/",
    "tests/test_bench.py",
    "tests/test_sharding.py",
)
# Seconds a technique may take in the suite, generic laws included, on two cores with nothing compiled before.
# One in three layers compiles some forty programs of a third of a second each; one with kernels for Hopper
# lowers and compiles some ten more.
BUDGET_S = {"ref": 8.0, "accel": 25.0, "hopper": 29.0}
# What _pace runs takes so long in a good hour of the machines that the budgets were set on. In other hours
# the same tests took up to 1.5 times as long: what a slow machine loses is not theirs.
GOOD_HOUR_S = 0.0054

quiet = [HealthCheck.too_slow, HealthCheck.differing_executors]  # shared laws run under two collectors
settings.register_profile("fast", max_examples=10, deadline=None, suppress_health_check=quiet)
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=quiet)
settings.register_profile("deep", max_examples=500, deadline=None, suppress_health_check=quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "fast"))

_LEFT_OUT = pytest.StashKey[str]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Deselect tests marked hopper where JAX's GPU is not one; without any GPU they are run, and fail."""
    marked = [item for item in items if item.get_closest_marker("hopper")]
    if marked and (why := hopper_obstacle()):
        items[:] = [item for item in items if item not in marked]
        config.hook.pytest_deselected(items=marked)
        config.stash[_LEFT_OUT] = f'{len(marked)} tests of kernels for Hopper left out: impl="hopper" {why}'


def pytest_collection_finish(session):
    """What collection made lives to the end: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


_spent = defaultdict(float)
_paces = deque(maxlen=9)


def _pace():
    """How many times slower the machine is than in a good hour, at least 1: the mean of nine looks."""
    start = time.perf_counter()
    sum(len(str(i)) for i in range(60_000))  # no objects that the garbage collector counts
    _paces.append(time.perf_counter() - start)
    return max(1.0, statistics.mean(_paces) / GOOD_HOUR_S)


def _slug_of(name):
    """The technique that a test's name names first, the longest there, so that flash pays neither for
    block_sparse_flash nor for lean's flash_decoding_attention; None if it names none.
    """
    return min((s for s in BY_SLUG if s in name), key=lambda s: (name.index(s), -len(s)), default=None)


def _over_budget():
    def layer(t):
        if (ROOT / "accel" / "kernels" / f"{t.slug}_hopper.py").exists():
            return "hopper"
        return "accel" if (ROOT / "accel" / t.part / f"{t.slug}.py").exists() else "ref"

    return {slug for slug, seconds in _spent.items() if seconds > BUDGET_S[layer(BY_SLUG[slug])]}


def pytest_runtest_logreport(report):
    """Add each test's time, in seconds of a good hour, to the technique that its name carries.

    Model and GPU tests are outside the budget, and so are those of shared ground, which nobody owns alone:
    blocks, models and tasks, the book, the races of the command line, use over several devices.
    """
    if {"model", "gpu"} & set(report.keywords) or report.nodeid.startswith(SHARED):
        return
    if slug := _slug_of(report.nodeid.split("::", 1)[-1]):
        slower = _pace() if report.duration > 0.1 else 1.0  # the many short ones are not worth a look
        _spent[slug] += report.duration / slower


def pytest_terminal_summary(terminalreporter):
    """Print what was left out, the dearest techniques, and those over budget."""
    if why := terminalreporter.config.stash.get(_LEFT_OUT, None):
        terminalreporter.write_line(why)
    terminalreporter.write_line("the dearest techniques, in seconds of a good hour of the machine")
    for slug, seconds in sorted(_spent.items(), key=lambda kv: -kv[1])[:5]:
        flag = "  OVER BUDGET" if slug in _over_budget() else ""
        terminalreporter.write_line(f"{seconds:6.1f} s  {slug}{flag}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """Fail the run in CI when a technique spent more than its budget."""
    if _over_budget() and exitstatus == 0 and os.environ.get("TRIPTYCH_BUDGET"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
