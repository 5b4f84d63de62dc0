"""Adapters: a thin branch beside the MLP of a frozen transformer block, and the block with it.

Source: Chen et al. 2022 (arXiv 2205.13535), section 3.2, and the code released with it, whose branch reads
the residual stream before the norm of the MLP (the paper's equation, as recalled, writes LN(x); here
layernorm="in").
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import linear, linear_vjp, mlp, mlp_vjp, relu
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.transformer import BlockParams, self_attention, self_attention_vjp
from ref.checks import at_least_one, check_num_heads, one_of
from ref.dims import dims, float64

OPTIONS, LAYERNORMS = ("parallel", "sequential"), ("none", "in", "out")


class AdapterParams(NamedTuple):
    """One branch of width r: w_down [d, r], b_down [r], w_up [r, d], b_up [d].

    ln_scale and ln_bias [d] exist for layernorm "in" or "out", scale [] for the learnable factor.
    """

    w_down: np.ndarray
    b_down: np.ndarray
    w_up: np.ndarray
    b_up: np.ndarray
    ln_scale: np.ndarray | None = None
    ln_bias: np.ndarray | None = None
    scale: np.ndarray | None = None


def adapter(x, params: AdapterParams, *, scale=0.1, layernorm="none", eps=1e-5, dropout_mask=None):
    """s (relu(x W_down + b_down) W_up + b_up): x [..., d] -> [..., d].

    scale: s; None takes params.scale, and one of the two must be given. layernorm: "in" normalises x first,
    "out" the result. dropout_mask: None, or factors [..., r] on the hidden layer, 0 or 1 / (1 - p).
    Raises: ValueError naming the argument at fault.
    """
    s = _check_adapter(x, params, scale, layernorm)
    *_, up = _hidden(float64(x), params, layernorm, eps, dropout_mask)
    return layer_norm(s * up, params.ln_scale, params.ln_bias, eps=eps) if layernorm == "out" else s * up


def adapter_backward(x, params: AdapterParams, ddelta, *, scale=0.1, layernorm="none", eps=1e-5,
                     dropout_mask=None):  # fmt: skip
    """(dx, AdapterParams of gradients) of `adapter` for ddelta [..., d]; None for a fixed s."""
    s = _check_adapter(x, params, scale, layernorm)
    x, g, norm = float64(x), float64(ddelta), (None, None)
    base, u, h, up = _hidden(x, params, layernorm, eps, dropout_mask)
    if layernorm == "out":
        g, *norm = layer_norm_vjp(s * up, params.ln_scale, g, eps=eps)
    dh, dw_up, db_up = linear_vjp(h, params.w_up, s * g)
    du = dh * (u > 0) * (1.0 if dropout_mask is None else dropout_mask)
    dx, dw_down, db_down = linear_vjp(base, params.w_down, du)
    if layernorm == "in":
        dx, *norm = layer_norm_vjp(x, params.ln_scale, dx, eps=eps)
    return dx, AdapterParams(
        dw_down, db_down, dw_up, db_up, *norm, None if scale is not None else (g * up).sum()
    )


def adapted_block(x, block_params: BlockParams, adapter_params: AdapterParams, *, num_heads,
                  option="parallel", scale=0.1, layernorm="none", eps=1e-6, adapter_eps=1e-5,
                  dropout_mask=None):  # fmt: skip
    """A pre-norm block with the branch at its MLP: x [..., L, d] -> [..., L, d].

    x1 = x + attention(LN1 x); z = MLP(LN2 x1). option "parallel": x1 + z + adapter(x1); "sequential":
    x1 + z + adapter(z). Other options: see `adapter`, whose eps is adapter_eps.
    """
    branch = {"scale": scale, "layernorm": layernorm, "eps": adapter_eps, "dropout_mask": dropout_mask}
    return run_block(x, block_params, adapter_params, branch, option, num_heads=num_heads, eps=eps)


def adapted_block_backward(x, block_params: BlockParams, adapter_params: AdapterParams, dy, *, num_heads,
                           option="parallel", scale=0.1, layernorm="none", eps=1e-6, adapter_eps=1e-5,
                           dropout_mask=None):  # fmt: skip
    """(dx, None, AdapterParams of gradients) of `adapted_block` for dy [..., L, d]: the block is frozen."""
    branch = {"scale": scale, "layernorm": layernorm, "eps": adapter_eps, "dropout_mask": dropout_mask}
    dx, _, da = block_vjp(x, block_params, adapter_params, dy, branch, option, num_heads, eps)
    return dx, None, da


def adapter_init(rng, dim, bottleneck, *, layernorm="none", learnable_scale=False):
    """A branch that adds exactly 0: W_down uniform in +-1/sqrt(d), W_up and biases 0, a learnable scale 1."""
    at_least_one(bottleneck=bottleneck)
    _check_layernorm(layernorm)
    norm = (None, None) if layernorm == "none" else (np.ones(dim), np.zeros(dim))
    bound = 1 / np.sqrt(dim)
    return AdapterParams(
        rng.uniform(-bound, bound, (dim, bottleneck)), np.zeros(bottleneck), np.zeros((bottleneck, dim)),
        np.zeros(dim), *norm, np.ones(()) if learnable_scale else None,
    )  # fmt: skip


def run_block(x, p, a, branch, option, *, num_heads, eps, norm="pre", activation="gelu", **attention):
    """The block p with branch a (options `branch`), or the plain one if a is None.

    norm "post" is ln2(x1 + MLP(x1) + adapter(x1)), x1 = ln1(x + attention(x)). attention: causal, mask.
    """
    _check_block(p, num_heads, option)
    ln1 = lambda x: layer_norm(x, p.ln1_scale, p.ln1_bias, eps=eps)
    ln2 = lambda x: layer_norm(x, p.ln2_scale, p.ln2_bias, eps=eps)
    feed = lambda x: mlp(x, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2, activation=activation)
    x = float64(x)
    if norm == "post":
        x1 = ln1(x + self_attention(x, p, num_heads=num_heads, **attention))
        return ln2(x1 + feed(x1) + adapter(x1, a, **branch))
    x1 = x + self_attention(ln1(x), p, num_heads=num_heads, **attention)
    z = feed(ln2(x1))
    return x1 + z if a is None else x1 + z + adapter(x1 if option == "parallel" else z, a, **branch)


def block_vjp(x, p, a, dy, branch, option, num_heads, eps):
    """(dx, BlockParams of gradients, AdapterParams of gradients or None) of the pre-norm `run_block`."""
    _check_block(p, num_heads, option)
    x, dy = float64(x, dy)
    h1 = layer_norm(x, p.ln1_scale, p.ln1_bias, eps=eps)
    x1 = x + self_attention(h1, p, num_heads=num_heads)
    h2, weights = layer_norm(x1, p.ln2_scale, p.ln2_bias, eps=eps), (p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2)
    dx1, dz, da = dy, dy, None
    if a is not None:
        at = x1 if option == "parallel" else mlp(h2, *weights)
        d, da = adapter_backward(at, a, dy, **branch)
        dx1, dz = (dy + d, dy) if option == "parallel" else (dy, dy + d)
    d, *g_mlp = mlp_vjp(h2, *weights, dz)
    d, s2, b2 = layer_norm_vjp(x1, p.ln2_scale, d, eps=eps)
    dx1 = dx1 + d
    d, g_attn = self_attention_vjp(h1, p, dx1, num_heads=num_heads)
    d, s1, b1 = layer_norm_vjp(x, p.ln1_scale, d, eps=eps)
    g_mlp = dict(zip(("w_fc1", "b_fc1", "w_fc2", "b_fc2"), g_mlp, strict=True))
    return dx1 + d, BlockParams(ln1_scale=s1, ln1_bias=b1, ln2_scale=s2, ln2_bias=b2, **g_attn, **g_mlp), da


def _hidden(x, p, layernorm, eps, dropout_mask):
    base = layer_norm(x, p.ln_scale, p.ln_bias, eps=eps) if layernorm == "in" else x
    u = linear(base, p.w_down, p.b_down)
    h = relu(u) * (1.0 if dropout_mask is None else dropout_mask)
    return base, u, h, linear(h, p.w_up, p.b_up)


def _check_adapter(x, p, scale, layernorm):
    dims(x=(x, "... d"), w_down=(p.w_down, "d r"), b_down=(p.b_down, "r"))
    dims(w_down=(p.w_down, "d r"), w_up=(p.w_up, "r d"), b_up=(p.b_up, "d"))
    _check_layernorm(layernorm)
    if layernorm != "none" and p.ln_scale is None:
        raise ValueError(f'layernorm="{layernorm}" needs ln_scale and ln_bias in the adapter')
    if (scale is None) == (p.scale is None):
        raise ValueError("give scale, or a learnable params.scale with scale=None: exactly one of the two")
    return p.scale if scale is None else scale


def _check_layernorm(layernorm):
    one_of("layernorm", layernorm, LAYERNORMS)


def _check_block(p, num_heads, option):
    one_of("option", option, OPTIONS)
    check_num_heads(p.w_q.shape[-1], num_heads)
