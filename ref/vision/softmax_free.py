"""SOFT: attention with a Gaussian kernel in place of softmax, factored through a few landmark tokens.

Source: Lu et al. 2021 (arXiv 2110.11945) and 2024 (SOFT++, arXiv 2207.03341), with the code released with
them, which decides where both differ. Left out: dropout and stochastic depth, which only training needs.
Ours: distances are clamped at 0, so no kernel exceeds 1; ratio 1 takes the tokens themselves as landmarks;
step sizes are chosen a matrix at a time unless `batch_alpha` asks for the released rule.
"""

import math
from typing import NamedTuple

import numpy as np

from ref.blocks.attention import join_heads, split_heads
from ref.blocks.conv import conv2d, conv2d_vjp, conv_bn
from ref.blocks.linalg import inverse_vjp, newton_iterates
from ref.blocks.mlp import gelu, gelu_grad, linear, linear_vjp, mlp, relu
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.resize import resize_bilinear
from ref.blocks.transformer import transformer_block
from ref.checks import at_least_one, check_num_heads, one_of
from ref.dims import dims, float64
from ref.example import Example
from ref.models.soft import SoftConfig, SoftNet, SoftParams, init_soft

INITS = ("row_sum", "halving")
HALVINGS = 10  # most times the step is halved, and the norm of I - P V_0 below which it is taken
NORM_MOST = 1.01


class SoftCost(NamedTuple):
    """Multiply-accumulates, exponentials and peak bytes of one attention over all its heads."""

    macs: int
    exps: int
    peak_bytes: int


def gaussian_kernel(a, b, *, scale=1.0):
    """K_ij = exp(-scale |a_i - b_j|^2 / 2): a [..., N, d], b [..., M, d] -> [..., N, M] in (0, 1].

    Of an array with itself (b is a) the diagonal is exactly 1.
    """
    dims(a=(a, "... N d"), b=(b, "... M d"))
    same = a is b
    a, b = float64(a, b)
    dot = a @ np.swapaxes(b, -1, -2)
    a2, b2 = (a * a).sum(axis=-1), (b * b).sum(axis=-1)
    if same:  # from the same products, so that rounding cancels
        a2 = b2 = np.diagonal(dot, axis1=-2, axis2=-1)
    return np.exp(-0.5 * scale * np.maximum(a2[..., :, None] + b2[..., None, :] - 2 * dot, 0))


def newton_inverse(A, *, iters=20, ridge=0.01, init="row_sum", normalize=False, batch_alpha=False):
    """V near (A + ridge I)^-1 by `iters` steps of V <- 2 V - V P V from V = alpha P, P = A + ridge I.

    Args: A [..., m, m], symmetric, not negative definite.
      init: "row_sum", alpha = 1.8 / (largest row sum of A)^2; "halving", alpha = 2 / (the same)^2, halved up
        to ten times while the largest column sum of |I - P V| exceeds 1.01. normalize: SOFT++, "halving".
      batch_alpha: both maxima over all matrices given, as the released SOFT++ takes them; otherwise an alpha
        of 2 / (largest row sum + ridge)^2 or more, which need not converge, becomes 1.95 / (the same)^2.
    Returns: [..., m, m]: P^-1 (I - (I - alpha P^2)^(2^iters)), a filtered inverse: eigenvalues p of P with
      alpha p^2 << 2^-iters are left out, not inverted.
    Raises: ValueError for a matrix that is not square or finite, iters < 1, ridge < 0 or an unknown init.
    """
    return _iterates(A, iters, ridge, init, normalize, batch_alpha)[1][-1]


def newton_residuals(A, *, iters=20, ridge=0.01, init="row_sum", normalize=False, batch_alpha=False):
    """Largest column sum of |I - P V_k| for k = 0..iters: [iters + 1, ...]; options as `newton_inverse`."""
    P, found = _iterates(A, iters, ridge, init, normalize, batch_alpha)
    return np.stack([_distance_to_inverse(P, V) for V in found])


def newton_inverse_vjp(V, g):
    """-V^T g V^T: the gradient of an inverse in closed form, with the V that the iteration reached.

    V, g [..., m, m] -> dA [..., m, m]. No step of the iteration is kept or differentiated.
    """
    dims(V=(V, "... m m"), g=(g, "... m m"))
    return inverse_vjp(V, float64(g))


def sample_bottleneck(q, w_landmark, ln_w, ln_b, *, height, width, ratio, eps=1e-5):
    """gelu(LN(conv(q as a map))): one landmark for each ratio x ratio tile of the map of tokens.

    Args: q [..., height * width, d]; w_landmark [d, d, ratio, ratio]; ln_w, ln_b [d].
    Returns: [..., m, d], m = (height // ratio) (width // ratio); rows and columns that fill no tile are not
      read. With ratio 1 q itself.
    """
    _check_map(q, height, width, ratio)
    if ratio == 1:
        return float64(q)
    return gelu(layer_norm(_landmark_conv(q, w_landmark, height, width, ratio), ln_w, ln_b, eps=eps))


def soft_attention(q, q_tilde, v, *, normalize=False, iters=20, ridge=None, batch_alpha=False):
    """y = K (A^+ (K^T v)), K = kernel(q, q_tilde), A = kernel(q_tilde, q_tilde): linear in the tokens.

    Args: q [..., N, d], keys as well as queries; q_tilde [..., m, d]; v [..., N, Dv].
      normalize: SOFT++, D^-1/2 A^+ D^-1/2 in place of A^+, D the row sums of A.
      ridge: added to the diagonal of A before it is inverted; None is 0.01, or 0 with normalize.
    Returns: [..., N, Dv]. N = 0 gives an empty array.
    """
    K, _, W, _ = _factors(q, q_tilde, v, normalize, iters, ridge, batch_alpha)
    return K @ (W @ (np.swapaxes(K, -1, -2) @ v))


def soft_attention_vjp(q, q_tilde, v, dy, *, normalize=False, iters=20, ridge=None, batch_alpha=False):
    """(dq, dq_tilde, dv) of `soft_attention` for dy [..., N, Dv], the inverse by its closed form."""
    K, A, W, V = _factors(q, q_tilde, v, normalize, iters, ridge, batch_alpha)
    u = K.mT @ v
    w, dw = W @ u, K.mT @ dy
    du, dW = W.mT @ dw, dw @ u.mT
    dK, dv = dy @ w.mT + v @ du.mT, K @ du
    if normalize:
        total = A.sum(axis=-1)
        s = total**-0.5
        ds = (dW * V * s[..., None, :]).sum(axis=-1) + (dW * V * s[..., :, None]).sum(axis=-2)
        dV = s[..., :, None] * dW * s[..., None, :]
        dA = newton_inverse_vjp(V, dV) + (-0.5 * total**-1.5 * ds)[..., None]
    else:
        dA = newton_inverse_vjp(V, dW)
    dq, from_K = gaussian_kernel_vjp(q, q_tilde, K, dK)
    rows, columns = gaussian_kernel_vjp(q_tilde, q_tilde, A, dA)
    return dq, from_K + rows + columns, dv


def gaussian_kernel_vjp(a, b, K, dK, *, scale=1.0):
    """(da, db) of K = `gaussian_kernel(a, b)`: with G = -scale K dK, da_i = sum_j G_ij (a_i - b_j)."""
    G = -scale * K * dK
    da = G.sum(axis=-1)[..., None] * a - G @ b
    return da, G.sum(axis=-2)[..., None] * b - np.swapaxes(G, -1, -2) @ a


def soft_layer(
    x, params: SoftParams, *, height, width, num_heads, ratio, conv_size, normalize=False, iters=20,
    ridge=None, batch_alpha=False,
):  # fmt: skip
    """SOFT attention of tokens x [B, height * width, C], with a local filter on v beside it -> [B, N, C].

    q is scaled by d^-1/4, on each side of the kernel; the landmarks are made of the scaled q.
    conv_size: side of the local filter, odd; every head has its own, shared by its channels.
    Raises: ValueError naming the argument at fault.
    """
    q, v = _queries_values(x, params, height, width, num_heads, ratio, conv_size)
    landmarks = params.w_landmark, params.ln_w, params.ln_b
    q_tilde = sample_bottleneck(q, *landmarks, height=height, width=width, ratio=ratio)
    y = soft_attention(q, q_tilde, v, normalize=normalize, iters=iters, ridge=ridge, batch_alpha=batch_alpha)
    maps = conv2d(_head_maps(v, height, width), params.w_local, padding=conv_size // 2, groups=num_heads)
    return linear(join_heads(y + _from_head_maps(maps, v)), params.w_out, params.b_out)


def soft_layer_backward(
    dout, x, params: SoftParams, *, height, width, num_heads, ratio, conv_size, normalize=False, iters=20,
    ridge=None, batch_alpha=False,
):  # fmt: skip
    """(dx, dparams: SoftParams) of `soft_layer` for dout [B, N, C]; all else is computed again."""
    p, options = params, {"normalize": normalize, "iters": iters, "ridge": ridge, "batch_alpha": batch_alpha}
    local = {"padding": conv_size // 2, "groups": num_heads}
    q, v = _queries_values(x, p, height, width, num_heads, ratio, conv_size)
    q_tilde = sample_bottleneck(q, p.w_landmark, p.ln_w, p.ln_b, height=height, width=width, ratio=ratio)
    maps = _head_maps(v, height, width)
    y = soft_attention(q, q_tilde, v, **options) + _from_head_maps(conv2d(maps, p.w_local, **local), v)
    dy, dw_out, db_out = linear_vjp(join_heads(y), p.w_out, float64(dout))
    dy = split_heads(dy, num_heads)
    dq, dq_tilde, dv = soft_attention_vjp(q, q_tilde, v, dy, **options)
    dmaps, dw_local, _ = conv2d_vjp(maps, p.w_local, _head_maps(dy, height, width), **local)
    dw_landmark = dln_w = dln_b = None
    if ratio == 1:
        dq = dq + dq_tilde
    else:
        h = _landmark_conv(q, p.w_landmark, height, width, ratio)
        dn = dq_tilde * gelu_grad(layer_norm(h, p.ln_w, p.ln_b))
        dh, dln_w, dln_b = layer_norm_vjp(h, p.ln_w, dn)
        image = q.reshape(-1, height, width, q.shape[-1])
        dh = dh.reshape(-1, height // ratio, width // ratio, q.shape[-1])
        dimage, dw_landmark, _ = conv2d_vjp(image, p.w_landmark, dh, stride=ratio)
        dq = dq + dimage.reshape(q.shape)
    scale = q.shape[-1] ** -0.25
    from_q, dw_q, db_q = linear_vjp(float64(x), p.w_q, scale * join_heads(dq))
    from_v, dw_v, db_v = linear_vjp(float64(x), p.w_v, join_heads(dv + _from_head_maps(dmaps, v)))
    return from_q + from_v, SoftParams(
        dw_q, db_q, dw_v, db_v, dw_landmark, dln_w, dln_b, dw_local, dw_out, db_out
    )


def exact_gaussian_attention(q, v, *, normalize=False):
    """K v with the whole N x N kernel; with normalize D^-1/2 K D^-1/2 v, D the row sums. O(N^2)."""
    dims(q=(q, "... N d"), v=(v, "... N Dv"))
    K = gaussian_kernel(q, q)
    if not normalize:
        return K @ float64(v)
    s = K.sum(axis=-1, keepdims=True) ** -0.5
    return s * (K @ (s * float64(v)))


def soft_cost(n, m, d, *, heads, iters=20):
    """SoftCost for n tokens, m landmarks and heads of d channels.

    A head multiplies 3 n m d (kernel, K^T v, K w) + 2 m^2 d (landmark kernel, A^+ u) + 2 iters m^3. The peak
    is in the iteration: q, v, q_tilde, K, and three m x m matrices, 4 bytes a number. SOFT++ adds 10 m^3
    to choose its first step.
    """
    macs = 3 * n * m * d + 2 * m * m * d + 2 * iters * m**3
    numbers = 2 * n * d + m * d + n * m + 3 * m * m
    return SoftCost(heads * macs, heads * (n * m + m * m), 4 * heads * numbers)


def soft_forward(img, params: SoftNet, cfg: SoftConfig, *, features=False):
    """Logits [B, classes] of images [B, H, W, 3]; with features the four maps [B, H_i, W_i, C_i], i = 1..4.

    Maps have sides H/4, H/8, H/16, H/32 (odd ones rounded up). Blocks 1 to 3 are post-norm, with the tanh
    form of GELU; positions are resized to the map.
    """
    dims(img=(img, "B H W 3"))
    x, maps = float64(img), []
    for i, (embed, blocks) in enumerate(zip(params.embed, params.blocks, strict=True)):
        for conv, stride in zip(embed, (2, 1, 2), strict=False):
            x = relu(conv_bn(x, conv, stride=stride, padding=1))
        B, H, W, C = x.shape
        x = (x + _resize(params.pos[i], H, W)).reshape(B, H * W, C)
        if i < 3:
            for p in blocks:
                x = _soft_block(x, p, cfg, i, H, W)
        else:
            first = np.broadcast_to(float64(params.cls_token) + params.cls_pos, (B, 1, C))
            x = np.concatenate([first, x], axis=1)
            for p in blocks:
                x = transformer_block(x, p, num_heads=C // cfg.head_dim, eps=1e-6)
            first, x = x[:, 0], x[:, 1:]
        x = x.reshape(B, H, W, C)
        maps.append(x)
    if features:
        return maps
    return linear(
        layer_norm(first, params.norm_scale, params.norm_bias, eps=1e-6), params.w_head, params.b_head
    )


def _soft_block(x, p, cfg, stage, height, width):
    y = x + soft_layer(
        x, p.attn, height=height, width=width, num_heads=x.shape[-1] // cfg.head_dim,
        ratio=cfg.ratios[stage], conv_size=cfg.conv_sizes[stage], normalize=cfg.normalize, iters=cfg.iters,
    )  # fmt: skip
    x = layer_norm(y, p.ln1_scale, p.ln1_bias)
    y = x + mlp(x, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2, activation="gelu_tanh")
    return layer_norm(y, p.ln2_scale, p.ln2_bias)


def _factors(q, q_tilde, v, normalize, iters, ridge, batch_alpha):
    """(K, A, the matrix between K and K^T, the inverse)."""
    dims(q=(q, "... N d"), q_tilde=(q_tilde, "... m d"), v=(v, "... N Dv"))
    for name, x in (("q", q), ("q_tilde", q_tilde), ("v", v)):
        _check_finite(name, x)
    ridge = (0.0 if normalize else 0.01) if ridge is None else ridge
    K, A = gaussian_kernel(q, q_tilde), gaussian_kernel(q_tilde, q_tilde)
    V = newton_inverse(A, iters=iters, ridge=ridge, normalize=normalize, batch_alpha=batch_alpha)
    if not normalize:
        return K, A, V, V
    s = A.sum(axis=-1) ** -0.5
    return K, A, s[..., :, None] * V * s[..., None, :], V


def _iterates(A, iters, ridge, init, normalize, batch_alpha):
    """(P, [V_0 .. V_iters])."""
    dims(A=(A, "... m m"))
    _check_finite("A", A)
    at_least_one(iters=iters)
    if not ridge >= 0:
        raise ValueError(f"ridge must not be negative, got {ridge}")
    one_of("init", init, INITS)
    A = float64(A)
    over = lambda x: np.broadcast_to(x.max(), x.shape) if batch_alpha and x.size else x
    P = A + ridge * np.eye(A.shape[-1])
    largest = over(np.abs(A).sum(axis=-1).max(axis=-1, initial=0))
    halving = normalize or init == "halving"
    size = np.where(largest == 0, 1.0, largest)
    alpha = (2.0 if halving else 1.8) / size**2
    if not batch_alpha:  # at 2 / (largest eigenvalue of P)^2 the iteration no longer converges
        bound = (size + ridge) ** 2
        alpha = np.where(alpha * bound < 2, alpha, 1.95 / bound)
    start = lambda alpha: alpha[..., None, None] * P
    for _ in range(HALVINGS if halving else 0):
        far = over(_distance_to_inverse(P, start(alpha))) > NORM_MOST
        alpha = np.where(far, alpha / 2, alpha)
    return P, newton_iterates(P, start(alpha), iters=iters)


def _distance_to_inverse(P, V):
    return np.abs(np.eye(P.shape[-1]) - P @ V).sum(axis=-2).max(axis=-1, initial=0)


def _landmark_conv(q, w, height, width, ratio):
    """The map of q [..., N, d] under a kernel of the size of its stride -> [..., m, d]."""
    d = q.shape[-1]
    dims(w_landmark=(w, f"{d} {d} {ratio} {ratio}"))
    y = conv2d(q.reshape(math.prod(q.shape[:-2]), height, width, d), w, stride=ratio)
    return y.reshape(*q.shape[:-2], y.shape[1] * y.shape[2], d)


def _queries_values(x, params, height, width, num_heads, ratio, conv_size):
    C = dims(x=(x, "B N C"), w_q=(params.w_q, "C C"), w_v=(params.w_v, "C C"))["C"]
    _check_finite("x", x)
    check_num_heads(C, num_heads)
    if conv_size < 1 or conv_size % 2 == 0:
        raise ValueError(f"conv_size must be odd, got {conv_size}")
    dims(w_local=(params.w_local, f"{num_heads} 1 {conv_size} {conv_size}"))
    _check_map(x, height, width, ratio)
    q = split_heads(linear(x, params.w_q, params.b_q), num_heads) * (C // num_heads) ** -0.25
    return q, split_heads(linear(x, params.w_v, params.b_v), num_heads)


def _head_maps(v, height, width):
    """[B, heads, N, d] -> [B * d, height, width, heads]: an image a channel, with heads as colours."""
    B, heads, _, d = v.shape
    return v.transpose(0, 3, 2, 1).reshape(B * d, height, width, heads)


def _from_head_maps(maps, v):
    B, heads, N, d = v.shape
    return maps.reshape(B, d, N, heads).transpose(0, 3, 2, 1)


def _resize(pos, height, width):
    """Positions [1, n, n, C] on a map of another size."""
    pos = float64(pos)
    return pos if pos.shape[1:3] == (height, width) else resize_bilinear(pos, (height, width))


def _check_map(x, height, width, ratio):
    if x.shape[-2] != height * width:
        raise ValueError(f"height * width must be the number of tokens {x.shape[-2]}, got {height} x {width}")
    if not 1 <= ratio <= min(height, width):
        raise ValueError(f"ratio must be in 1..{min(height, width)}, the shorter side, got {ratio}")


def _check_finite(name, x):
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite")


def example(seed=0):
    """Two handwritten digits, a token for every pixel's 4 x 4 surroundings, in a layer of two heads."""
    from ref.blocks.conv import im2col
    from ref.data import digits

    rng = np.random.default_rng(seed)
    images = digits()[0][2 * seed : 2 * seed + 2, ..., None] / 16
    x = im2col(np.pad(images, ((0, 0), (1, 2), (1, 2), (0, 0))), (4, 4)).reshape(2, 64, 16)
    cfg = SoftConfig((16, 16, 16, 16), (1, 1, 1, 1), 8, (4, 2, 1), (5, 3, 3), 8, image_size=32, classes=10)
    net = init_soft(rng, cfg, std=0.3)
    layer = net.blocks[1][0].attn
    at = {"height": 8, "width": 8, "ratio": 2}
    q, v = (split_heads(linear(x, w), 2) for w in (layer.w_q, layer.w_v))
    q_tilde = sample_bottleneck(q, layer.w_landmark, layer.ln_w, layer.ln_b, **at)
    A = gaussian_kernel(q_tilde, q_tilde)
    V = newton_inverse(A, ridge=0.3)
    img = resize_bilinear(np.repeat(images, 3, axis=-1), 32)
    return [
        Example("gaussian_kernel", (q, q_tilde), {}, (0, 1)),
        # far from singular, so that the closed form is the gradient of what was computed
        Example("newton_inverse", (A,), {"ridge": 0.3}, (0,)),
        Example("newton_residuals", (A,), {"iters": 6}),
        Example("newton_inverse_vjp", (V, rng.standard_normal(V.shape)), {}, (0, 1)),
        Example("sample_bottleneck", (q, layer.w_landmark, layer.ln_w, layer.ln_b), at, (0, 1, 2, 3)),
        Example("soft_attention", (q, q_tilde, v), {"ridge": 0.3}, (0, 1, 2)),
        Example("soft_layer", (x, layer), {**at, "num_heads": 2, "conv_size": 3, "ridge": 0.3}, (0, 1)),
        Example("soft_layer_backward", (x, x, layer), {**at, "num_heads": 2, "conv_size": 3, "ridge": 0.3}),
        Example("exact_gaussian_attention", (q, v), {"normalize": True}, (0, 1)),
        Example("soft_forward", (img, net, cfg)),
    ]
