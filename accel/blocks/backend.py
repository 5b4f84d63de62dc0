"""Which implementation runs: the rule behind `impl` and `interpret` of every accel function."""

import importlib.util
import inspect
import re

import jax

IMPLS = ("auto", "xla", "hopper", "triton", "tpu")
NEEDS = {"hopper": "gpu", "triton": "gpu", "tpu": "tpu"}


def choose_impl(impl, *, interpret=False, auto=(), obstacles=None):
    """The implementation to run: `impl` itself, or for "auto" the first of `auto` that can, else "xla".

    Args: interpret: kernels run in Pallas's interpreter, on any device, if asked for by name.
      auto: kernels that pay, best first. obstacles: {impl: why it cannot run this call, or None}.
    Raises: ValueError for an unknown impl; NotImplementedError, saying why, for one asked for by name that
      cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f'impl must be "auto", "xla", "hopper", "triton" or "tpu", got {impl!r}')
    obstacles = obstacles or {}
    backend = platform()
    if impl == "auto":
        runs = [i for i in auto if NEEDS[i] == backend and obstacles.get(i) is None]
        return runs[0] if runs else "xla"
    if why := obstacles.get(impl):
        raise NotImplementedError(f'impl="{impl}" {why}')
    if impl in NEEDS and NEEDS[impl] != backend and not interpret:
        raise NotImplementedError(f'impl="{impl}" needs a {NEEDS[impl].upper()}, and JAX runs on {backend}')
    return impl


def platform():
    """What JAX runs on where nothing else is said: "cpu", "gpu" or "tpu"; `jax.default_device` counts.

    Arrays that were put on another device, or a mesh of others, do not: name `impl` for these.
    """
    device = jax.config.jax_default_device
    return jax.default_backend() if device is None else getattr(device, "platform", device)


def hopper_obstacle():
    """Why kernels in Mosaic GPU for Hopper cannot run on JAX's device, or None; None too without a GPU."""
    if platform() != "gpu":
        return None
    device = jax.devices("gpu")[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), and this one has {capability}"
    if importlib.util.find_spec("jax.experimental.mosaic.gpu") is None:
        return "needs Mosaic GPU, which this JAX does not have"
    from jax.experimental.pallas import mosaic_gpu

    if "out_type" not in inspect.signature(mosaic_gpu.kernel).parameters:
        return "needs JAX 0.10.2"
    found = re.search(r"cuda (\d+)", device.client.platform_version)
    if found and 12080 <= int(found[1]) < 12091:  # JAX's own kernels refuse these too
        return "needs CUDA before 12.8 or from 12.9.1 on: between them ptxas miscompiles causal masks"
    return None
