"""The rotational unit of memory in JAX: a scan over time; ref/memory/rum.py defines it.

With lambda_ = 1 the backward pass keeps hidden and the last memory alone, and recovers earlier memories by
turning back: O(N^2 + T N) numbers instead of O(T N^2). It may be differentiated once, in reverse; with
lambda_ = 0 in both modes and any number of times. On degenerate planes gradients are 0, as in ref.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from accel.blocks.backend import choose_impl
from accel.blocks.shapes import alike
from accel.kernels.rum_step import Step
from ref.dims import dims
from ref.memory.rum import (
    BAND,
    EPS,
    Plane,
    RumParams,
    check_cell,
    check_rotation,
    check_steps,
    copying_task,
    example,
    init_rum,
    recall_task,
    rum_flops,
    rum_params,
    story_task,
)

__all__ = [
    "Plane",
    "RumParams",
    "copying_task",
    "example",
    "init_rum",
    "recall_task",
    "rotate",
    "rotate_vjp",
    "rotation_matrix",
    "rum",
    "rum_cell",
    "rum_flops",
    "rum_params",
    "rum_vjp",
    "story_task",
]

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "softsign": jax.nn.soft_sign}
LARGEST = {"triton": 128, "tpu": 512}  # N whose memory a kernel keeps on the chip: in registers, in VMEM
PAYS = ("triton",)  # measured on an H200: docs/notes/gpu.md
STATIC = ("lambda_", "eta", "activation", "update_gate")


@partial(jax.jit, static_argnames="eps")
def rotate(a, b, v, *, eps=EPS):
    """R(a, b) v: v turned in the plane of a and b by the angle from a to b. a, b, v [..., N]."""
    check_rotation(eps, a=a, b=b, v=v)
    return _turn(_plane(a, b, eps), v)


@partial(jax.jit, static_argnames="eps")
def rotation_matrix(a, b, *, eps=EPS):
    """R(a, b) [..., N, N]; see `rotate`."""
    check_rotation(eps, a=a, b=b)
    N = a.shape[-1]
    return _turn_rows(_plane(a, b, eps), jnp.broadcast_to(jnp.eye(N, dtype=a.dtype), (*a.shape, N)))


@partial(jax.jit, static_argnames="eps")
def rotate_vjp(a, b, v, dout, *, eps=EPS):
    """(da, db, dv) of `rotate`."""
    check_rotation(eps, a=a, b=b, v=v, dout=dout)
    return jax.vjp(partial(rotate, eps=eps), a, b, v)[1](dout)


@partial(jax.jit, static_argnames=(*STATIC, "eps"))
def rum_cell(
    x, h, assoc, params: RumParams, *, lambda_=0, eta=None, activation="relu", update_gate=True, eps=EPS
):
    """(h', A'): one step; see ref."""
    check_cell(x, h, assoc, params, lambda_, eta, activation, update_gate, eps)
    return _cell(x, h, assoc, params, lambda_, eta, activation, update_gate, eps)


def rum(
    x,
    params: RumParams,
    *,
    h0=None,
    assoc0=None,
    lambda_=0,
    eta=None,
    activation="relu",
    update_gate=True,
    return_assoc=False,
    impl="auto",
    interpret=False,
):
    """All steps of `rum_cell` over x [..., T, Nx] -> (hidden [..., T, N], h_last [..., N]); see ref.

    impl: "triton" and "tpu" run the steps of lambda_ = 1 in one kernel that keeps the memory on the chip, in
      float32; "auto" is "triton" where a GPU can run it, else "xla". interpret: kernels in Pallas's
      interpreter. The backward pass is the same for all.
    Raises: NotImplementedError, saying why, if an impl asked for by name cannot run.
    """
    kernel = _choose(x, params, h0, assoc0, lambda_, impl, interpret)
    options = lambda_, eta, activation, update_gate
    return _rum(x, params, h0, assoc0, options, return_assoc, kernel)


def _choose(x, params, h0, assoc0, lambda_, impl="auto", interpret=False):
    """(impl, interpret) of a call."""
    check_steps(x, params, lambda_)
    obstacles = _obstacles(lambda_, params.W_e.shape[-1], jnp.result_type(x))
    arrays = x, params, h0, assoc0
    return choose_impl(impl, arrays=arrays, interpret=interpret, auto=PAYS, obstacles=obstacles), interpret


@partial(jax.jit, static_argnums=(4, 5, 6))
def _rum(x, params, h0, assoc0, options, return_assoc, kernel):
    """`rum` by an implementation that is known."""
    lambda_ = options[0]
    lead, N, dtype = x.shape[:-2], params.W_e.shape[-1], jnp.result_type(x)
    h = jnp.zeros((*lead, N), dtype) if h0 is None else h0
    assoc = assoc0
    if lambda_ == 1 and assoc0 is None:
        assoc = jnp.broadcast_to(jnp.eye(N, dtype=dtype), (*lead, N, N))
    check_cell(x[..., 0, :], h, assoc, params, *options, EPS)
    h, assoc, params = alike((h, assoc, params), x, h, assoc, params)
    xs = jnp.moveaxis(x, -2, 0)
    if lambda_ == 0:
        hidden, h, assoc = _steps(options, xs, h, assoc, params)
    else:
        hidden, h, assoc = _steps_recovering(options, kernel, xs, h, assoc, params)
    hidden = jnp.moveaxis(hidden, 0, -2)
    return (hidden, h, assoc) if return_assoc else (hidden, h)


def rum_vjp(
    x,
    params: RumParams,
    cotangent,
    *,
    h0=None,
    assoc0=None,
    lambda_=0,
    eta=None,
    activation="relu",
    update_gate=True,
):
    """(dx, dparams) for the cotangent [..., T, N] of `hidden`."""
    kernel = _choose(x, params, h0, assoc0, lambda_)
    return _rum_vjp(x, params, cotangent, h0, assoc0, (lambda_, eta, activation, update_gate), kernel)


@partial(jax.jit, static_argnums=(5, 6))
def _rum_vjp(x, params, cotangent, h0, assoc0, options, kernel):
    run = lambda x, params: _rum(x, params, h0, assoc0, options, False, kernel)[0]
    hidden, pull = jax.vjp(run, x, params)
    dims(hidden=(hidden, "... T N"), cotangent=(cotangent, "... T N"))
    return pull(cotangent)


def _cell(x, h, assoc, params, lambda_, eta, activation, update_gate, eps):
    plane, g, e = _maps(x, h, params, update_gate, eps)
    if lambda_ == 0:
        z = _turn(plane, h)
    else:
        assoc = _turn_rows(plane, assoc)
        z = _times(assoc, h)
    c = ACTIVATIONS[activation](e + z)
    h = g * h + (1 - g) * c
    return _rescale(h, eta, eps), assoc


def _rescale(h, eta, eps):
    """The state with length eta; one without a direction passes no gradient on, as in ref."""
    if eta is None:
        return h
    length = _norm(h)
    whole = jnp.where(length > eps, length, 1)
    return jnp.where(length > eps, eta * h / whole, lax.stop_gradient(eta * h / eps))


def _steps(options, xs, h, assoc, params):
    """hidden [T, ...], the last h and memory, of inputs with time in front."""

    def step(state, x):
        h, assoc = _cell(x, *state, params, *options, EPS)
        return (h, assoc), h

    (h, assoc), hidden = lax.scan(step, (h, assoc), xs)
    return hidden, h, assoc


def _obstacles(lambda_, N, dtype):
    """{impl: why it cannot run}."""
    found = {"hopper": "does not exist: a step is one vector at a time, which tensor cores do not help"}
    for name, largest in LARGEST.items():
        if lambda_ != 1:
            found[name] = "keeps a memory: it runs lambda_=1 alone"
        elif dtype != jnp.float32:
            found[name] = f"computes in float32, got {dtype}"
        elif largest < N:
            found[name] = f"keeps states up to N={largest} on the chip, got N={N}"
    return found


def _steps_in_kernel(options, kernel, xs, h, assoc, params):
    """`_steps` of lambda_ = 1 in one kernel; what depends on x alone is computed before it."""
    impl, interpret = kernel
    _, eta, activation, update_gate = options
    module = importlib.import_module(f"accel.kernels.rum_{impl}")
    n_x, N = xs.shape[-1], h.shape[-1]
    affine = lambda w, b: jnp.moveaxis(_add(xs @ w[:n_x], b), 0, -2)  # [..., T, N]
    r, e = affine(params.W_r, params.b_r), affine(params.W_e, params.b_e)
    g, w_u = (affine(params.W_u, params.b_u), params.W_u[n_x:]) if update_gate else (e, params.W_r[n_x:])
    step = Step(eta, ACTIVATIONS[activation], update_gate, EPS, BAND)
    lead, flat = h.shape[:-1], lambda x, k: x.reshape(-1, *x.shape[-k:])
    operands = *(flat(x, 2) for x in (r, e, g)), flat(h, 1), flat(assoc, 2), params.W_r[n_x:], w_u
    hidden, assoc = module.scan(*operands, step=step, interpret=interpret)
    hidden, assoc = hidden.reshape(*lead, -1, N), assoc.reshape(*lead, N, N)
    return jnp.moveaxis(hidden, -2, 0), hidden[..., -1, :], assoc


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _steps_recovering(options, kernel, xs, h, assoc, params):
    """`_steps` whose backward pass turns the memory back instead of having stored it."""
    if kernel[0] == "xla":
        return _steps(options, xs, h, assoc, params)
    return _steps_in_kernel(options, kernel, xs, h, assoc, params)


def _steps_fwd(options, kernel, xs, h, assoc, params):
    out = _steps_recovering(options, kernel, xs, h, assoc, params)
    return out, (xs, h, params, out[0], out[2])


def _steps_bwd(options, kernel, saved, cotangents):
    xs, h0, params, hidden, assoc = saved
    d_hidden, dh, dassoc = cotangents
    before = jnp.concatenate([h0[None], hidden[:-1]])

    def step(carry, inputs):
        assoc, dh, dassoc, grads = carry
        x, h, d = inputs
        plane = _maps(x, h, params, options[3], EPS)[0]
        earlier = _turn_rows(plane._replace(s=-plane.s), assoc)
        _, pull = jax.vjp(lambda *a: _cell(*a, *options, EPS), x, h, earlier, params)
        dx, dh, dassoc, dparams = pull((dh + d, dassoc))
        return (earlier, dh, dassoc, jax.tree.map(jnp.add, grads, dparams)), dx

    zeros = alike(jax.tree.map(jnp.zeros_like, params), saved, cotangents)
    (_, dh, dassoc, grads), dxs = lax.scan(
        step, (assoc, dh, dassoc, zeros), (xs, before, d_hidden), reverse=True
    )
    return dxs, dh, dassoc, grads


_steps_recovering.defvjp(_steps_fwd, _steps_bwd)


def _maps(x, h, params, update_gate, eps):
    """(plane of R(e, r), gate, e)."""
    xh = jnp.concatenate([x, h], axis=-1)
    r, e = _add(xh @ params.W_r, params.b_r), _add(x @ params.W_e, params.b_e)
    g = jax.nn.sigmoid(_add(xh @ params.W_u, params.b_u)) if update_gate else jnp.zeros_like(h)
    return _plane(e, r, eps), g, e


def _plane(a, b, eps):
    """The plane and angle of R(a, b); degenerate ones as in ref, with gradient 0."""
    length_a, length_b = _norm(a), _norm(b)
    none = (length_a <= eps) | (length_b <= eps)
    whole = lambda length: jnp.where(length <= eps, 1, length)
    u, to = a / whole(length_a), b / whole(length_b)
    c = _dot(u, to)
    across = to - c * u
    s = _norm(across)
    flat = none | (s <= BAND)
    w = across / jnp.where(flat, 1, s)
    u0, c0 = lax.stop_gradient((jnp.where(length_a <= eps, a / eps, u), c))
    axis = jax.nn.one_hot(jnp.argmin(jnp.abs(u0), axis=-1), a.shape[-1], dtype=a.dtype)
    axis = axis - _dot(axis, u0) * u0
    one = jnp.ones_like(c0)
    pick = lambda degenerate, regular: jnp.where(flat, lax.stop_gradient(degenerate), regular)
    half_turn = ~none & (c0 < 0)
    return Plane(
        pick(u0, u), pick(axis / _norm(axis), w), pick(jnp.where(half_turn, -one, one), c), pick(0 * one, s)
    )


def _add(y, b):
    return y + jnp.broadcast_to(b, y.shape)


def _dot(x, y):
    return jnp.sum(x * y, axis=-1, keepdims=True)


def _norm(x):
    """The length, with gradient 0 at the origin."""
    square = _dot(x, x)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _times(matrix, v):
    return (matrix @ v[..., None])[..., 0]


def _turn(plane, v):
    u, w, c, s = plane
    alpha, beta = _dot(u, v), _dot(w, v)
    return v + u * ((c - 1) * alpha - s * beta) + w * ((c - 1) * beta + s * alpha)


def _turn_rows(plane, A):
    """A R as the update of rank two A + (A u) x^T + (A w) y^T."""
    u, w, c, s = plane
    x, y = (c - 1) * u - s * w, (c - 1) * w + s * u
    return A + _times(A, u)[..., :, None] * x[..., None, :] + _times(A, w)[..., :, None] * y[..., None, :]
