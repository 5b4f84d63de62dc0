"""GTrXL: a transformer with memory learns from rewards, its residual sums replaced by gates that start shut.

Source: Parisotto et al. 2020 (arXiv 1910.06764), equations of sections 3.1 to 3.3; the memory and its
relative attention are Transformer-XL's (ref/blocks/relative.py), the default loss is V-MPO's
(ref/blocks/policy.py). No official code. Public code takes the queries from inputs that are not normalised:
`normalize_query=False`.
"""

from functools import partial

import numpy as np

from ref.blocks.mlp import linear, linear_vjp, relu, sigmoid
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.optim import tree_map
from ref.blocks.policy import vmpo_loss, vmpo_loss_vjp
from ref.blocks.relative import RelativeParams, relative_attention, relative_attention_vjp, relative_shift
from ref.checks import one_of
from ref.dims import dims, float64
from ref.example import Example
from ref.models.agent import Agent, train_agent
from ref.models.gtrxl import (
    GATES,
    MAPS,
    GateParams,
    GTrXLBlockParams,
    GTrXLMemory,
    GTrXLParams,
    gate_params,
    gtrxl_params,
    init_gate,
    init_gtrxl,
    init_memory,
)
from ref.tasks.environments import env_reset, env_step

__all__ = [
    "GTrXLBlockParams", "GTrXLMemory", "GTrXLParams", "GateParams", "RelativeParams", "env_reset",
    "env_step", "example", "gate", "gate_params", "gate_vjp", "gtrxl", "gtrxl_agent", "gtrxl_block",
    "gtrxl_block_vjp", "gtrxl_params", "gtrxl_vjp", "init_gate", "init_gtrxl", "init_memory",
    "receptive_field", "relative_attention", "relative_attention_vjp", "relative_shift", "train_agent",
    "vmpo_loss", "vmpo_loss_vjp",
]  # fmt: skip

NORMS = ("identity", "post")


def gate(x, y, params: GateParams | None, *, kind="gru"):
    """g(x, y) of the stream x and a sub-module's output y, both [..., D].

    "gru": (1 - z) x + z tanh(y w_g + (r x) u_g), r = sigmoid(y w_r + x u_r), z = sigmoid(y w_z + x u_z - b).
    "output": x + sigmoid(x w - b) y. "sigtanh": x + sigmoid(y w - b) tanh(y u).
    "highway": s x + (1 - s) y with s = sigmoid(x w + b). "input": sigmoid(x w) x + y. None: x + y.
    Raises: ValueError naming the argument at fault.
    """
    check_gate(x, y, params, kind)
    x, y, p = *float64(x, y), params
    if kind == "gru":
        _, z, h = _gru(x, y, p)
        return (1 - z) * x + z * h
    if kind == "output":
        return x + sigmoid(x @ p.w - p.b) * y
    if kind == "sigtanh":
        return x + sigmoid(y @ p.w - p.b) * np.tanh(y @ p.u)
    if kind == "highway":
        s = sigmoid(x @ p.w + p.b)
        return s * x + (1 - s) * y
    return (sigmoid(x @ p.w) * x if kind == "input" else x) + y


def gate_vjp(x, y, params: GateParams | None, dout, *, kind="gru"):
    """(dx, dy, GateParams of gradients, None for kind None) of `gate` for dout [..., D]."""
    check_gate(x, y, params, kind)
    x, y, dout, p = *float64(x, y, dout), params
    if kind is None:
        return dout, dout, None
    if kind == "gru":
        r, z, h = _gru(x, y, p)
        dg = dout * z * (1 - h**2)
        dy, dw_g = _product_vjp(y, p.w_g, dg)
        drx, du_g = _product_vjp(r * x, p.u_g, dg)
        dz, dr = dout * (h - x) * z * (1 - z), drx * x * r * (1 - r)
        (y1, dw_z), (x1, du_z) = _product_vjp(y, p.w_z, dz), _product_vjp(x, p.u_z, dz)
        (y2, dw_r), (x2, du_r) = _product_vjp(y, p.w_r, dr), _product_vjp(x, p.u_r, dr)
        dx = dout * (1 - z) + drx * r + x1 + x2
        return dx, dy + y1 + y2, GateParams(dw_r, du_r, dw_z, du_z, dw_g, du_g, -_rows(dz))
    if kind == "sigtanh":
        s, t = sigmoid(y @ p.w - p.b), np.tanh(y @ p.u)
        ds, dt = dout * t * s * (1 - s), dout * s * (1 - t**2)
        (y1, dw), (y2, du) = _product_vjp(y, p.w, ds), _product_vjp(y, p.u, dt)
        return dout, y1 + y2, GateParams(b=-_rows(ds), w=dw, u=du)
    if kind == "output":
        s = sigmoid(x @ p.w - p.b)
        ds = dout * y * s * (1 - s)
        dx, dw = _product_vjp(x, p.w, ds)
        return dout + dx, dout * s, GateParams(b=-_rows(ds), w=dw)
    if kind == "highway":
        s = sigmoid(x @ p.w + p.b)
        ds = dout * (x - y) * s * (1 - s)
        dx, dw = _product_vjp(x, p.w, ds)
        return dout * s + dx, dout * (1 - s), GateParams(b=_rows(ds), w=dw)
    s = sigmoid(x @ p.w)
    dx, dw = _product_vjp(x, p.w, dout * x * s * (1 - s))
    return dout * s + dx, dout, GateParams(w=dw)


def gtrxl_block(x, memory, params: GTrXLBlockParams, *, heads, u, v_bias, gate="gru", norm="identity",
                normalize_query=True, mask=None):  # fmt: skip
    """One layer: x [B, T, D], memory [B, M, D] of its earlier inputs -> [B, T, D].

    norm: "identity", y = g(x, relu(attn(ln1([memory; x])))), out = g(y, relu(mlp(ln2(y)))): nothing but gates
        stands between input and output. "post" (Transformer-XL): y = ln1(g(x, attn([memory; x]))), out =
        ln2(g(y, mlp(y))), without the relu.
      normalize_query: False makes the queries from x itself instead of ln1(x) ("identity" only).
      gate: a kind of `gate`. mask: as in `relative_attention`.
    Raises: ValueError naming the argument at fault.
    """
    return _block(x, memory, params, heads, u, v_bias, gate, norm, normalize_query, mask)[0]


def gtrxl_block_vjp(x, memory, params: GTrXLBlockParams, dy, *, heads, u, v_bias, gate="gru", norm="identity",
                    normalize_query=True, mask=None):  # fmt: skip
    """(dx, GTrXLBlockParams of gradients, du, dv_bias) of `gtrxl_block`; no gradient into the memory."""
    _, (x, source, attended, mid, fed) = _block(
        x, memory, params, heads, u, v_bias, gate, norm, normalize_query, mask
    )
    p, M, dy, pre = params, memory.shape[1], float64(dy), norm == "identity"
    options = {"heads": heads, "u": u, "v_bias": v_bias, "mask": mask}
    s, d = {}, dy
    if not pre:  # out = ln2(g(mid, mlp(mid))), mid = ln1(g(x, attended))
        d, s["ln2_scale"], s["ln2_bias"] = layer_norm_vjp(
            _gate(mid, fed, p.gate_mlp, kind=gate), p.ln2_scale, d
        )
    dmid, dfed, g_mlp = gate_vjp(mid, relu(fed) if pre else fed, p.gate_mlp, d, kind=gate)
    dfed = dfed * (fed > 0) if pre else dfed
    inside = layer_norm(mid, p.ln2_scale, p.ln2_bias) if pre else mid
    hidden = linear(inside, p.w_1, p.b_1)
    dh, dw_2, db_2 = linear_vjp(relu(hidden), p.w_2, dfed)
    dinside, dw_1, db_1 = linear_vjp(inside, p.w_1, dh * (hidden > 0))
    if pre:
        dinside, s["ln2_scale"], s["ln2_bias"] = layer_norm_vjp(mid, p.ln2_scale, dinside)
    dmid = dmid + dinside
    if not pre:
        summed = _gate(x, attended, p.gate_attn, kind=gate)
        dmid, s["ln1_scale"], s["ln1_bias"] = layer_norm_vjp(summed, p.ln1_scale, dmid)
    dx, dattended, g_attn = gate_vjp(x, relu(attended) if pre else attended, p.gate_attn, dmid, kind=gate)
    dattended = dattended * (attended > 0) if pre else dattended
    normed = layer_norm(source, p.ln1_scale, p.ln1_bias) if pre else source
    query = x if pre and not normalize_query else None
    a = relative_attention_vjp(normed[:, M:], normed[:, :M], p.attn, dattended, query=query, **options)
    dsource = np.concatenate([a.memory, a.x], axis=1)
    if pre:
        dsource, s["ln1_scale"], s["ln1_bias"] = layer_norm_vjp(source, p.ln1_scale, dsource)
    dx = dx + dsource[:, M:] + (0.0 if query is None else a.query)
    mlp = {"w_1": dw_1, "b_1": db_1, "w_2": dw_2, "b_2": db_2}
    grads = GTrXLBlockParams(attn=a.params, gate_attn=g_attn, gate_mlp=g_mlp, **s, **mlp)
    return dx, grads, a.u, a.v_bias


def gtrxl(x, memory: GTrXLMemory, params: GTrXLParams, *, heads, gate="gru", norm="identity",
          normalize_query=True, done=None):  # fmt: skip
    """(y [B, T, D], GTrXLMemory after the T steps) of inputs x [B, T, Dx].

    done: bool [B, T], True = the last step of its episode. A step attends to steps and slots of its own
      episode; slots of finished ones are not valid any more. The new memory: the last M rows of both.
    Raises: ValueError naming the argument at fault.
    """
    mask, valid = _episodes(x, memory, params, done)
    options = {"heads": heads, "u": params.u, "v_bias": params.v_bias, "gate": gate, "norm": norm,
               "normalize_query": normalize_query, "mask": mask}  # fmt: skip
    y, slots, M = _embed(x, params), [], memory.slots.shape[2]
    for l, block in enumerate(params.blocks):
        past = float64(memory.slots[:, l])
        slots.append(np.concatenate([past, y], axis=1)[:, x.shape[1] :])
        y = gtrxl_block(y, past, block, **options)
    return y, GTrXLMemory(np.stack(slots, axis=1), valid[:, valid.shape[1] - M :])


def gtrxl_vjp(x, memory: GTrXLMemory, params: GTrXLParams, dy, *, heads, gate="gru", norm="identity",
              normalize_query=True, done=None):  # fmt: skip
    """(dx, GTrXLParams of gradients) of y in `gtrxl`, for the cotangent dy [B, T, D]."""
    mask, _ = _episodes(x, memory, params, done)
    options = {"heads": heads, "u": params.u, "v_bias": params.v_bias, "gate": gate, "norm": norm,
               "normalize_query": normalize_query, "mask": mask}  # fmt: skip
    inputs = [_embed(x, params)]
    for l, block in enumerate(params.blocks):
        inputs.append(gtrxl_block(inputs[-1], memory.slots[:, l], block, **options))
    d, du, dv_bias, blocks = float64(dy), 0.0 * params.u, 0.0 * params.v_bias, []
    for l in reversed(range(len(params.blocks))):
        d, grads, du_l, dv_l = gtrxl_block_vjp(inputs[l], memory.slots[:, l], params.blocks[l], d, **options)
        du, dv_bias = du + du_l, dv_bias + dv_l
        blocks.insert(0, grads)
    if params.w_embed is None:
        return d, GTrXLParams(None, None, du, dv_bias, tuple(blocks))
    dx, dw, db = linear_vjp(float64(x), params.w_embed, d * (inputs[0] > 0))
    return dx, GTrXLParams(dw, db, du, dv_bias, tuple(blocks))


def gtrxl_agent(*, width=32, layers=2, heads=2, head_dim=16, length=16, gate="gru", norm="identity"):
    """The network as an Agent for `train_agent`, with a memory of `length` slots in each layer."""
    options = {"heads": heads, "gate": gate, "norm": norm}
    sizes = {"width": width, "layers": layers, "heads": heads, "head_dim": head_dim, "gate": gate}
    return Agent(
        width,
        init=lambda rng, observations: init_gtrxl(rng, inputs=observations, **sizes),
        start=partial(init_memory, layers=layers, length=length, width=width),
        forget=lambda memory, done: memory._replace(valid=memory.valid & ~done[:, None]),
        forward=lambda x, memory, params, done: gtrxl(x, memory, params, done=done, **options),
        backward=lambda x, memory, params, dy, done: gtrxl_vjp(x, memory, params, dy, done=done, **options)[
            1
        ],
    )


def receptive_field(layers, length):
    """Steps that may reach the output through the memories of all layers: layers times length."""
    return layers * length


_gate = gate  # the blocks have an argument of this name


def _block(x, memory, params, heads, u, v_bias, gate, norm, normalize_query, mask):
    """(output, what the backward pass needs: x, [memory; x], attention's output, the middle, the MLP's)."""
    one_of("norm", norm, NORMS)
    dims(x=(x, "B T D"), memory=(memory, "B M D"))
    p, M, x, pre = params, memory.shape[1], float64(x), norm == "identity"
    source = np.concatenate([float64(memory), x], axis=1)
    normed = layer_norm(source, p.ln1_scale, p.ln1_bias) if pre else source
    query = x if pre and not normalize_query else None
    attended = relative_attention(
        normed[:, M:], normed[:, :M], p.attn, heads=heads, u=u, v_bias=v_bias, query=query, mask=mask
    )
    mid = _gate(x, relu(attended) if pre else attended, p.gate_attn, kind=gate)
    mid = mid if pre else layer_norm(mid, p.ln1_scale, p.ln1_bias)
    inside = layer_norm(mid, p.ln2_scale, p.ln2_bias) if pre else mid
    fed = linear(relu(linear(inside, p.w_1, p.b_1)), p.w_2, p.b_2)
    out = _gate(mid, relu(fed) if pre else fed, p.gate_mlp, kind=gate)
    out = out if pre else layer_norm(out, p.ln2_scale, p.ln2_bias)
    return out, (x, source, attended, mid, fed)


def _episodes(x, memory, params, done):
    """(mask [B, T, M+T], valid [B, M+T]): who is in whose episode, and in that of the step after the last."""
    n = dims(x=(x, "B T Dx"), slots=(memory.slots, "B L M D"), valid=(memory.valid, "B M"))
    if n["L"] != len(params.blocks):
        raise ValueError(
            f"memory.slots must have a row for each of {len(params.blocks)} layers, got {n['L']}"
        )
    if memory.valid.dtype != bool:
        raise ValueError(f"memory.valid must be boolean, got {memory.valid.dtype}")
    done = np.zeros((n["B"], n["T"]), bool) if done is None else done
    if done.dtype != bool:
        raise ValueError(f"done must be boolean, got {done.dtype}")
    dims(x=(x, "B T Dx"), done=(done, "B T"))
    after = np.cumsum(done, axis=1)
    episode = np.concatenate([np.zeros((n["B"], n["M"]), int), after - done], axis=1)  # ends before each step
    open_ = np.concatenate([memory.valid, np.ones((n["B"], n["T"]), bool)], axis=1)
    mask = (episode[:, n["M"] :, None] == episode[:, None, :]) & open_[:, None, :]
    return mask, (episode == np.sum(done, axis=1)[:, None]) & open_


def _embed(x, params):
    return float64(x) if params.w_embed is None else relu(linear(x, params.w_embed, params.b_embed))


def _gru(x, y, p):
    """(r, z, h): reset gate, update gate, candidate."""
    r, z = sigmoid(y @ p.w_r + x @ p.u_r), sigmoid(y @ p.w_z + x @ p.u_z - p.b)
    return r, z, np.tanh(y @ p.w_g + (r * x) @ p.u_g)


def _product_vjp(x, w, dy):
    return linear_vjp(x, w, dy, bias=False)[:2]


def _rows(d):
    return d.reshape(-1, d.shape[-1]).sum(axis=0)


def check_gate(x, y, params, kind):
    """Raise ValueError for a bad call of the gate."""
    one_of("gate", kind, GATES)
    n = dims(x=(x, "... D"), y=(y, "... D"))
    if kind is None:
        return
    if params is None:
        raise ValueError(f"params must hold the weights of a gate of kind {kind!r}, got None")
    for name in (*MAPS.get(kind, ("w",)), *(() if kind == "input" else ("b",))):
        field, shape = getattr(params, name), f"{n['D']}" if name == "b" else f"{n['D']} {n['D']}"
        if field is None:
            raise ValueError(f"params.{name} is None: a gate of kind {kind!r} needs it")
        dims(**{f"params.{name}": (field, shape)})


def example(seed=0):
    """A network of two layers on six steps of two worlds, the second of which begins anew at its fourth."""
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    params = init_gtrxl(rng, inputs=3, width=8, layers=2, heads=2, head_dim=4)
    params = tree_map(lambda w: w + 0.1 * draw(w.shape), params)
    memory = GTrXLMemory(draw((2, 2, 4, 8)), np.arange(8).reshape(2, 4) > 1)
    x, y, past = draw((2, 6, 8)), draw((2, 6, 8)), draw((2, 4, 8))
    block, shared = params.blocks[0], {"heads": 2, "u": params.u, "v_bias": params.v_bias}
    done = np.zeros((2, 6), bool)
    done[1, 2] = True
    batch = draw((2, 6, 5)), draw((2, 6, 5)), draw((2, 6)), rng.integers(0, 5, (2, 6)), draw((2, 6))
    return [
        Example("gate", (x, y, block.gate_attn), {}, (0, 1, 2)),
        Example("relative_attention", (x, past, block.attn), shared, (0, 1, 2)),
        Example("relative_shift", (draw((2, 3, 7)),), {}, (0,)),
        Example("gtrxl_block", (x, past, block), shared, (0, 2)),
        Example("gtrxl", (draw((2, 6, 3)), memory, params), {"heads": 2, "done": done}, (0, 2)),
        Example("vmpo_loss", (*batch, 1.0, 5.0), {}),
    ]
