"""PMI: tokens write to a few slots, slots to a tensor of relations, and inference reads both.

Source: Zeng et al. 2023 (arXiv 2310.09297). The working memory is the shared workspace that the paper builds
on, as released; the authors' own memory code could not be had, so the consolidation into long-term memory
and the merge of what is read are our choice, after SAM (Le et al. 2020) and the paper's equations 11 and 12.
"""

import numpy as np

from ref.blocks.attention import attention_dense
from ref.blocks.conv import conv2d, conv2d_vjp
from ref.blocks.mlp import linear, linear_vjp, mlp, mlp_vjp, relu
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.optim import tree_map
from ref.blocks.transformer import BlockParams, self_attention, self_attention_vjp
from ref.blocks.working_memory import (
    WriteParams,
    attend,
    attend_vjp,
    competitive_write,
    competitive_write_backward,
    outer_product_attention,
    outer_product_attention_backward,
    read_working_memory,
    read_working_memory_backward,
    write_weights,
)
from ref.checks import at_least_one
from ref.dims import dims, float64
from ref.example import Example
from ref.models.pmi import (
    ConsolidateParams,
    PmiCnnParams,
    PmiParams,
    PmiTransformerParams,
    ReadParams,
    init_memory,
    init_pmi,
    init_pmi_cnn,
    init_pmi_transformer,
    pmi_params,
)
from ref.tasks.sequences import STORY_WORDS, story_task
from ref.tasks.shapes import sort_of_clevr, triangles

__all__ = [
    "ConsolidateParams", "PmiCnnParams", "PmiParams", "PmiTransformerParams", "ReadParams",
    "WriteParams", "competitive_write", "competitive_write_backward", "consolidate",
    "consolidate_backward", "example", "init_memory", "init_pmi", "init_pmi_cnn",
    "init_pmi_transformer", "ltm_bytes", "outer_product_attention", "outer_product_attention_backward",
    "pmi_cnn", "pmi_cnn_backward", "pmi_layer", "pmi_layer_backward", "pmi_params", "pmi_transformer",
    "pmi_transformer_backward", "read_memory", "read_memory_backward", "read_working_memory",
    "read_working_memory_backward", "sort_of_clevr", "story_task", "triangles", "write_weights",
]  # fmt: skip


def consolidate(wm, ltm, params: ConsolidateParams, *, rho=1.0):
    """LN(rho L + a1 R), R the outer-product attention of the slots: wm [B, N, D], ltm [B, S, D, D] -> as ltm.

    R_s = sum_m tanh((mix W)_s A_q * W_m A_k) (W_m A_v)^T. The norm, of every row, is what bounds the memory.
    """
    return layer_norm(_relations(wm, ltm, params, rho)[-1], params.ln_scale, params.ln_bias)


def consolidate_backward(wm, ltm, params: ConsolidateParams, dout, *, rho=1.0):
    """(dwm, dltm, ConsolidateParams of gradients) of `consolidate` for dout [B, S, D, D]."""
    p, (mixed, q, k, v, R, total), wm = params, _relations(wm, ltm, params, rho), float64(wm)
    d, dscale, dbias = layer_norm_vjp(total, p.ln_scale, dout)
    dq, dk, dv = outer_product_attention_backward(q, k, v, p.a1 * d)
    dmixed, da_q, _ = linear_vjp(mixed, p.a_q, dq, bias=False)
    dwk, da_k, _ = linear_vjp(wm, p.a_k, dk, bias=False)
    dwv, da_v, _ = linear_vjp(wm, p.a_v, dv, bias=False)
    dmix = np.einsum("bsd,bnd->sn", dmixed, wm)
    grads = ConsolidateParams(dmix, da_q, da_k, da_v, (d * R).sum(), dscale, dbias)
    return p.mix.T @ dmixed + dwk + dwv, rho * d, grads


def read_memory(
    x, wm, ltm, params: ReadParams, *, heads, scale=False, correct=True, use_wm=True, use_ltm=True
):
    """What tokens x [B, T, Din] find in both memories, (1 - a2) U_w + a2 U_wl: [B, T, D].

    U_w is read from the slots, U_l from the N rows w_l L; U_wl is U_l attending to U_w (eq. 11, 12).
    correct=False: U_l itself instead. use_wm=False: U_l alone; use_ltm=False: U_w alone.
    Raises: ValueError naming the argument at fault.
    """
    parts = _read(x, wm, ltm, params, heads, scale, correct, use_wm, use_ltm)
    return parts["u"]


def read_memory_backward(x, wm, ltm, params: ReadParams, du, *, heads, scale=False, correct=True, use_wm=True,
                         use_ltm=True):  # fmt: skip
    """(dx, dwm, dltm, ReadParams of gradients) of `read_memory`; w_o, which it does not read, gets 0."""
    s, p, du = _read(x, wm, ltm, params, heads, scale, correct, use_wm, use_ltm), params, float64(du)
    options, (dx, dwm, dltm) = {"heads": heads, "scale": scale}, (np.zeros(t.shape) for t in (x, wm, ltm))
    maps, da2 = tree_map(lambda t: np.zeros(np.shape(t)), p.write), 0.0
    dw_l, add = np.zeros(p.w_l.shape), lambda a, b: tree_map(np.add, a, b)
    d_w, d_l = du, du
    if use_wm and use_ltm:
        da2 = (du * (s["other"] - s["u_w"])).sum()
        d_w, d_l = (1 - p.a2) * du, p.a2 * du
        if correct:
            d_l, more, g = attend_vjp(s["u_l"], s["u_w"], p.write, d_l, **options)
            d_w, maps = d_w + more, add(maps, g)
    if use_ltm:
        dx, drows, g = read_working_memory_backward(x, s["rows"], p.write, d_l, **options)
        maps, flat = add(maps, g), float64(ltm).reshape(len(ltm), p.w_l.shape[1], ltm.shape[-1])
        dw_l, dltm = np.einsum("bnd,bmd->nm", drows, flat), (p.w_l.T @ drows).reshape(ltm.shape)
    if use_wm:
        more, dwm, g = read_working_memory_backward(x, wm, p.write, d_w, **options)
        dx, maps = dx + more, add(maps, g)
    return dx, dwm, dltm, ReadParams(maps, dw_l, np.asarray(da2), np.zeros(np.shape(p.w_o)))


def pmi_layer(x, wm, ltm, params: PmiParams, *, heads, topk, scale=False, gate="unit", correct=True,
              use_wm=True, share_memory=True):  # fmt: skip
    """(y, wm, ltm): write, consolidate, read, y = LN(x + U w_o) [B, T, Din], the norm without weights.

    share_memory=False hands back the memories as they came: what this layer wrote ends with it.
    """
    after = competitive_write(x, wm, params.write, heads=heads, topk=topk, scale=scale, gate=gate)
    longer = consolidate(after, ltm, params.consolidate)
    read = _with_maps(params)
    u = read_memory(x, after, longer, read, heads=heads, scale=scale, correct=correct, use_wm=use_wm)
    y = layer_norm(float64(x) + u @ read.w_o, 1.0, 0.0)
    return (y, after, longer) if share_memory else (y, float64(wm), float64(ltm))


def pmi_layer_backward(x, wm, ltm, params: PmiParams, dy, dwm, dltm, *, heads, topk, scale=False, gate="unit",
                       correct=True, use_wm=True, share_memory=True):  # fmt: skip
    """(dx, dwm, dltm, PmiParams of gradients) of `pmi_layer` for cotangents of its three results."""
    write = {"heads": heads, "topk": topk, "scale": scale, "gate": gate}
    options = {"heads": heads, "scale": scale, "correct": correct, "use_wm": use_wm}
    after = competitive_write(x, wm, params.write, **write)
    longer, read = consolidate(after, ltm, params.consolidate), _with_maps(params)
    u = read_memory(x, after, longer, read, **options)
    dsum, _, _ = layer_norm_vjp(float64(x) + u @ read.w_o, 1.0, dy)
    du, dw_o, _ = linear_vjp(u, read.w_o, dsum, bias=False)
    dx, dafter, dlonger, g_read = read_memory_backward(x, after, longer, read, du, **options)
    d_wm, d_ltm = float64(dwm, dltm)
    if share_memory:
        dafter, dlonger = dafter + d_wm, dlonger + d_ltm
    more, dold, g_con = consolidate_backward(after, ltm, params.consolidate, dlonger)
    dx2, dstart, g_write = competitive_write_backward(x, wm, params.write, dafter + more, **write)
    g_read = g_read._replace(w_o=dw_o)
    if params.read.write is None:
        g_write, g_read = tree_map(np.add, g_write, g_read.write), g_read._replace(write=None)
    kept = (0.0, 0.0) if share_memory else (d_wm, d_ltm)
    return dsum + dx + dx2, dstart + kept[0], dold + kept[1], PmiParams(g_write, g_con, g_read)


def pmi_transformer(tokens, params: PmiTransformerParams, *, heads, topk, layers, share_memory=True):
    """Logits [B, K] of ids [B, T] or vectors [B, T, V]: the same post-norm block and memory, layers times.

    In each, LN(x + attention), the memory layer, LN(x + MLP); then the mean of the tokens and a linear head.
    The memories start fresh for every input and, with share_memory, pass from layer to layer.
    """
    states = _transformer(tokens, params, heads, topk, layers, share_memory)
    return linear(states[-1][0].mean(axis=1), params.w_head, params.b_head)


def pmi_transformer_backward(tokens, params: PmiTransformerParams, dlogits, *, heads, topk, layers,
                             share_memory=True):  # fmt: skip
    """(dtokens, PmiTransformerParams of gradients) of `pmi_transformer`; dtokens is None for ids."""
    p, states = params, _transformer(tokens, params, heads, topk, layers, share_memory)
    x = states[-1][0]
    dmean, dw, db = linear_vjp(x.mean(axis=1), p.w_head, float64(dlogits))
    dx = np.repeat(dmean[:, None], x.shape[1], axis=1) / x.shape[1]
    dwm, dltm = np.zeros(states[-1][1].shape), np.zeros(states[-1][2].shape)
    zero = lambda t: tree_map(lambda a: np.zeros(np.shape(a)), t)
    block, pmi = zero(p.block), zero(p.pmi)
    for x, wm, ltm in states[-2::-1]:
        dx, dwm, dltm, g_block, g_pmi = _layer_vjp(x, wm, ltm, p, dx, dwm, dltm, heads, topk, share_memory)
        block, pmi = tree_map(np.add, block, g_block), tree_map(np.add, pmi, g_pmi)
    dpositions = np.zeros(np.shape(p.positions))
    dpositions[: dx.shape[1]] = dx.sum(axis=0)
    if np.asarray(tokens).dtype.kind in "iu":
        dembed, dtokens = np.zeros(np.shape(p.embed)), None
        np.add.at(dembed, np.asarray(tokens), dx)
    else:
        dtokens, dembed, _ = linear_vjp(float64(tokens), p.embed, dx, bias=False)
    return dtokens, PmiTransformerParams(dembed, dpositions, block, pmi, dw, db)


def pmi_cnn(images, params: PmiCnnParams, *, heads, topk):
    """Logits [B, K] of images [B, H, W, C].

    Stages relu(LN(conv)), in the last ones a memory layer over the map's positions, the mean, a linear head.
    The memories pass from stage to stage.
    """
    return linear(_stages(images, params, heads, topk)[-1][-1], params.w_head, params.b_head)


def pmi_cnn_backward(images, params: PmiCnnParams, dlogits, *, heads, topk):
    """(dimages, PmiCnnParams of gradients) of `pmi_cnn` for dlogits [B, K]."""
    p, stages = params, _stages(images, params, heads, topk)
    *stages, (shape, wm, ltm, mean) = stages
    dmean, dw, db = linear_vjp(mean, p.w_head, float64(dlogits))
    dx = np.broadcast_to(dmean[:, None, None], shape) / (shape[1] * shape[2])
    dwm, dltm, convs, norms, memories = np.zeros(wm.shape), np.zeros(ltm.shape), [], [], []
    for (w, _), norm, (x, conv, flat, wm, ltm, memory) in zip(
        p.convs[::-1], p.norms[::-1], stages[::-1], strict=True
    ):
        if memory is not None:
            d = dx.reshape(flat.shape)
            d, dwm, dltm, g = pmi_layer_backward(flat, wm, ltm, memory, d, dwm, dltm, heads=heads, topk=topk)
            memories.append(g)
            dx = d.reshape(dx.shape)
        dx = dx * (layer_norm(conv, *norm) > 0)
        dconv, *g = layer_norm_vjp(conv, norm[0], dx)
        norms.append(tuple(g))
        dx, *g = conv2d_vjp(x, w, dconv, stride=2, padding=1)
        convs.append(tuple(g))
    return dx, PmiCnnParams(tuple(convs[::-1]), tuple(norms[::-1]), tuple(memories[::-1]), dw, db)


def ltm_bytes(width, segments, *, dtype_bytes=4):
    """Bytes of one example's long-term memory: segments width^2 numbers."""
    return segments * width**2 * dtype_bytes


def _relations(wm, ltm, p, rho):
    """(mixed slots, q, k, v, R, rho L + a1 R)."""
    dims(wm=(wm, "B N D"), ltm=(ltm, "B S D D"), mix=(p.mix, "S N"), a_q=(p.a_q, "D D"))
    wm = float64(wm)
    mixed = p.mix @ wm
    q, k, v = mixed @ p.a_q, wm @ p.a_k, wm @ p.a_v
    R = outer_product_attention(q, k, v)
    return mixed, q, k, v, R, rho * float64(ltm) + p.a1 * R


def _read(x, wm, ltm, p, heads, scale, correct, use_wm, use_ltm):
    """Everything that reading computes, by name."""
    n = dims(x=(x, "B T Din"), wm=(wm, "B N D"), ltm=(ltm, "B S D D"), w_l=(p.w_l, "N SD"))
    if n["SD"] != n["S"] * n["D"]:
        raise ValueError(f"w_l must have S D = {n['S'] * n['D']} columns, got {n['SD']}")
    if not (use_wm or use_ltm):
        raise ValueError("use_wm and use_ltm must not both be False: nothing would be read")
    options, s = {"heads": heads, "scale": scale}, {}
    if use_wm:
        s["u"] = s["u_w"] = read_working_memory(x, wm, p.write, **options)
    if use_ltm:
        s["rows"] = p.w_l @ float64(ltm).reshape(len(ltm), n["SD"], n["D"])
        s["u"] = s["u_l"] = read_working_memory(x, s["rows"], p.write, **options)
    if use_wm and use_ltm:
        s["other"] = attend(s["u_l"], s["u_w"], p.write, **options) if correct else s["u_l"]
        s["u"] = (1 - p.a2) * s["u_w"] + p.a2 * s["other"]
    return s


def _with_maps(params):
    """The reading parameters with maps: those of writing where they have none."""
    return params.read if params.read.write is not None else params.read._replace(write=params.write)


def _transformer(tokens, p, heads, topk, layers, share_memory):
    """[(x, wm, ltm) before each layer, and after the last]."""
    at_least_one(layers=layers)
    tokens = np.asarray(tokens)
    ids, (V, D) = tokens.dtype.kind in "iu", p.embed.shape
    T = dims(tokens=(tokens, "B T" if ids else f"B T {V}"))["T"]
    if T > len(p.positions) or (ids and tokens.size and not (0 <= tokens.min() and tokens.max() < V)):
        raise ValueError(f"tokens must be at most {len(p.positions)} long, and ids in 0..{V - 1}")
    slots, segments = p.pmi.read.w_l.shape[0], len(p.pmi.consolidate.mix)
    x = (p.embed[tokens] if ids else tokens @ p.embed) + p.positions[:T]
    states = [(x, *init_memory(max(len(x), 1), slots, D, segments=segments))]
    states[0] = (x, *(m[: len(x)] for m in states[0][1:]))
    for _ in range(layers):
        x, wm, ltm = states[-1]
        h = layer_norm(x + self_attention(x, p.block, num_heads=heads, attention=attention_dense),
                       p.block.ln1_scale, p.block.ln1_bias)  # fmt: skip
        h, wm, ltm = pmi_layer(h, wm, ltm, p.pmi, heads=heads, topk=topk, share_memory=share_memory)
        b = p.block
        x = layer_norm(h + mlp(h, b.w_fc1, b.b_fc1, b.w_fc2, b.b_fc2), b.ln2_scale, b.ln2_bias)
        states.append((x, wm, ltm))
    return states


def _layer_vjp(x, wm, ltm, p, dy, dwm, dltm, heads, topk, share_memory):
    """(dx, dwm, dltm, BlockParams, PmiParams of gradients) of one layer of the transformer."""
    b, options = p.block, {"heads": heads, "topk": topk, "share_memory": share_memory}
    sum1 = x + self_attention(x, b, num_heads=heads)
    h = layer_norm(sum1, b.ln1_scale, b.ln1_bias)
    m, _, _ = pmi_layer(h, wm, ltm, p.pmi, **options)
    d, s2, b2 = layer_norm_vjp(m + mlp(m, b.w_fc1, b.b_fc1, b.w_fc2, b.b_fc2), b.ln2_scale, dy)
    more, *g_mlp = mlp_vjp(m, b.w_fc1, b.b_fc1, b.w_fc2, b.b_fc2, d)
    d, dwm, dltm, g_pmi = pmi_layer_backward(h, wm, ltm, p.pmi, d + more, dwm, dltm, **options)
    d, s1, b1 = layer_norm_vjp(sum1, b.ln1_scale, d)
    dx, g_attn = self_attention_vjp(x, b, d, num_heads=heads)
    g_mlp = dict(zip(("w_fc1", "b_fc1", "w_fc2", "b_fc2"), g_mlp, strict=True))
    grads = BlockParams(ln1_scale=s1, ln1_bias=b1, ln2_scale=s2, ln2_bias=b2, **g_attn, **g_mlp)
    return d + dx, dwm, dltm, grads, g_pmi


def _stages(images, p, heads, topk):
    """[(input, conv, flat map, wm, ltm, memory or None) of each stage; (map's shape, wm, ltm, mean)]."""
    dims(images=(images, f"B H W {p.convs[0][0].shape[1]}"))
    if not 1 <= len(p.pmi) <= len(p.convs):
        raise ValueError(f"pmi must hold 1 to {len(p.convs)} memories, one a convolution, got {len(p.pmi)}")
    x, rows, skip = float64(images), [], len(p.convs) - len(p.pmi)
    slots, D = p.pmi[0].read.w_l.shape[0], p.pmi[0].write.w_q.shape[0]
    wm, ltm = init_memory(max(len(x), 1), slots, D, segments=len(p.pmi[0].consolidate.mix))
    wm, ltm = wm[: len(x)], ltm[: len(x)]
    for i, ((w, b), norm) in enumerate(zip(p.convs, p.norms, strict=True)):
        conv = conv2d(x, w, b, stride=2, padding=1)
        y = relu(layer_norm(conv, *norm))
        B, H, W, C = y.shape
        flat, memory = y.reshape(B, H * W, C), p.pmi[i - skip] if i >= skip else None
        rows.append((x, conv, flat, wm, ltm, memory))
        if memory is not None:
            flat, wm, ltm = pmi_layer(flat, wm, ltm, memory, heads=heads, topk=topk)
        x = flat.reshape(y.shape)
    return [*rows, (x.shape, wm, ltm, x.mean(axis=(1, 2)))]


def example(seed=0):
    """Digits as patches write to three slots; a small transformer reads a story, a small CNN a digit."""
    from ref.data import digits
    from ref.models.vit import patchify

    rng = np.random.default_rng(seed)
    images = digits()[0][:2, ..., None] / 8 - 1
    x = patchify(images, 4)[..., ::2] + 0.1 * rng.standard_normal((2, 4, 8))
    params, (wm, ltm) = init_pmi(seed, 8, 6, heads=2, slots=3, segments=2), init_memory(2, 3, 6, segments=2)
    net = init_pmi_transformer(
        seed, vocab=len(STORY_WORDS), positions=16, width=6, classes=33, heads=2, slots=3, segments=2
    )
    cnn = init_pmi_cnn(seed, channels=1, stages=(4, 6, 6), width=6, classes=3, heads=2, slots=3, segments=2)
    read = params.read._replace(write=params.write)
    story, _ = story_task(seed, 2, kind="one_fact", n_facts=2)
    q = wm @ params.consolidate.a_q
    return [
        Example("competitive_write", (x, wm, params.write), {"heads": 2, "topk": 2}, (0, 1, 2)),
        Example("read_working_memory", (x, wm, params.write), {"heads": 2}, (0, 1, 2)),
        Example("outer_product_attention", (q, wm, wm), {}, (0, 1, 2)),
        Example("consolidate", (wm, ltm, params.consolidate), {}, (0, 1, 2)),
        Example("read_memory", (x, wm, ltm, read), {"heads": 2}, (0, 1, 2, 3)),
        Example("pmi_layer", (x, wm, ltm, params), {"heads": 2, "topk": 2}, (0, 1, 2, 3)),
        Example("pmi_transformer", (story, net), {"heads": 2, "topk": 3, "layers": 2}, (1,)),
        Example("pmi_cnn", (images, cnn), {"heads": 2, "topk": 1}, (0, 1)),
    ]
