"""DependencyViT: attention turned round. Each token sends one message, and says to whom.

Source: Ding et al. 2023 (arXiv 2304.03282). Its repository holds no code; where the paper is short this
follows the third-party port that the golden vectors come from. Ours: the controller's biases, its start near
1, how a tree is taken from the masks, and that equal scores rank by index.
"""

import numpy as np

from ref.blocks.attention import join_heads, split_heads
from ref.blocks.importance import top_indices
from ref.blocks.merging import take_rows
from ref.blocks.mlp import gelu, gelu_grad, linear, linear_vjp, mlp, sigmoid
from ref.blocks.norms import layer_norm
from ref.blocks.softmax import softmax, softmax_vjp
from ref.blocks.transformer import qkv
from ref.blocks.trees import cut_tree, spanning_tree, subtree_sizes, tree_depth
from ref.checks import check_num_heads, one_of
from ref.dims import dims, float64
from ref.example import Example
from ref.models.dependencyvit import (
    DependencyAttentionParams,
    DependencyAux,
    DependencyBlockParams,
    DependencyViTConfig,
    dependencyvit_macs,
    dependencyvit_token_schedule,
    init_dependencyvit,
)
from ref.models.vit import ViTParams, embed_patches

__all__ = [
    "DependencyAttentionParams", "DependencyAux", "DependencyBlockParams", "DependencyViTConfig", "cut_tree",
    "dependency_block", "dependency_tree", "dependencyvit_forward", "dependencyvit_macs",
    "dependencyvit_token_schedule", "example", "head_selector", "init_dependencyvit", "message_controller",
    "reversed_attention", "reversed_attention_layer", "reversed_attention_layer_backward",
    "reversed_attention_vjp", "subtree_sizes", "tree_depth",
]  # fmt: skip

SCORES = ("message", "sent", "received")


def reversed_attention(q, k, v, *, head_weights=None, message=None, scale=None, return_mask=False):
    """out_j = sum_i softmax_j(scale q_i k_j) P_i M_i v_i: the rows of attention say where to send.

    Args: q, k [B, H, N, d], v [B, H, N, Dv]. head_weights: P [B, N, H], how a sender divides itself among
        heads; None is 1 in each. message: M [B, N] in [0, 1], how much it sends; None is 1. scale: None is
        1 / sqrt(d).
    Returns: out [B, H, N, Dv], and with return_mask (out, mask [B, N receivers, N senders]): what every token
      gets of every other, summed over heads. With P summing to 1 its columns sum to M.
    Raises: ValueError for shapes that disagree or a message outside [0, 1].
    """
    sent = _sent(*_prepare(q, k, v, head_weights, message, scale))
    received = np.swapaxes(sent, -1, -2)
    out = received @ float64(v)
    return (out, received.sum(axis=-3)) if return_mask else out


def reversed_attention_vjp(q, k, v, dout, *, head_weights=None, message=None, scale=None):
    """(dq, dk, dv, dhead_weights, dmessage) of `reversed_attention` for dout [B, H, N, Dv]."""
    A, P, M, scale = _prepare(q, k, v, head_weights, message, scale)
    q, k, v, dout = float64(q, k, v, dout)
    dsent = v @ np.swapaxes(dout, -1, -2)  # [B, H, senders, receivers]
    dgate = (dsent * A).sum(axis=-1)
    ds = scale * softmax_vjp(A, dsent * (P * M)[..., None])
    dP, dM = np.swapaxes(dgate * M, -1, -2), (dgate * P).sum(axis=-2)
    return ds @ k, np.swapaxes(ds, -1, -2) @ q, _sent(A, P, M, scale) @ dout, dP, dM


def head_selector(x, w, *, temperature=0.1):
    """P = softmax over heads of x w / temperature: x [B, N, C], w [C, H] -> [B, N, H].

    Raises: ValueError for a temperature that is not positive.
    """
    dims(x=(x, "B N C"), w=(w, "C H"))
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return softmax(linear(x, w) / temperature)


def message_controller(x, w1, w2, *, b1=None, b2=None):
    """m = sigmoid(gelu(x w1 + b1) w2 + b2): x [B, N, C], w1 [C, G], w2 [G, 1] -> [B, N] in (0, 1)."""
    dims(x=(x, "B N C"), w1=(w1, "C G"), w2=(w2, "G 1"))
    return sigmoid(linear(gelu(linear(x, w1, b1)), w2, b2))[..., 0]


def reversed_attention_layer(x, message_in, params: DependencyAttentionParams, *, num_heads, temperature=0.1):
    """(out [B, N, C], message_out [B, N], mask [B, N, N]) for the normalised tokens x [B, N, C].

    message_out = message_in times this layer's m, so a token never speaks up again.
    Raises: ValueError naming the argument at fault.
    """
    heads, P, _, message = _layer(x, message_in, params, num_heads, temperature)
    out, mask = reversed_attention(*heads, head_weights=P, message=message, return_mask=True)
    return linear(join_heads(out), params.w_o, params.b_o), message, mask


def reversed_attention_layer_backward(
    dout, dmessage, x, message_in, params: DependencyAttentionParams, *, num_heads, temperature=0.1
):
    """(dx, dmessage_in, dparams) for dout [B, N, C] and dmessage [B, N], the cotangent of message_out."""
    p, x = params, float64(x)
    heads, P, m, message = _layer(x, message_in, p, num_heads, temperature)
    out = join_heads(reversed_attention(*heads, head_weights=P, message=message))
    do, dw_o, db_o = linear_vjp(out, p.w_o, float64(dout), bias=p.b_o is not None)
    *dheads, dP, dM = reversed_attention_vjp(
        *heads, split_heads(do, num_heads), head_weights=P, message=message
    )
    dM = dM + dmessage
    grads, dx = {"w_o": dw_o, "b_o": db_o}, 0.0
    for name, d in zip("qkv", dheads, strict=True):
        w, b = getattr(p, f"w_{name}"), getattr(p, f"b_{name}")
        part, grads[f"w_{name}"], grads[f"b_{name}"] = linear_vjp(x, w, join_heads(d), bias=b is not None)
        dx = dx + part
    part, grads["w_select"], _ = linear_vjp(x, p.w_select, softmax_vjp(P, dP) / temperature)
    h = linear(x, p.w_gate1, p.b_gate1)
    dlogit = (dM * message_in * m * (1 - m))[..., None]
    dh, grads["w_gate2"], grads["b_gate2"] = linear_vjp(
        gelu(h), p.w_gate2, dlogit, bias=p.b_gate2 is not None
    )
    from_gate, grads["w_gate1"], grads["b_gate1"] = linear_vjp(
        x, p.w_gate1, dh * gelu_grad(h), bias=p.b_gate1 is not None
    )
    return dx + part + from_gate, dM * m, DependencyAttentionParams(**grads)


def dependency_block(
    x, message, params: DependencyBlockParams, *, num_heads, temperature=0.1, prune_to=None, score="message",
    eps=1e-5,
):  # fmt: skip
    """(x, message, kept): x + attention(LN(x)), the best tokens of it, x + mlp(LN(x)).

    Args: x [B, N, C], message [B, N]. prune_to: tokens that go on, by falling score, equal ones by rising
        index; None keeps all in order. score: "message", the new M; "sent", the mass a token sends (M again);
        "received", the mass it gets.
    Returns: x [B, n, C], message [B, n], kept [B, n] int32, places in the x given.
    """
    x, message, kept, _, _ = _block(x, message, params, num_heads, temperature, prune_to, score, eps)
    return x, message, kept


def dependencyvit_forward(img, params: ViTParams, cfg: DependencyViTConfig, *, features=False):
    """(logits [B, classes], DependencyAux) of images [B, H, W, 3]; with features tokens, not logits.

    The tokens [B, n, C] are those after the final norm, times M_L (before it, unless gate_after_norm); logits
    are of their mean. params: `ViTParams` without class token, whose blocks are `DependencyBlockParams`.
    """
    x = embed_patches(img, params)
    message = np.ones_like(x, shape=x.shape[:2])
    places = np.broadcast_to(np.arange(x.shape[1], dtype=np.int32), x.shape[:2])
    counts = dependencyvit_token_schedule(x.shape[1], layers=cfg.prune_layers, ratio=cfg.prune_ratio)
    left, aux = dict(zip(cfg.prune_layers, counts, strict=True)), []
    for l, p in enumerate(params.blocks, start=1):
        options = (cfg.num_heads, cfg.temperature, left.get(l), cfg.score, 1e-5)
        x, message, kept, sent, mask = _block(x, message, p, *options)
        places = np.take_along_axis(places, kept, axis=-1)
        aux.append((sent, mask, places))
    gate = message[..., None]
    norm = lambda x: layer_norm(x, params.norm_scale, params.norm_bias)
    x = norm(x) * gate if cfg.gate_after_norm else norm(x * gate)
    aux = DependencyAux(*(tuple(a) for a in zip(*aux, strict=True)))
    return (x if features else linear(x.mean(axis=-2), params.w_head, params.b_head)), aux


def dependency_tree(mask, *, root=None, method="edmonds"):
    """Parents [N], the root's -1: every token hangs on one that it sends much to.

    Args: mask [N receivers, N senders], of a layer or a mean over layers. root: None takes the token that
      receives most beyond what it sends. method: "edmonds", the tree of largest mass; "greedy".
    Raises: ValueError for fewer than 2 tokens and as `spanning_tree`.
    """
    dims(mask=(mask, "N N"))
    score = float64(mask).T.copy()  # [child, parent]
    np.fill_diagonal(score, 0)
    if root is None:
        root = int((score.sum(axis=0) - score.sum(axis=1)).argmax()) if len(score) else 0
    return spanning_tree(score, root, method=method)


def _prepare(q, k, v, head_weights, message, scale):
    """(A, P, M, scale): the senders' attention [B, H, N, N], P [B, H, N], M [B, 1, N]."""
    n = dims(q=(q, "B H N d"), k=(k, "B H N d"), v=(v, "B H N Dv"))
    P, M = np.ones((1, 1, 1)), np.ones((1, 1, 1))
    if head_weights is not None:
        dims(q=(q, "B H N d"), head_weights=(head_weights, "B N H"))
        P = np.swapaxes(float64(head_weights), -1, -2)
    if message is not None:
        dims(q=(q, "B H N d"), message=(message, "B N"))
        M = _checked(message)[:, None]
    q, k = float64(q, k)
    scale = n["d"] ** -0.5 if scale is None else scale
    return softmax(scale * q @ np.swapaxes(k, -1, -2)), P, M, scale


def _sent(A, P, M, scale):
    """[B, H, senders, receivers]."""
    return A * (P * M)[..., None]


def _checked(message):
    message = float64(message)
    if not ((message >= 0) & (message <= 1)).all():
        raise ValueError("message must be in [0, 1]")
    return message


def _layer(x, message_in, params, num_heads, temperature):
    n = dims(x=(x, "B N C"), message_in=(message_in, "B N"), w_q=(params.w_q, "C C"))
    check_num_heads(n["C"], num_heads)
    dims(w_select=(params.w_select, f"{n['C']} {num_heads}"))
    if not np.isfinite(x).all():
        raise ValueError("x must be finite")
    P = head_selector(x, params.w_select, temperature=temperature)
    m = message_controller(x, params.w_gate1, params.w_gate2, b1=params.b_gate1, b2=params.b_gate2)
    return qkv(x, params, num_heads=num_heads), P, m, _checked(message_in) * m


def _block(x, message, p, num_heads, temperature, prune_to, score, eps):
    """(x, message, kept) of `dependency_block`, and the message and mask of all tokens."""
    N = dims(x=(x, "B N C"), message=(message, "B N"))["N"]
    if prune_to is not None and not 1 <= prune_to <= N:
        raise ValueError(f"prune_to must be in 1..{N}, got {prune_to}")
    one_of("score", score, SCORES)
    x = float64(x)
    y = layer_norm(x, p.ln1_scale, p.ln1_bias, eps=eps)
    out, sent, mask = reversed_attention_layer(
        y, message, p.attn, num_heads=num_heads, temperature=temperature
    )
    x = x + (out if p.ls1 is None else p.ls1 * out)
    values = {"message": sent, "sent": mask.sum(axis=-2), "received": mask.sum(axis=-1)}[score]
    kept = np.broadcast_to(np.arange(N, dtype=np.int32), sent.shape)
    message = sent
    if prune_to is not None:
        kept = top_indices(values, prune_to)
        x, message = take_rows(x, kept), np.take_along_axis(sent, kept, axis=-1)
    y = mlp(layer_norm(x, p.ln2_scale, p.ln2_bias, eps=eps), p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2)
    return x + (y if p.ls2 is None else p.ls2 * y), message, kept, sent, mask


def example(seed=0):
    """Two handwritten digits, 2 x 2 pixels a token; the second block keeps ten of sixteen."""
    from ref.data import digits

    rng = np.random.default_rng(seed)
    images = np.repeat(digits()[0][2 * seed : 2 * seed + 2, ..., None] / 16, 3, axis=-1)
    cfg = DependencyViTConfig(8, 2, 16, 2, 4, 10, temperature=0.5, prune_layers=(2,), prune_ratio=0.35)
    params = init_dependencyvit(rng, cfg, init_logit=1.0, std=0.3)
    x, block = embed_patches(images, params), params.blocks[0]
    y = layer_norm(x, block.ln1_scale, block.ln1_bias)
    heads, _, m, _ = _layer(y, np.ones((2, 16)), block.attn, 4, 0.5)
    a, at = block.attn, {"num_heads": 4, "temperature": 0.5}
    return [
        Example("reversed_attention", (*heads,), {"return_mask": True}, (0, 1, 2)),
        Example("head_selector", (y, a.w_select), {"temperature": 0.5}, (0, 1)),
        Example("message_controller", (y, a.w_gate1, a.w_gate2), {}, (0, 1, 2)),
        Example("reversed_attention_layer", (y, m, a), at, (0, 1, 2)),
        Example("reversed_attention_layer_backward", (x, m, y, m, a), at),
        Example("dependency_block", (x, m, block), at, (0, 1, 2)),
        Example("dependency_block", (x, m, block), {**at, "prune_to": 10, "score": "received"}),
        Example("dependencyvit_forward", (images, params, cfg)),
    ]
