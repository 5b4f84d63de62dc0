"""Kernels compiled down to a device's own language, on a machine that has no such device."""

import jax
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

CALLS = {"tpu": "tpu_custom_call", "cuda": "triton"}
HOPPER = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def lowered(fn, args, platform):
    """The module text of fn(*args) for "tpu" or "cuda"; asserts that a kernel of that device is in it.

    JAX from 0.12 on wants to know which GPU Triton is to write for: a Hopper card.
    """
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    mesh = AbstractMesh((1,), ("x",), abstract_device=HOPPER if platform == "cuda" else None)
    with use_abstract_mesh(mesh):
        text = export.export(jax.jit(fn), platforms=[platform], disabled_checks=checks)(*args).mlir_module()
    assert CALLS[platform] in text
    return text
