"""Kernels compiled down to a device's own language, on a machine that has no such device."""

import jax
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

CALLS = {"tpu": "tpu_custom_call", "cuda": "triton", "hopper": "mosaic_gpu"}
HOPPER = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def lowered(fn, args, platform):
    """The module text of fn(*args) for "tpu", "cuda" (Triton) or "hopper"; asserts that it has a kernel.

    JAX from 0.12 on wants to know which GPU Triton is to write for: a Hopper card.
    """
    checks = [export.DisabledSafetyCheck.custom_call(f) for f in ("__gpu$xla.gpu.triton", "mosaic_gpu_v2")]
    device = None if platform == "tpu" else HOPPER
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    name = "tpu" if platform == "tpu" else "cuda"
    with use_abstract_mesh(mesh):
        text = export.export(jax.jit(fn), platforms=[name], disabled_checks=checks)(*args).mlir_module()
    assert CALLS[platform] in text
    return text
