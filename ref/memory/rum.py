"""The rotational unit of memory: a recurrent cell whose state is turned in the plane of two vectors.

Source: Dangovski et al. 2019 (TACL; earlier arXiv 1710.09537), section 3 (the rotation, the cell, the
associative memory, time normalisation) and section 4 (copying, recall, stories). Where paper and released
code differ we follow the code's PyTorch port; degenerate planes, where that has no gradient, are our choice.
Left out: zoneout and layer norm, which the paper's language models train with.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import relu, sigmoid
from ref.dims import dims, float64
from ref.example import Example
from ref.tasks.sequences import copying_task, recall_task, story_task

__all__ = [
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

EPS = 1e-12  # a vector this short has no direction
BAND = 1e-7  # two directions this close to one line span no plane

# name -> (function of its argument, derivative as a function of its value)
ACTIVATIONS = {
    "relu": (relu, lambda y: (y > 0).astype(np.float64)),
    "tanh": (np.tanh, lambda y: 1 - y**2),
    "sigmoid": (sigmoid, lambda y: y * (1 - y)),
    "softsign": (lambda x: x / (1 + np.abs(x)), lambda y: (1 - np.abs(y)) ** 2),
}


class RumParams(NamedTuple):
    """W_r, W_u [Nx+N, N] (rows of x first), W_e [Nx, N]; b_r, b_u, b_e [N]: target, update gate, embedding.

    W_u and b_u may be None where update_gate=False.
    """

    W_r: np.ndarray
    b_r: np.ndarray
    W_u: np.ndarray | None
    b_u: np.ndarray | None
    W_e: np.ndarray
    b_e: np.ndarray


class Plane(NamedTuple):
    """The plane of a rotation, an orthonormal pair u, w [..., N], and its angle: c cos, s sin [..., 1]."""

    u: np.ndarray
    w: np.ndarray
    c: np.ndarray
    s: np.ndarray


def rotate(a, b, v, *, eps=EPS):
    """R(a, b) v: v turned in the plane of a and b by the angle from a to b, in O(N).

    Args: a, b, v [..., N], N >= 2. eps: a vector no longer than this counts as zero.
    Returns: [..., N] float64. R is the identity if a or b is zero or b is parallel to a (within 1e-7); for
      b antiparallel to a it turns by pi in the plane of a and the coordinate axis least aligned with it.
    Raises: ValueError naming the argument at fault.
    """
    check_rotation(eps, a=a, b=b, v=v)
    a, b, v = float64(a, b, v)
    return _turn(_plane(a, b, eps), v)


def rotation_matrix(a, b, *, eps=EPS):
    """R(a, b) [..., N, N] of a, b [..., N]: orthogonal, determinant 1; see `rotate`."""
    check_rotation(eps, a=a, b=b)
    a, b = float64(a, b)
    return _turn_rows(_plane(a, b, eps), np.zeros((*a.shape[:-1], 1, 1)) + np.eye(a.shape[-1]))


def rotate_vjp(a, b, v, dout, *, eps=EPS):
    """(da, db, dv) of `rotate`; da = db = 0 where the plane is degenerate."""
    check_rotation(eps, a=a, b=b, v=v, dout=dout)
    a, b, v, dout = float64(a, b, v, dout)
    plane = _plane(a, b, eps)
    dplane, dv = _turn_vjp(plane, v, dout)
    return *_plane_vjp(a, b, eps, plane, dplane), dv


def rum_cell(x, h, assoc, params: RumParams, *, lambda_=0, eta=None, activation="relu", update_gate=True,
             eps=EPS):  # fmt: skip
    """(h', A'): one step. e = x W_e + b_e is turned towards the target r = [x, h] W_r + b_r.

    Args: x [..., Nx]; h [..., N]; assoc: None with lambda_ = 0, the rotation memory A [..., N, N] with 1.
      lambda_: 0 turns h itself, z = R(e, r) h; 1 accumulates, A' = A R(e, r), z = A' h.
      eta: None, or the norm given to every new state (a zero state stays zero).
      activation: of c = act(e + z): "relu", "tanh", "sigmoid", "softsign".
      update_gate: h' = g h + (1 - g) c with g = sigmoid([x, h] W_u + b_u), or h' = c.
    Raises: ValueError naming the argument at fault.
    """
    check_cell(x, h, assoc, params, lambda_, eta, activation, update_gate, eps)
    x, h = float64(x, h)
    plane, g, e = _maps(x, h, params, update_gate, eps)[:3]
    if lambda_ == 0:
        z = _turn(plane, h)
    else:
        assoc = _turn_rows(plane, float64(assoc))
        z = _times(assoc, h)
    c = ACTIVATIONS[activation][0](e + z)
    h = g * h + (1 - g) * c
    return _rescale(h, eta, eps), assoc


def rum(x, params: RumParams, *, h0=None, assoc0=None, lambda_=0, eta=None, activation="relu",
        update_gate=True, return_assoc=False):  # fmt: skip
    """All steps of `rum_cell` over x [..., T, Nx] -> (hidden [..., T, N], h_last [..., N]) float64.

    h0 [..., N] is 0 and assoc0 [..., N, N] the identity unless given. return_assoc appends the last memory
    (None with lambda_ = 0).
    """
    x, h, assoc = _start(x, params, h0, assoc0, lambda_)
    options = {"lambda_": lambda_, "eta": eta, "activation": activation, "update_gate": update_gate}
    check_cell(x[..., 0, :], h, assoc, params, *options.values(), EPS)
    hidden = np.empty_like(x, shape=(*x.shape[:-1], h.shape[-1]))
    for t in range(x.shape[-2]):
        h, assoc = rum_cell(x[..., t, :], h, assoc, params, **options)
        hidden[..., t, :] = h
    return (hidden, h, assoc) if return_assoc else (hidden, h)


def rum_vjp(x, params: RumParams, cotangent, *, h0=None, assoc0=None, lambda_=0, eta=None, activation="relu",
            update_gate=True):  # fmt: skip
    """(dx, dparams) for the cotangent [..., T, N] of `hidden`, by back-propagation through time.

    Kept from the forward pass: hidden and, with lambda_ = 1, the last memory alone. Earlier memories are
    recovered by turning back, A_{t-1} = A_t R(e_t, r_t)^T: O(N^2 + T N) numbers instead of O(T N^2).
    """
    hidden, _, assoc = rum(x, params, h0=h0, assoc0=assoc0, lambda_=lambda_, eta=eta, activation=activation,
                           update_gate=update_gate, return_assoc=True)  # fmt: skip
    dims(hidden=(hidden, "... T N"), cotangent=(cotangent, "... T N"))
    x, start, _ = _start(x, params, h0, None, lambda_)
    cotangent, n_x = float64(cotangent), x.shape[-1]
    f, df = ACTIVATIONS[activation]
    dx = np.zeros_like(x)
    grads = {n: np.zeros(p.shape) for n, p in params._asdict().items() if p is not None}
    dh = np.zeros_like(start)
    dassoc = 0.0
    for t in reversed(range(x.shape[-2])):
        x_t, h = x[..., t, :], hidden[..., t - 1, :] if t else start
        plane, g, e, r, xh = _maps(x_t, h, params, update_gate, EPS)
        if lambda_ == 0:
            z = _turn(plane, h)
        else:
            z = _times(assoc, h)
            before = _turn_rows(_reverse(plane), assoc)
        c = f(e + z)
        # h' = g h + (1 - g) c, then the rescaling
        dh = _rescale_vjp(g * h + (1 - g) * c, dh + cotangent[..., t, :], eta, EPS)
        dg, dc, dh = dh * (h - c), (1 - g) * dh, g * dh
        de = dc * df(c)  # and dz = de
        if lambda_ == 0:
            dplane, dh_turned = _turn_vjp(plane, h, de)
            dh = dh + dh_turned
        else:  # z = A h, A = before R(e, r)
            dh = dh + _times(np.swapaxes(assoc, -1, -2), de)
            dplane, dassoc = _turn_rows_vjp(plane, before, dassoc + de[..., :, None] * h[..., None, :])
            assoc = before
        de_plane, dr = _plane_vjp(e, r, EPS, plane, dplane)
        de = de + de_plane
        dx_t = de @ params.W_e.T
        into = [("e", x_t, de), ("r", xh, dr)]
        dxh = dr @ params.W_r.T
        if update_gate:
            into.append(("u", xh, du := dg * g * (1 - g)))
            dxh = dxh + du @ params.W_u.T
        for name, source, d in into:
            grads[f"W_{name}"] += source.reshape(-1, source.shape[-1]).T @ d.reshape(-1, d.shape[-1])
            grads[f"b_{name}"] += d.reshape(-1, d.shape[-1]).sum(axis=0)
        dx[..., t, :] = dx_t + dxh[..., :n_x]
        dh = dh + dxh[..., n_x:]
    return dx, RumParams(*(grads.get(n) for n in RumParams._fields))


def init_rum(key, input_size, hidden_size):
    """RumParams: W_r, W_u with orthonormal columns, W_e Xavier uniform, b_r = b_u = 1, b_e = 0.

    key: NumPy Generator or seed.
    """
    if input_size < 1 or hidden_size < 2:
        raise ValueError(f"need input_size >= 1 and hidden_size >= 2, got {input_size=}, {hidden_size=}")
    rng, n, n_x = np.random.default_rng(key), hidden_size, input_size

    def orthogonal():
        q, r = np.linalg.qr(rng.standard_normal((n_x + n, n)))
        return q * np.sign(np.diag(r))  # uniform over such matrices

    reach = np.sqrt(6 / (n_x + n))
    W_r, W_u, W_e = orthogonal(), orthogonal(), rng.uniform(-reach, reach, (n_x, n))
    return RumParams(W_r, np.ones(n), W_u, np.ones(n), W_e, np.zeros(n))


def rum_params(input_size, hidden_size, *, update_gate=True):
    """Numbers in `RumParams`: 2 (Nx + N) N + Nx N + 3 N, less (Nx + N) N + N without the update gate."""
    n_x, n = input_size, hidden_size
    return (1 + bool(update_gate)) * ((n_x + n) * n + n) + n_x * n + n


def rum_flops(input_size, hidden_size, *, lambda_):
    """Operations a step: the weights' products, the plane (12 N), the turn, biases, gate and mixing (9 N).

    The turn is 8 N with lambda_ = 0; with 1 it is two products A u, A w, two outer products and A h: 10 N^2.
    """
    _check_lambda(lambda_)
    n_x, n = input_size, hidden_size
    products = 2 * (2 * (n_x + n) * n + n_x * n)
    return products + 21 * n + (8 * n if lambda_ == 0 else 10 * n * n)


def _dot(x, y):
    return np.sum(x * y, axis=-1, keepdims=True)


def _norm(x):
    return np.sqrt(_dot(x, x))


def _times(matrix, v):
    return (matrix @ v[..., None])[..., 0]


def _plane(a, b, eps):
    """The plane and angle of R(a, b). s = ||b - (u.b) u|| / ||b||: 1 - c^2 would lose half the digits."""
    length_a, length_b = _norm(a), _norm(b)
    u, to = a / np.maximum(length_a, eps), b / np.maximum(length_b, eps)
    c = _dot(u, to)
    across = to - c * u
    s = _norm(across)
    none = (length_a <= eps) | (length_b <= eps)
    flat = none | (s <= BAND)
    axis = (np.arange(a.shape[-1]) == np.argmin(np.abs(u), axis=-1)[..., None]).astype(np.float64)
    axis = axis - _dot(axis, u) * u
    w = np.where(flat, axis / _norm(axis), across / np.where(flat, 1.0, s))
    half_turn = flat & ~none & (c < 0)
    return Plane(u, w, np.where(flat, np.where(half_turn, -1.0, 1.0), c), np.where(flat, 0.0, s))


def _plane_vjp(a, b, eps, plane, d):
    """(da, db) for the cotangents d of a plane's four parts; 0 where it is degenerate (s = 0 there)."""
    flat = plane.s == 0
    s = np.where(flat, 1.0, plane.s)
    length_a, length_b = (np.maximum(_norm(x), eps) for x in (a, b))
    u, to = plane.u, b / length_b
    d_across = (d.w - plane.w * _dot(plane.w, d.w)) / s + d.s * plane.w  # w and s are across / ||across||
    d_c = d.c - _dot(u, d_across)
    d_u, d_to = d.u - plane.c * d_across + d_c * to, d_across + d_c * u
    da = (d_u - u * _dot(u, d_u)) / length_a
    db = (d_to - to * _dot(to, d_to)) / length_b
    return np.where(flat, 0.0, da), np.where(flat, 0.0, db)


def _turn(plane, v):
    """R v = v + (c - 1)(u (u.v) + w (w.v)) + s (w (u.v) - u (w.v))."""
    u, w, c, s = plane
    alpha, beta = _dot(u, v), _dot(w, v)
    return v + u * ((c - 1) * alpha - s * beta) + w * ((c - 1) * beta + s * alpha)


def _reverse(plane):
    """The plane of the inverse rotation."""
    return plane._replace(s=-plane.s)


def _turn_vjp(plane, v, dy):
    u, w, c, s = plane
    alpha, beta, gamma, delta = _dot(u, v), _dot(w, v), _dot(u, dy), _dot(w, dy)
    d_u = (c - 1) * (alpha * dy + gamma * v) + s * (delta * v - beta * dy)
    d_w = (c - 1) * (beta * dy + delta * v) + s * (alpha * dy - gamma * v)
    d_c, d_s = alpha * gamma + beta * delta, alpha * delta - beta * gamma
    return Plane(d_u, d_w, d_c, d_s), _turn(_reverse(plane), dy)


def _turn_rows(plane, A):
    """A R: every row of A turned back, as the update of rank two A + (A u) x^T + (A w) y^T."""
    u, w, x, y = _rank_two(plane)
    return A + _times(A, u)[..., :, None] * x[..., None, :] + _times(A, w)[..., :, None] * y[..., None, :]


def _rank_two(plane):
    u, w, c, s = plane
    return u, w, (c - 1) * u - s * w, (c - 1) * w + s * u


def _turn_rows_vjp(plane, A, dy):
    (u, w, x, y), (c, s) = _rank_two(plane), plane[2:]
    flip = np.swapaxes(dy, -1, -2), np.swapaxes(A, -1, -2)
    d_x, d_y = _times(flip[0], _times(A, u)), _times(flip[0], _times(A, w))
    d_p, d_q = _times(dy, x), _times(dy, y)  # of p = A u, q = A w
    d_u = _times(flip[1], d_p) + (c - 1) * d_x + s * d_y
    d_w = _times(flip[1], d_q) + (c - 1) * d_y - s * d_x
    dplane = Plane(d_u, d_w, _dot(d_x, u) + _dot(d_y, w), _dot(d_y, u) - _dot(d_x, w))
    return dplane, dy + d_p[..., :, None] * u[..., None, :] + d_q[..., :, None] * w[..., None, :]


def _maps(x, h, params, update_gate, eps):
    """(plane of R(e, r), gate, e, r, [x, h])."""
    xh = np.concatenate([x, h], axis=-1)
    r, e = xh @ params.W_r + params.b_r, x @ params.W_e + params.b_e
    g = sigmoid(xh @ params.W_u + params.b_u) if update_gate else np.zeros_like(h)
    return _plane(e, r, eps), g, e, r, xh


def _rescale(h, eta, eps):
    return h if eta is None else eta * h / np.maximum(_norm(h), eps)


def _rescale_vjp(h, dy, eta, eps):
    """A state without a direction passes no gradient on: eta / eps would be 1e12."""
    if eta is None:
        return dy
    length = _norm(h)
    n = h / np.maximum(length, eps)
    return np.where(length > eps, eta * (dy - n * _dot(n, dy)) / np.maximum(length, eps), 0.0)


def _start(x, params, h0, assoc0, lambda_):
    """x in float64, and the state before the first step."""
    check_steps(x, params, lambda_)
    x, N = float64(x), params.W_e.shape[-1]
    h = np.zeros_like(x, shape=(*x.shape[:-2], N)) if h0 is None else float64(h0)
    if lambda_ == 0 or assoc0 is not None:
        return x, h, assoc0
    return x, h, np.zeros((*x.shape[:-2], N, N)) + np.eye(N)


def check_steps(x, params, lambda_):
    """Raise ValueError unless x has steps of the width of the parameters."""
    if dims(x=(x, "... T Nx"), W_e=(params.W_e, "Nx N"))["T"] < 1:
        raise ValueError("x must have at least one step, got T=0")
    _check_lambda(lambda_)


def check_rotation(eps, **arrays):
    """Raise ValueError for a bad call of a rotation."""
    N = dims(**{n: (x, "... N") for n, x in arrays.items()})["N"]
    if N < 2:
        raise ValueError(f"a rotation needs N >= 2, got N={N}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def _check_lambda(lambda_):
    if lambda_ not in (0, 1):
        raise ValueError(f"lambda_ must be 0 or 1, got {lambda_!r}")


def check_cell(x, h, assoc, params, lambda_, eta, activation, update_gate, eps):
    """Raise ValueError for a bad call of the cell."""
    _check_lambda(lambda_)
    if eta is not None and not eta > 0:
        raise ValueError(f"eta must be None or positive, got {eta}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    p = params
    n = dims(x=(x, "... Nx"), h=(h, "... N"), W_e=(p.W_e, "Nx N"), b_e=(p.b_e, "N"), b_r=(p.b_r, "N"))
    check_rotation(eps, h=h)
    maps = (("W_r", p.W_r), ("W_u", p.W_u)) if update_gate else (("W_r", p.W_r),)
    for name, w in maps:
        if w is None or tuple(w.shape) != (n["Nx"] + n["N"], n["N"]):
            got = None if w is None else list(w.shape)
            raise ValueError(f"{name} must be [Nx + N, N] = [{n['Nx'] + n['N']}, {n['N']}], got {got}")
    if update_gate:
        dims(b_e=(p.b_e, "N"), b_u=(p.b_u, "N"))
    if (assoc is None) != (lambda_ == 0):
        raise ValueError(f"assoc must be {'None' if lambda_ == 0 else '[..., N, N]'} with lambda_={lambda_}")
    if assoc is not None:
        dims(h=(h, "... N"), assoc=(assoc, "... N M"))
        dims(h=(h, "... M"), assoc=(assoc, "... N M"))


def example(seed=0):
    """Lines of a play, a character a step, in a random embedding; a state of 8 numbers."""
    from ref.data import text

    rng = np.random.default_rng(seed)
    play, n_x, n, steps = text(), 6, 8, 7
    letters = np.array([[ord(play[1000 * i + j]) % 96 for j in range(steps)] for i in range(2)])
    x = rng.standard_normal((96, n_x))[letters]
    params = init_rum(rng, n_x, n)
    a, b, v = rng.standard_normal((3, 3, n))
    hidden, h, assoc = rum(x, params, lambda_=1, return_assoc=True)
    return [
        Example("rotate", (a, b, v), {}, (0, 1, 2)),
        Example("rotation_matrix", (a, b), {}, (0, 1)),
        Example("rum_cell", (x[:, 0], h, assoc, params), {"lambda_": 1, "eta": 1.0}, (0, 1, 2, 3)),
        Example("rum", (x, params), {"lambda_": 1, "return_assoc": True}, (0, 1)),
        Example("rum_vjp", (x, params, rng.standard_normal(hidden.shape)), {"lambda_": 1}),
    ]
