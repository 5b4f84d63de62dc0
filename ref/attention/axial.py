"""Axial attention, and images drawn pixel by pixel by a transformer made of it.

Source: Ho, Kalchbrenner, Weissenborn and Salimans 2019 (arXiv 1912.12180), sections 2 and 3, and the released
code (blocks, initialisation, the division by 255). `axial_attention` is the second public form, one layer
whose axes add up or follow one another. Ours: `axial_video_logits`, the same structure one dimension up.
"""

from functools import cached_property

import numpy as np

from ref.blocks import transformer
from ref.blocks.attention import attention_dense
from ref.blocks.conv import conv2d, conv2d_vjp
from ref.blocks.mlp import linear, linear_vjp
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.optim import tree_map
from ref.blocks.softmax import logsumexp, softmax
from ref.blocks.transformer import AttentionParams, BlockParams
from ref.checks import check_ids, check_num_heads
from ref.dims import dims, float64
from ref.example import Example
from ref.models.axial import AxialConfig, AxialParams, ExteriorParams, init_axial

__all__ = [
    "AxialConfig", "AxialParams", "ExteriorParams", "axial_attention", "axial_cost", "axial_grad",
    "axial_logits", "axial_nll", "axial_video_logits", "axis_attention", "example", "init_axial",
    "sample_naive", "sample_semi_parallel", "shift", "transformer_block",
]  # fmt: skip


def axis_attention(q, k, v, *, axis, causal=False, scale=None):
    """Attention along one axis, each line of it alone: q, k, v [B, S1, .., Sn, h, d] -> the same shape.

    axis: 1..n. causal: a position sees those up to itself. scale: None is 1 / sqrt(d).
    """
    _check_axis(axis, q.ndim - 3)
    lines = (np.moveaxis(np.asanyarray(x), axis, -2) for x in (q, k, v))  # [.., h, S, d]
    return np.moveaxis(attention_dense(*lines, causal=causal, scale=scale), -2, axis)


def axial_attention(
    x, params: tuple[AttentionParams, ...], *, axes, num_heads, causal=False, mode="sequential"
):
    """Attention along every axis of x [B, S1, .., Sn, D], with maps of its own for each.

    Args: params: one AttentionParams for each of axes (1..n). mode: "sum" adds the results, "sequential"
      gives each to the next.
    """
    if mode not in ("sum", "sequential"):
        raise ValueError(f'mode must be "sum" or "sequential", got {mode!r}')
    if len(params) != len(axes):
        raise ValueError(f"params must hold one entry for each of {len(axes)} axes, got {len(params)}")
    for p in params:
        check_num_heads(p.w_q.shape[-1], num_heads)
    y, total = float64(x), 0.0
    for axis, p in zip(axes, params, strict=True):
        heads = (linear(y, w).reshape(*y.shape[:-1], num_heads, -1) for w in (p.w_q, p.w_k, p.w_v))
        o = axis_attention(*heads, axis=axis, causal=causal)
        out = linear(o.reshape(*y.shape[:-1], -1), p.w_o, p.b_o)
        if mode == "sequential":
            y = out
        total = total + out
    return y if mode == "sequential" else total


def shift(x, *, axis, num=1):
    """x moved by num along an axis (1..ndim - 1), zeros where it came from; shift by -num is the adjoint."""
    _check_axis(axis, x.ndim - 1)
    num, size = int(np.clip(num, -x.shape[axis], x.shape[axis])), x.shape[axis]
    pad = [(0, 0)] * x.ndim
    pad[axis] = (max(num, 0), max(-num, 0))
    kept = [slice(None)] * x.ndim
    kept[axis] = slice(max(-num, 0), size - max(num, 0))
    return np.pad(np.asanyarray(x)[tuple(kept)], pad)


def transformer_block(x, params: BlockParams, *, axis, num_heads, causal=False):
    """The pre-norm block along one axis of x [B, S1, .., Sn, D]; its MLP has x sigmoid(1.702 x)."""
    _check_axis(axis, x.ndim - 2)
    lines = np.moveaxis(x, axis, -2)
    y = transformer.transformer_block(
        lines, params, num_heads=num_heads, causal=causal, activation="quick_gelu"
    )
    return np.moveaxis(y, -2, axis)


def axial_logits(params: AxialParams, x, *, config: AxialConfig, cond=None):
    """Logits of every value given those before it in raster order (channel by channel, if there are several).

    Args: x int [B, H, W] -> [B, H, W, K], or with channels [B, H, W, C] -> [B, H, W, C, K]. cond:
      [B, H, W, D], added to the context of every position.
    """
    _check_image(x, params, config)
    if config.channels == 1:
        return _Slice(params, x, config, cond).logits
    extra = 0.0 if cond is None else cond
    slices = [_Exterior(params, x, c, config) for c in range(config.channels)]
    return np.stack(
        [_Slice(params, x[..., c], config, s.cond + extra).logits for c, s in enumerate(slices)], axis=-2
    )


def axial_nll(params: AxialParams, x, *, config: AxialConfig, slice_index=None):
    """-log2 p of every value of x, in bits, in the shape of x; slice_index: of one channel, [B, H, W]."""
    _check_slice(config, slice_index)
    if config.channels == 1 or slice_index is None:
        return _bits(axial_logits(params, x, config=config), x)
    _check_image(x, params, config)
    cond = _Exterior(params, x, slice_index, config).cond
    return _bits(_Slice(params, x[..., slice_index], config, cond).logits, x[..., slice_index])


def axial_grad(params: AxialParams, x, *, config: AxialConfig, slice_index=None) -> AxialParams:
    """Gradient of the mean of `axial_nll`; that of one channel, drawn at random, is right on average."""
    _check_slice(config, slice_index)
    _check_image(x, params, config)
    if config.channels == 1:
        model = _Slice(params, x, config, None)
        return model.backward(_bits_vjp(model.logits, x))[0]
    drawn = range(config.channels) if slice_index is None else [slice_index]
    total = None
    for c in drawn:
        exterior = _Exterior(params, x, c, config)
        model = _Slice(params, x[..., c], config, exterior.cond)
        grads, dcond = model.backward(_bits_vjp(model.logits, x[..., c]) / len(drawn))
        grads = grads._replace(exterior=exterior.backward(dcond))
        total = grads if total is None else tree_map(np.add, total, grads)
    return total


def sample_semi_parallel(params: AxialParams, gumbel, *, config: AxialConfig):
    """The image int32 whose every value is argmax(logits + gumbel): the outer stack runs once a row.

    Args: gumbel [B, H, W, K], or [B, H, W, C, K]: drawn noise -log(-log u), times a temperature.
    """
    x, channels = _empty(params, gumbel, config)
    for c in channels:
        image, noise = _channel(x, c), _channel(gumbel, c, 3)
        cond = 0.0 if c is None else _Exterior(params, x, c, config).cond
        base = float64(params.pos_h)[:, None] + params.pos_w + cond
        for h in range(config.height):
            row = slice(h, h + 1)
            known = _Slice(params, image, config, cond).context[:, row] + base[..., row, :, :]
            for w in range(config.width):
                start = shift(float64(params.embs)[image[:, row]], axis=2) + known
                last = _stack(start, params.inner, [(2, True)] * config.num_inner, config)[-1]
                image[:, h, w] = np.argmax(_head(last[:, 0, w], params) + noise[:, h, w], axis=-1)
    return x


def sample_naive(params: AxialParams, gumbel, *, config: AxialConfig):
    """The same image by the whole network at every value."""
    x, channels = _empty(params, gumbel, config)
    for c in channels:
        image, noise = _channel(x, c), _channel(gumbel, c, 3)
        for h, w in np.ndindex(config.height, config.width):
            cond = None if c is None else _Exterior(params, x, c, config).cond
            logits = _Slice(params, image, config, cond).logits[:, h, w]
            image[:, h, w] = np.argmax(logits + noise[:, h, w], axis=-1)
    return x


def axial_video_logits(params: AxialParams, x, *, config: AxialConfig):
    """Logits [B, T, H, W, K] of every value given the frames before it and, in its own, the pixels before it.

    Args: x int [B, T, H, W]. The exterior blocks see all frames' embeddings, along rows, columns and causal
      time in turn; shifted by one frame they condition the image model. One frame is the image model.
    """
    c = config
    dims(x=(x, f"B T {c.height} {c.width}"))
    if c.channels != 1 or params.exterior is None:
        raise ValueError("video needs channels=1 and num_exterior >= 1")
    check_ids("x", x, c.num_embs)
    p = params.exterior.pos_h[:, None] + params.exterior.pos_w
    plan = [((3, False), (2, False), (1, True))[n % 3] for n in range(c.num_exterior)]
    past = _stack(float64(params.embs)[x] + p, params.exterior.blocks, plan, c)[-1]
    cond = shift(past, axis=1).reshape(-1, *past.shape[2:])
    frames = np.asarray(x).reshape(-1, c.height, c.width)
    return _Slice(params, frames, c, cond).logits.reshape(*x.shape, c.num_embs)


def axial_cost(shape, *, emb_dim, num_heads, hdim_factor=1, num_outer, num_inner, num_exterior=0):
    """Multiply-accumulates and bytes of the blocks on one image of shape (H, W) or (H, W, C).

    Returns: dict of macs (one pass, every channel), full_attention_macs (the same blocks with attention over
    all H W positions), macs_sample_naive, macs_sample_semi_parallel, and bytes: float32 weights once and what
    every block reads and writes, a channel after the other. Embeddings, convolution and logits are left out.
    """
    H, W, C = (*shape, 1)[:3]
    if min(H, W, C) < 1 or emb_dim % num_heads or num_outer % 2:
        raise ValueError(
            f"need a shape, num_heads dividing emb_dim, an even num_outer; got {shape}, {num_heads=}"
        )
    D, N = emb_dim, H * W
    maps = (4 + 2 * hdim_factor) * D * D  # a position
    stack = lambda n, full=False: sum(N * (maps + 2 * (N if full else (W, H)[i % 2]) * D) for i in range(n))
    row = W * (maps + 2 * W * D)  # an inner block on one row
    inner, full_inner = num_inner * H * row, num_inner * N * (maps + 2 * N * D)
    context = stack(num_outer)
    blocks = num_outer + num_inner + num_exterior
    return {
        "macs": C * (stack(num_exterior) + context + inner),
        "full_attention_macs": C * (stack(num_exterior, True) + stack(num_outer, True) + full_inner),
        "macs_sample_naive": C * N * (stack(num_exterior) + context + inner),
        "macs_sample_semi_parallel": C * (stack(num_exterior) + H * context + N * num_inner * row),
        "bytes": 4 * blocks * (maps + C * 2 * N * D),
    }


class _Slice:
    """One channel through the model: the context of the rows above, then the row itself; all inputs kept."""

    def __init__(self, params, x, config, cond):
        self.params, self.x, self.config = params, np.asarray(x), config
        e = float64(params.embs)[self.x]
        base = float64(params.pos_h)[:, None] + params.pos_w + (0.0 if cond is None else cond)
        self.outer_plan = [((2, False), (1, True))[i % 2] for i in range(config.num_outer)]
        self.inner_plan = [(2, True)] * config.num_inner
        self.outer = _stack(e + base, params.outer, self.outer_plan, config)
        self.context = shift(self.outer[-1], axis=1)  # position (h, w) knows the rows above h
        self.start = shift(e, axis=2) + self.context + base

    @cached_property
    def inner(self):
        """The row stack's input and the output of every block; not needed for the context alone."""
        return _stack(self.start, self.params.inner, self.inner_plan, self.config)

    @property
    def logits(self):
        """[B, H, W, K]."""
        return _head(self.inner[-1], self.params)

    def backward(self, dlogits):
        """(AxialParams of gradients without the exterior, dcond [B, H, W, D])."""
        p = self.params
        h = layer_norm(self.inner[-1], p.ln_scale, p.ln_bias)
        dh, dw_head, db_head = linear_vjp(h, p.w_head, dlogits)
        dstart, dscale, dbias = layer_norm_vjp(self.inner[-1], p.ln_scale, dh)
        dstart, inner = _stack_vjp(self.inner, p.inner, self.inner_plan, self.config, dstart)
        dcontext = shift(dstart, axis=1, num=-1)
        dfirst, outer = _stack_vjp(self.outer, p.outer, self.outer_plan, self.config, dcontext)
        de, dbase = shift(dstart, axis=2, num=-1) + dfirst, dstart + dfirst
        dembs = np.zeros_like(p.embs, dtype=np.float64)
        np.add.at(dembs, self.x, de)
        dpos = dbase.sum(axis=(0, 2)), dbase.sum(axis=(0, 1))
        return AxialParams(dembs, *dpos, outer, inner, dscale, dbias, dw_head, db_head), dbase


class _Exterior:
    """The context of channel c: the channels before it, through a convolution and unmasked blocks."""

    def __init__(self, params, x, c, config):
        self.params, self.config, x = params.exterior, config, np.asarray(x)
        C = config.channels
        known = np.where(np.arange(C) < c, x, 0) / 255.0  # whatever num_embs is, as released
        planes = np.broadcast_to(np.arange(C) == c, x.shape)
        self.image = np.concatenate([known, planes], axis=-1)
        e = conv2d(self.image, self.params.w_conv, self.params.b_conv, padding=1)
        self.plan = [((2, False), (1, False))[i % 2] for i in range(config.num_exterior)]
        start = e + self.params.pos_h[:, None] + self.params.pos_w
        self.inputs = _stack(start, self.params.blocks, self.plan, config)
        self.cond = self.inputs[-1]

    def backward(self, dcond):
        """ExteriorParams of gradients."""
        d, blocks = _stack_vjp(self.inputs, self.params.blocks, self.plan, self.config, dcond)
        _, dw, db = conv2d_vjp(self.image, self.params.w_conv, d, padding=1)
        return ExteriorParams(dw, db, d.sum(axis=(0, 2)), d.sum(axis=(0, 1)), blocks)


def _stack(x, blocks, plan, config):
    """[x, the output of every block]; plan: (axis, causal) of each."""
    inputs = [x]
    for p, (axis, causal) in zip(blocks, plan, strict=True):
        inputs.append(transformer_block(inputs[-1], p, axis=axis, num_heads=config.num_heads, causal=causal))
    return inputs


def _stack_vjp(inputs, blocks, plan, config, d):
    """(dx, gradients of the blocks), from what `_stack` returned."""
    grads = []
    for x, p, (axis, causal) in zip(inputs[-2::-1], blocks[::-1], plan[::-1], strict=True):
        lines = (np.moveaxis(a, axis, -2) for a in (x, d))
        x, d = next(lines), next(lines)
        d, g = transformer.transformer_block_vjp(
            x, p, d, num_heads=config.num_heads, causal=causal, activation="quick_gelu"
        )
        d = np.moveaxis(d, -2, axis)
        grads.append(g)
    return d, tuple(grads[::-1])


def _head(x, params):
    return linear(layer_norm(x, params.ln_scale, params.ln_bias), params.w_head, params.b_head)


def _bits(logits, x):
    own = np.take_along_axis(logits, np.asarray(x)[..., None], axis=-1)[..., 0]
    return (logsumexp(logits) - own) / np.log(2)


def _bits_vjp(logits, x):
    """Cotangent of the logits for the mean of `_bits`."""
    one_hot = np.arange(logits.shape[-1]) == np.asarray(x)[..., None]
    return (softmax(logits) - one_hot) / np.log(2) / np.asarray(x).size


def _empty(params, gumbel, config):
    """(an image of zeros int32, its channels in order; one that is None for a single channel)."""
    c = config
    shape = (c.height, c.width) if c.channels == 1 else (c.height, c.width, c.channels)
    dims(gumbel=(gumbel, f"B {' '.join(map(str, shape))} {c.num_embs}"))
    return np.zeros((len(gumbel), *shape), np.int32), [None] if c.channels == 1 else range(c.channels)


def _channel(x, c, axis=-1):
    """A view of channel c, or of all where there is but one."""
    return x if c is None else np.moveaxis(x, axis, 0)[c]


def _check_axis(axis, last):
    if not 1 <= axis <= last:
        raise ValueError(f"axis must be in 1..{last}, got {axis}")


def _check_slice(config, slice_index):
    if slice_index is not None and not 0 <= slice_index < config.channels:
        raise ValueError(f"slice_index must be in 0..{config.channels - 1}, got {slice_index}")


def _check_image(x, params, config):
    c = config
    dims(x=(x, f"B {c.height} {c.width}" + (f" {c.channels}" if c.channels > 1 else "")))
    dims(pos_h=(params.pos_h, f"{c.height} {c.emb_dim}"), pos_w=(params.pos_w, f"{c.width} {c.emb_dim}"))
    dims(embs=(params.embs, f"{c.num_embs} {c.emb_dim}"))
    check_ids("x", x, c.num_embs)


def example(seed=0):
    """A model of handwritten digits, its noise, and attention over their pixels; weights are random."""
    from ref.data import digits

    rng = np.random.default_rng(seed)
    config = AxialConfig(8, 8, 1, 17, 8, 2)
    images = digits()[0][:2].astype(np.int32)
    near = init_axial(rng, config)
    params = tree_map(lambda a: a + 0.1 * rng.standard_normal(a.shape), near)
    x = rng.standard_normal((2, 3, 8, 8))
    w = lambda *shape: rng.standard_normal(shape) / 3
    maps = tuple(AttentionParams(w(8, 6), w(8, 6), w(8, 6), w(6, 8), w(8)) for _ in range(2))
    q, k, v = rng.standard_normal((3, 2, 3, 8, 2, 4))
    small = AxialConfig(4, 4, 1, 17, 8, 2)
    crop = params._replace(pos_h=params.pos_h[:4], pos_w=params.pos_w[:4])
    gumbel = rng.gumbel(size=(1, 4, 4, 17))
    clip = AxialConfig(4, 4, 1, 17, 8, 2, num_exterior=3)
    frames = np.stack([images[:, :4, :4], images[:, 4:, :4]], axis=1)
    return [
        Example("axis_attention", (q, k, v), {"axis": 2}, (0, 1, 2)),
        Example("axial_attention", (x, maps), {"axes": (1, 2), "num_heads": 2, "mode": "sum"}, (0, 1)),
        Example("shift", (x,), {"axis": 2}, (0,)),
        Example(
            "transformer_block", (x, params.outer[0]), {"axis": 1, "num_heads": 2, "causal": True}, (0, 1)
        ),
        Example("axial_logits", (params, images), {"config": config}, (0,)),
        Example("axial_nll", (params, images), {"config": config}, (0,)),
        Example("axial_grad", (params, images), {"config": config}),
        Example("sample_semi_parallel", (crop, gumbel), {"config": small}),
        Example("sample_naive", (crop, gumbel), {"config": small}),
        Example("axial_video_logits", (init_axial(rng, clip), frames), {"config": clip}, (0,)),
    ]
