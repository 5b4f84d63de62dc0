"""The example of several hosts: two processes on the loopback train as one process does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from tests.docs import hosts

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2
# Losses near 5 of 512 bytes, float32: sums of 512 terms in another order, then a step that amplify that.
ATOL = 5 * 512 * 2.0**-24


def test_hosts_two_processes_train_as_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    saved = tmp_path / "params.npz"
    command = [
        sys.executable, "-m", "tests.docs.hosts", "--steps", str(STEPS), "--save", str(saved),
        "--coordinator", f"127.0.0.1:{port}", "--processes", "2",
    ]  # fmt: skip
    # XLA's passes for speed would take longer than the training
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    runs = [
        subprocess.Popen(
            [*command, "--process", str(i)], cwd=ROOT, env=env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    mesh = hosts.mesh_of(jax.devices("cpu")[:4], 2)
    params, want = hosts.train(mesh, steps=STEPS)  # meanwhile, in this process
    for i, run in enumerate(runs):
        out, err = run.communicate(timeout=150)
        assert run.returncode == 0, err[-2000:]
        assert f"process {i} of 2, mesh {{'data': 2, 'context': 2}}" in out
        got = next(line for line in out.splitlines() if line.startswith("losses ")).split()[1:]
        np.testing.assert_allclose(np.array(got, float), want, rtol=0, atol=ATOL)
    assert want[-1] < want[0] - 0.1  # it learns which bytes are frequent
    with np.load(saved) as found:
        assert len(found) == len(jax.tree.leaves(params))
        np.testing.assert_allclose(found[".wte"], params.wte, rtol=0, atol=ATOL)


def test_hosts_data_does_not_depend_on_the_devices():
    """Any mesh reads the same rows; put back in order, a text and the same text one byte on."""
    one, four = (hosts.batch(hosts.mesh_of(jax.devices("cpu")[:n], n), 7, 3, 16) for n in (1, 4))
    natural = lambda ids, positions: np.take_along_axis(
        np.asarray(ids), np.argsort(positions, axis=1), axis=1
    )
    for a, b in zip(one, four, strict=True):
        np.testing.assert_array_equal(natural(a, one[2]), natural(b, four[2]))
    ids, following = (natural(x, four[2]) for x in four[:2])
    np.testing.assert_array_equal(ids[:, 1:], following[:, :-1])
