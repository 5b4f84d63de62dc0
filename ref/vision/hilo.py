"""HiLo: some heads look inside small windows, the others at one averaged token a window.

Source: Pan et al. 2022 (arXiv 2205.13213) and the code released with it, whose order of heads and
channels this keeps. Maps are [B, H, W, C]. No positions anywhere: LITv2 gets them from the zero padding
of its depthwise convolutions. Ours: `pad`, where the released layer only counts what padding would cost.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import attention_dense, attention_dense_vjp, join_heads, split_heads
from ref.blocks.conv import batch_norm, conv2d, deform_conv2d
from ref.blocks.maps import from_windows, map_rows, to_windows
from ref.blocks.mlp import gelu, linear, linear_vjp
from ref.blocks.norms import layer_norm
from ref.checks import at_least_one, check_num_heads
from ref.dims import dims, float64
from ref.example import Example
from ref.models.litv2 import (
    DWMlpParams,
    HiLoParams,
    LITv2Block,
    LITv2Config,
    LITv2Params,
    init_hilo,
    init_litv2,
    litv2_config,
    split_heads_hilo,
)

__all__ = [
    "DWMlpParams", "HiLoCost", "HiLoParams", "LITv2Block", "LITv2Config", "LITv2Params", "avg_pool_tokens",
    "deformable_token_merge", "dw_mlp", "example", "frequency_energy", "hifi_attention", "hilo_attention",
    "hilo_attention_backward", "hilo_flops", "init_hilo", "init_litv2", "litv2_block", "litv2_config",
    "litv2_forward", "litv2_macs", "lofi_attention", "split_heads_hilo",
]  # fmt: skip


class HiLoCost(NamedTuple):
    """Multiply-accumulates of one image, by group and in all; bytes: map and weights in, map out, float32."""

    macs: int
    hifi: int
    lofi: int
    bytes: int


def hifi_attention(x, w_qkv, b_qkv, w_proj, b_proj, *, num_heads, window):
    """Attention among the window x window tokens of every window, by itself: [B, H, W, C] -> [B, H, W, Ch].

    Args: w_qkv [C, 3 Ch], columns [q, k, v][head][d]; w_proj [Ch, Ch]. num_heads: of this group.
    Raises: ValueError unless window divides H and W and num_heads divides Ch.
    """
    _check_group(x, "w_qkv", w_qkv, 3, w_proj, num_heads, window)
    return _hifi(float64(x), w_qkv, b_qkv, w_proj, b_proj, num_heads, window, None)


def lofi_attention(x, w_q, b_q, w_kv, b_kv, w_proj, b_proj, *, num_heads, window):
    """Attention of every token to the means of all windows: [B, H, W, C] -> [B, H, W, Cl].

    Args: w_q [C, Cl]; w_kv [C, 2 Cl], columns [k, v][head][d]; w_proj [Cl, Cl]. num_heads: of this group.
    Raises: ValueError unless window divides H and W and num_heads divides Cl.
    """
    width = _check_group(x, "w_kv", w_kv, 2, w_proj, num_heads, window)
    dims(x=(x, "B H W C"), w_q=(w_q, f"C {width}"))
    return _lofi(float64(x), w_q, b_q, w_kv, b_kv, w_proj, b_proj, num_heads, window, None)


def hilo_attention(x, params: HiLoParams, *, num_heads, window=2, alpha=0.5, pad=False):
    """[Hi-Fi, Lo-Fi] side by side: x [B, H, W, C] -> [B, H, W, C]. No map mixes the two.

    Args: num_heads: of both groups; int(num_heads alpha) are Lo-Fi's, all of them with window 1.
      pad: fill H and W up to multiples of window. Padding is never seen: its keys are masked, and a mean is
        over the pixels that are there.
    Raises: ValueError for sides that window does not divide (without pad), and as `split_heads_hilo`.
    """
    filled, valid, hi, lo = _prepare(x, params, num_heads, window, alpha, pad)
    y = [attend(filled, *group, heads, window, valid) for attend, group, heads in _groups(params, hi, lo)]
    return np.concatenate(y, axis=-1)[:, : x.shape[1], : x.shape[2]]


def hilo_attention_backward(dy, x, params: HiLoParams, *, num_heads, window=2, alpha=0.5, pad=False):
    """(dx, dparams: HiLoParams) of `hilo_attention` for dy [B, H, W, C]; None where a parameter is."""
    filled, valid, hi, lo = _prepare(x, params, num_heads, window, alpha, pad)
    n = dims(x=(x, "B H W C"), dy=(dy, "B H W C"))
    x, dy = filled, np.pad(float64(dy), ((0, 0), *_fill(n, window), (0, 0)))
    split = hi * n["C"] // num_heads
    dx, grads = np.zeros_like(x), {_hifi: (None,) * 4, _lofi: (None,) * 6}
    for attend, group, heads in _groups(params, hi, lo):
        backward, part = (_hifi_vjp, dy[..., :split]) if attend is _hifi else (_lofi_vjp, dy[..., split:])
        d, *grads[attend] = backward(part, x, *group, heads, window, valid)
        dx = dx + d
    return dx[:, : n["H"], : n["W"]], HiLoParams(*grads[_lofi], *grads[_hifi])


def avg_pool_tokens(x, window):
    """Mean of every window: [B, H, W, C] -> [B, H / window, W / window, C]."""
    n = _check_window(x, window)
    x = float64(x).reshape(n["B"], n["H"] // window, window, n["W"] // window, window, n["C"])
    return x.mean(axis=(2, 4))


def deformable_token_merge(x, offsets, w, b, *, stride=2):
    """A convolution of stride by stride tokens that may look beside them: [B, H, W, C] -> [B, H/2, W/2, O].

    Args: offsets [B, H / stride, W / stride, taps, 2], (down, right) in pixels; w [O, C, kh, kw], b [O].
    Samples are bilinear, zero outside the map. With zero offsets this is the plain convolution.
    """
    return deform_conv2d(x, offsets, w, b, stride=stride)


def dw_mlp(x, params: DWMlpParams):
    """w_fc2 gelu(depthwise 3x3(w_fc1 x)): x [B, H, W, C] -> [B, H, W, C]."""
    p = params
    h = linear(x, p.w_fc1, p.b_fc1)
    return linear(gelu(conv2d(h, p.w_dw, p.b_dw, padding=1, groups=h.shape[-1])), p.w_fc2, p.b_fc2)


def litv2_block(x, params: LITv2Block, *, num_heads, window, alpha):
    """x + HiLo(LN(x)), left out where attn is None, then x + DWMlp(LN(x)): [B, H, W, C] -> [B, H, W, C]."""
    p, x = params, float64(x)
    if p.attn is not None:
        y = layer_norm(x, p.ln1_scale, p.ln1_bias)
        x = x + hilo_attention(y, p.attn, num_heads=num_heads, window=window, alpha=alpha)
    return x + dw_mlp(layer_norm(x, p.ln2_scale, p.ln2_bias), p.mlp)


def litv2_forward(img, params: LITv2Params, cfg: LITv2Config, *, features=False):
    """Logits [B, classes] of images [B, H, W, 3]; with features the four maps [B, H_i, W_i, C_i].

    Map i has sides H / 2^(i + 2), i = 0..3, and is what the stage's last block gives.
    Raises: ValueError unless H and W are multiples of 4 at the patches, of 2 at every merging and of the
    window at every attention.
    """
    n = dims(img=(img, "B H W 3"))
    if n["H"] % 4 or n["W"] % 4:
        raise ValueError(f"img must have sides that 4 divides, got {n['H']} x {n['W']}")
    x, maps = conv2d(img, params.w_patch, params.b_patch, stride=4), []
    x = layer_norm(x, params.patch_scale, params.patch_bias)
    for i, blocks in enumerate(params.blocks):
        if i:
            x = _merge(x, params.merges[i - 1])
        for p in blocks:
            x = litv2_block(x, p, num_heads=cfg.num_heads[i], window=cfg.windows[i], alpha=cfg.alpha)
        maps.append(x)
    if features:
        return maps
    y = layer_norm(x, params.norm_scale, params.norm_bias).mean(axis=(1, 2))
    return linear(y, params.w_head, params.b_head)


def frequency_energy(feature_map):
    """Energy by spatial frequency: [..., H, W, C] -> [R], entry r that of all waves of r cycles, rounded.

    Mean over images and channels; the entries add up to the mean square (Parseval).
    """
    n = dims(feature_map=(feature_map, "... H W C"))
    energy = np.abs(np.fft.fft2(float64(feature_map), axes=(-3, -2))) ** 2 / (n["H"] * n["W"]) ** 2
    rows, columns = (np.fft.fftfreq(n[axis], 1 / n[axis]) for axis in "HW")
    radius = np.rint(np.hypot(rows[:, None], columns)).astype(int)
    mean = energy.reshape(-1, n["H"], n["W"], n["C"]).mean(axis=(0, 3))
    return np.bincount(radius.ravel(), mean.ravel())


def hilo_flops(height, width, dim, *, num_heads, window, alpha):
    """HiLoCost of one layer on one image, as the released code counts: sides filled up to whole windows."""
    check_layer(dim, num_heads, window)
    hi, lo = (0, num_heads) if window == 1 else split_heads_hilo(num_heads, alpha)
    ch, cl = hi * dim // num_heads, lo * dim // num_heads
    M = -(-height // window) * -(-width // window)
    N = M * window**2
    hifi = N * dim * 3 * ch + 2 * M * window**4 * ch + N * ch**2
    lofi = N * dim * cl + 2 * M * dim * cl + 2 * N * M * cl + N * cl**2
    weights = 3 * dim * ch + ch**2 + 4 * ch + 3 * dim * cl + cl**2 + 4 * cl
    return HiLoCost(hifi + lofi, hifi, lofi, 4 * (2 * height * width * dim + weights))


def litv2_macs(cfg: LITv2Config, *, image_size=224):
    """Multiply-accumulates of `litv2_forward` on one square image."""
    side, C = image_size // 4, cfg.dim
    total = side**2 * 48 * C
    for i, (depth, heads, window) in enumerate(zip(cfg.depths, cfg.num_heads, cfg.windows, strict=True)):
        if i:  # four taps: eight offsets, and 2 C channels
            side, C = side // 2, 2 * C
            total += side**2 * 4 * (C // 2) * (8 + C)
        F = cfg.mlp_ratio * C
        block = side**2 * (2 * C * F + 9 * F)
        if window:
            block += hilo_flops(side, side, C, num_heads=heads, window=window, alpha=cfg.alpha).macs
        total += depth * block
    return total + C * cfg.classes


def check_layer(dim, num_heads, window):
    """Raises: ValueError unless num_heads divides dim and window is at least 1."""
    check_num_heads(dim, num_heads)
    at_least_one(window=window)


def _hifi(x, w_qkv, b_qkv, w_proj, b_proj, num_heads, window, valid):
    q, k, v = _parts(linear(to_windows(x, window), w_qkv, b_qkv), 3, num_heads)
    y = linear(join_heads(attention_dense(q, k, v, mask=_window_mask(valid, window))), w_proj, b_proj)
    return from_windows(y, *x.shape[1:3])


def _hifi_vjp(dy, x, w_qkv, b_qkv, w_proj, b_proj, num_heads, window, valid):
    tokens, mask = to_windows(x, window), _window_mask(valid, window)
    parts = _parts(linear(tokens, w_qkv, b_qkv), 3, num_heads)
    o = join_heads(attention_dense(*parts, mask=mask))
    do, dw_proj, db_proj = linear_vjp(o, w_proj, to_windows(dy, window), bias=b_proj is not None)
    dparts = attention_dense_vjp(*parts, split_heads(do, num_heads), mask=mask)
    dqkv = np.concatenate([join_heads(d) for d in dparts], axis=-1)
    dtokens, dw_qkv, db_qkv = linear_vjp(tokens, w_qkv, dqkv, bias=b_qkv is not None)
    return from_windows(dtokens, *x.shape[1:3]), dw_qkv, db_qkv, dw_proj, db_proj


def _lofi(x, w_q, b_q, w_kv, b_kv, w_proj, b_proj, num_heads, window, valid):
    q = split_heads(linear(map_rows(x), w_q, b_q), num_heads)
    k, v = _parts(linear(map_rows(_means(x, window, valid)), w_kv, b_kv), 2, num_heads)
    y = linear(join_heads(attention_dense(q, k, v)), w_proj, b_proj)
    return y.reshape(*x.shape[:3], y.shape[-1])


def _lofi_vjp(dy, x, w_q, b_q, w_kv, b_kv, w_proj, b_proj, num_heads, window, valid):
    tokens, means = map_rows(x), _means(x, window, valid)
    q = split_heads(linear(tokens, w_q, b_q), num_heads)
    k, v = _parts(linear(map_rows(means), w_kv, b_kv), 2, num_heads)
    o = join_heads(attention_dense(q, k, v))
    do, dw_proj, db_proj = linear_vjp(o, w_proj, map_rows(dy), bias=b_proj is not None)
    dq, dk, dv = (join_heads(d) for d in attention_dense_vjp(q, k, v, split_heads(do, num_heads)))
    dtokens, dw_q, db_q = linear_vjp(tokens, w_q, dq, bias=b_q is not None)
    dkv = np.concatenate([dk, dv], axis=-1)
    dmeans, dw_kv, db_kv = linear_vjp(map_rows(means), w_kv, dkv, bias=b_kv is not None)
    dmeans = dmeans.reshape(means.shape) / _pixels(x, window, valid)
    dx = dtokens.reshape(x.shape) + dmeans.repeat(window, axis=1).repeat(window, axis=2)
    return dx, dw_q, db_q, dw_kv, db_kv, dw_proj, db_proj


def _groups(params, hi, lo):
    """(function, its parameters, its heads) of the groups that have heads, Hi-Fi first."""
    both = (_hifi, tuple(params[6:]), hi), (_lofi, tuple(params[:6]), lo)
    return [group for group in both if group[2]]


def _prepare(x, params, num_heads, window, alpha, pad):
    """(x filled up to whole windows, which pixels [H', W'] are there, heads of Hi-Fi, heads of Lo-Fi)."""
    n = dims(x=(x, "B H W C"))
    check_layer(n["C"], num_heads, window)
    hi, lo = (0, num_heads) if window == 1 else split_heads_hilo(num_heads, alpha)
    size = n["C"] // num_heads
    if hi:
        dims(x=(x, "B H W C"), w_qkv=(params.w_qkv, f"C {3 * hi * size}"))
    if lo:
        dims(x=(x, "B H W C"), w_q=(params.w_q, f"C {lo * size}"), w_kv=(params.w_kv, f"C {2 * lo * size}"))
    if not pad:
        _check_window(x, window)
    valid = np.pad(np.ones((n["H"], n["W"]), bool), _fill(n, window))
    return np.pad(float64(x), ((0, 0), *_fill(n, window), (0, 0))), valid, hi, lo


def _fill(n, window):
    """What np.pad adds to the axes H and W."""
    return [(0, -n[axis] % window) for axis in "HW"]


def _window_mask(valid, window):
    """[M, 1, 1, window^2], or None where every pixel is there."""
    if valid is None or valid.all():
        return None
    return to_windows(valid[None, ..., None], window)[0, :, None, None, :, 0]


def _means(x, window, valid):
    return avg_pool_tokens(x, window) * (window**2 / _pixels(x, window, valid))


def _pixels(x, window, valid):
    """How many pixels of every window are there: [H / window, W / window, 1], or window^2."""
    if valid is None:
        return window**2
    return avg_pool_tokens(valid[None, ..., None], window)[0] * window**2


def _parts(x, n, num_heads):
    """The n equal parts of the channels, each split into heads."""
    return [split_heads(part, num_heads) for part in np.split(x, n, axis=-1)]


def _merge(x, p):
    """Halve the map, double the channels: offsets from the tokens, merging, batch norm, GELU."""
    _check_window(x, 2)
    offsets = conv2d(x, p.w_offset, p.b_offset, stride=2)
    offsets = offsets.reshape(*offsets.shape[:3], 4, 2)
    return gelu(batch_norm(deformable_token_merge(x, offsets, p.w, p.b), p.bn))


def _check_group(x, name, w, parts, w_proj, num_heads, window):
    """Channels of the group, from the columns of w, its `parts` projections side by side."""
    n = dims(x=(x, "B H W C"), **{name: (w, "C F")})
    width = n["F"] // parts
    dims(**{name: (w, f"C {parts * width}")}, w_proj=(w_proj, f"{width} F"))
    check_layer(width, num_heads, window)
    _check_window(x, window)
    return width


def _check_window(x, window):
    n = dims(x=(x, "B H W C"))
    if window < 1 or n["H"] % window or n["W"] % window:
        raise ValueError(
            f"window must divide the sides of x, got {window} for {n['H']} x {n['W']}; pad=True fills up"
        )
    return n


def example(seed=0):
    """Two handwritten digits, every pixel with its 4 x 4 surroundings as 16 channels."""
    from ref.blocks.conv import im2col
    from ref.data import digits

    rng = np.random.default_rng(seed)
    images = digits()[0][2 * seed : 2 * seed + 2, ..., None] / 16
    x = im2col(np.pad(images, ((0, 0), (1, 2), (1, 2), (0, 0))), (4, 4)).reshape(2, 8, 8, 16)
    cfg = LITv2Config(8, (1, 1, 1, 1), (1, 2, 4, 4), classes=10, mlp_ratio=2, alpha=0.5)
    net = init_litv2(rng, cfg, std=0.3)
    p = init_hilo(rng, 16, num_heads=4, alpha=0.5, std=0.3)
    at = {"num_heads": 4, "window": 2, "alpha": 0.5}
    group = {"num_heads": 2, "window": 2}
    offsets = rng.uniform(0.1, 0.9, (2, 4, 4, 4, 2))  # between pixels, where sampling is smooth
    w, b = rng.standard_normal((12, 16, 2, 2)), rng.standard_normal(12)
    block = init_litv2(rng, LITv2Config(4, (1, 1, 1, 1), (1, 1, 4, 4), alpha=0.5), std=0.3).blocks[2][0]
    img = np.repeat(images.repeat(4, axis=1).repeat(4, axis=2), 3, axis=-1)
    return [
        Example("hifi_attention", (x, *p[6:]), group, (0, 1, 2, 3, 4)),
        Example("lofi_attention", (x, *p[:6]), group, (0, 1, 2, 3, 4, 5, 6)),
        Example("hilo_attention", (x, p), at, (0, 1)),
        Example("hilo_attention", (x[:, :7, :5], p), {**at, "pad": True}, (0, 1)),
        Example("hilo_attention_backward", (x, x, p), at),
        Example("avg_pool_tokens", (x, 2), {}, (0,)),
        Example("deformable_token_merge", (x, offsets, w, b), {}, (0, 1, 2, 3)),
        Example("dw_mlp", (x, block.mlp), {}, (0, 1)),
        Example("litv2_block", (x, block), at, (0, 1)),
        Example("litv2_forward", (img, net, cfg)),
    ]
