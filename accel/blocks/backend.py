"""Which implementation runs: the rule behind `impl` and `interpret` of every accel function."""

import importlib.util
import inspect
import re

import jax

IMPLS = ("auto", "xla", "hopper", "triton", "tpu")
NEEDS = {"hopper": "gpu", "triton": "gpu", "tpu": "tpu"}


def choose_impl(impl, *, arrays=(), interpret=False, auto=(), obstacles=None, name="impl"):
    """The implementation to run: `impl` itself, or for "auto" the first of `auto` that can, else "xla".

    Args: arrays: a tree of what the call is given; it runs where these were put, see `home`.
      interpret: kernels run in Pallas's interpreter, on any device, if asked for by name.
      auto: kernels that pay, best first. obstacles: {impl: why it cannot run this call, or None}.
      name: what the caller's argument is called, for messages.
    Raises: ValueError for an unknown impl; NotImplementedError, saying why, for one asked for by name that
      cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f'{name} must be "auto", "xla", "hopper", "triton" or "tpu", got {impl!r}')
    obstacles = obstacles or {}
    device = home(arrays)
    backend = platform() if device is None else device.platform
    if impl == "auto":
        runs = [i for i in auto if NEEDS[i] == backend and obstacles.get(i) is None]
        return runs[0] if runs else "xla"
    if why := obstacles.get(impl):
        raise NotImplementedError(f'impl="{impl}" {why}'.replace("impl=", f"{name}="))
    if impl in NEEDS and NEEDS[impl] != backend and not interpret:
        where = f"JAX runs on {backend}" if device is None else f"its arrays were put on a {backend.upper()}"
        raise NotImplementedError(f'{name}="{impl}" needs a {NEEDS[impl].upper()}, and {where}')
    return impl


def home(arrays):
    """The device that a tree of arrays was put on, or one of several; None where nothing says so.

    Arrays under `jit` do not tell, nor do those that were never put anywhere: they follow `platform`.
    """
    for x in jax.tree.leaves(arrays):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed:
            return next(iter(x.devices()))
    return None


def platform():
    """What JAX runs on where nothing else is said: "cpu", "gpu" or "tpu"; `jax.default_device` counts.

    Under `jit`, arrays that were put on another device, or a mesh of others, do not: name `impl` for these.
    """
    device = jax.config.jax_default_device
    return jax.default_backend() if device is None else getattr(device, "platform", device)


def hopper_obstacle(arrays=()):
    """Why kernels in Mosaic GPU for Hopper cannot run on the arrays' device, or JAX's; None, too, if that is
    no GPU.
    """
    device = home(arrays)
    if (platform() if device is None else device.platform) != "gpu":
        return None
    device = device or jax.devices("gpu")[0]
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
