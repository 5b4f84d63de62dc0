"""Which implementation a call runs: by name, by device, and by where its arrays are."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from accel.blocks import backend
from accel.blocks.backend import choose_impl, home

CPU = jax.devices("cpu")
FIRST = partial(choose_impl, "auto", auto=("hopper", "triton", "tpu"))


@pytest.fixture
def as_on(monkeypatch):
    """As if JAX ran on another device."""
    return lambda name: monkeypatch.setattr(backend, "platform", lambda: name)


def test_auto_is_the_first_kernel_of_the_device_without_an_obstacle(as_on):
    as_on("gpu")
    assert FIRST() == "hopper"
    assert FIRST(obstacles={"hopper": "is too narrow"}) == "triton"
    assert choose_impl("auto", auto=("tpu",)) == choose_impl("auto") == "xla"
    as_on("tpu")
    assert FIRST() == "tpu"
    as_on("cpu")
    assert FIRST() == "xla"


def test_auto_looks_where_arrays_were_put(as_on):
    """An array that was put on a CPU stays there, whatever else the machine has; others follow JAX."""
    as_on("gpu")
    x = jnp.ones(3)
    there = jax.device_put(x, CPU[0])
    assert home((x, None, 2)) is None
    assert home({"x": x, "y": there}) == CPU[0]
    assert FIRST(arrays=(x, None)) == "hopper"
    assert FIRST(arrays=(x, there)) == "xla"
    found = []
    jax.jit(lambda y: found.append(FIRST(arrays=y)) or y)(there)
    assert found == ["hopper"]  # traced arrays do not tell
    with pytest.raises(
        NotImplementedError, match=r'impl="triton" needs a GPU, and its arrays were put on a CPU'
    ):
        choose_impl("triton", arrays=there)
    assert choose_impl("triton", arrays=there, interpret=True) == "triton"


def test_auto_looks_at_arrays_over_several_devices():
    mesh = jax.make_mesh((2,), ("x",), devices=CPU[:2])
    cut = jax.device_put(jnp.ones(4), jax.sharding.NamedSharding(mesh, jax.P("x")))
    assert home(cut) in CPU[:2]
    assert backend.hopper_obstacle(cut) is None  # no GPU: nothing to say


def test_impl_that_cannot_run_is_named_as_its_caller_names_it(as_on):
    as_on("cpu")
    with pytest.raises(NotImplementedError, match='impl="triton" needs a GPU, and JAX runs on cpu'):
        choose_impl("triton")
    call = partial(choose_impl, name="implementation")
    with pytest.raises(ValueError, match=r'implementation must be "auto", "xla", .*, got 3'):
        call(3)
    why = {"hopper": 'has no masks; use impl="triton"'}
    with pytest.raises(
        NotImplementedError, match=r'^implementation="hopper" has .* use implementation="triton"'
    ):
        call("hopper", obstacles=why)
    with pytest.raises(NotImplementedError, match=r'^implementation="tpu" needs a TPU'):
        call("tpu")


@pytest.mark.gpu
def test_auto_runs_on_the_cpu_of_a_machine_with_a_gpu():
    x = jax.device_put(jnp.ones(3), CPU[0])
    assert FIRST(arrays=x) == "xla"
    assert FIRST(arrays=jax.device_put(x, jax.devices("gpu")[0])) == FIRST(arrays=jnp.ones(3)) == "hopper"
