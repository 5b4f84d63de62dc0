"""MemMamba: every layer of a state-space model takes notes in a pool of fixed size, and reads them again.

Source: MemMamba 2025 (arXiv 2510.03279) on the base of Mamba (`ref/models/mamba.py`). No code is released and
the paper leaves the scorer, both thresholds and the priority open: those are our choices.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import linear_vjp, sigmoid
from ref.blocks.norms import rms_norm, rms_norm_vjp
from ref.blocks.notes import (
    CrossParams,
    NoteParams,
    NotePool,
    check_notes,
    cross_layer_attention,
    empty_pool,
    insert_note,
    note_history,
    note_pool,
    note_scores,
    pool_at,
    read_layers,
    read_layers_vjp,
    read_notes,
    read_notes_vjp,
    read_pool,
)
from ref.blocks.retention import (
    half_life,
    influence,
    layer_memory_fidelity,
    memory_capacity,
    memory_information,
    token_memory_fidelity,
)
from ref.blocks.scan import selective_scan, selective_scan_vjp
from ref.checks import check_ids
from ref.dims import dims, float64
from ref.example import Example
from ref.models.mamba import (
    MambaCache,
    MambaParams,
    init_mamba,
    init_mamba_cache,
    mamba_block,
    mamba_block_vjp,
    mamba_macs,
    mamba_step,
)

__all__ = [
    "CrossParams", "MambaCache", "MambaParams", "MemMambaBlock", "MemMambaCache", "MemMambaParams",
    "NoteParams", "NotePool", "cross_layer_attention", "example", "half_life", "influence", "init_memmamba",
    "init_memmamba_cache", "layer_memory_fidelity", "mamba_block", "mamba_block_vjp", "mamba_step",
    "memmamba_block", "memmamba_block_vjp", "memmamba_lm", "memmamba_lm_vjp", "memmamba_macs",
    "memmamba_step", "memory_capacity", "memory_information", "note_pool", "note_scores", "selective_scan",
    "selective_scan_vjp", "token_memory_fidelity",
]  # fmt: skip


class MemMambaBlock(NamedTuple):
    """norm [C], the mixer, the notes; the gate w_z [C], b_z []; each fusion a scalar gate times a map [C, C].

    gate_layer, w_layer and cross are None in a layer that does not read those below it.
    """

    norm: np.ndarray
    mamba: MambaParams
    notes: NoteParams
    w_z: np.ndarray
    b_z: np.ndarray
    gate_token: np.ndarray
    w_token: np.ndarray
    gate_layer: np.ndarray | None = None
    w_layer: np.ndarray | None = None
    cross: CrossParams | None = None


class MemMambaParams(NamedTuple):
    """embedding [V, C], which also gives the logits, the blocks, and the last norm [C]."""

    embedding: np.ndarray
    blocks: tuple[MemMambaBlock, ...]
    norm: np.ndarray


class MemMambaCache(NamedTuple):
    """By layer: the mixer's cache, the pool, the mixer's last output z [..., C]; and the tokens read."""

    mixers: tuple[MambaCache, ...]
    pools: tuple[NotePool, ...]
    outputs: tuple[np.ndarray, ...]
    steps: int


def memmamba_block(x, params: MemMambaBlock, pools, *, layer, every=4, capacity=50, threshold=0.5,
                   state_threshold=0.3, policy="priority", chunk=64):  # fmt: skip
    """(y, pool): x + mixer(u + notes of the layer + notes of lower layers), u = rms_norm(x). x [..., T, C].

    The layer's own notes are let in at token t if sigmoid(w_z . z_{t-1} + b_z) > state_threshold, z_{t-1}
    being the mixer's previous output (0 before the first). Layers 4, 8, ... for every = 4 read the pools of
    the `every` layers below.
    Args: layer: counted from 0. pools: list of what the blocks below returned.
    Returns: pool has an axis of chunks before the slots, n + 1 long: what each chunk sees, and the end. Seen
      from above, a pool that was filled later would be a look into the future.
    """
    y, history, _ = _run(x, params, pools, layer, every, capacity, threshold, state_threshold, policy, chunk)
    return y, history


def memmamba_block_vjp(x, params: MemMambaBlock, pools, dy, dpool, *, layer, every=4, capacity=50,
                       threshold=0.5, state_threshold=0.3, policy="priority", chunk=64):  # fmt: skip
    """(dx, dparams, dpools) for dy [..., T, C] and dpool, that of pool.summaries; dpools: one a pool.

    Straight-through (our choice): a summary counts as s_t (1 + score_t - stopgrad(score_t)), so its value is
    s_t and the scorer learns from <ds_t, s_t>. Which slot a note takes, and the gate of the state, carry no
    gradient.
    """
    p = params
    _, history, (u, context, across, opened, mixed) = _run(
        x, p, pools, layer, every, capacity, threshold, state_threshold, policy, chunk
    )
    dmixed, dmamba = mamba_block_vjp(mixed, p.mamba, dy)
    du, grads = dmixed, {"mamba": dmamba, "w_z": np.zeros_like(p.w_z), "b_z": np.zeros_like(p.b_z)}
    dfused = dmixed * opened[..., None]
    dcontext, grads["gate_token"], grads["w_token"] = _fuse_vjp(context, p.gate_token, p.w_token, dfused)
    dx, grads["notes"] = read_notes_vjp(u, p.notes, history, chunk, dcontext, dpool)
    du = du + dx
    dpools = [np.zeros_like(pool.summaries) for pool in pools]
    if across is not None:
        dcontext, grads["gate_layer"], grads["w_layer"] = _fuse_vjp(across, p.gate_layer, p.w_layer, dmixed)
        dx, dpools[-every:], grads["cross"] = read_layers_vjp(u, pools[-every:], p.cross, chunk, dcontext)
        du = du + dx
    dx, grads["norm"] = rms_norm_vjp(x, p.norm, du)
    return dx + dy, MemMambaBlock(**grads), dpools


def memmamba_lm(tokens, params: MemMambaParams, *, every=4, capacity=50, threshold=0.5, state_threshold=0.3,
                policy="priority", chunk=64):  # fmt: skip
    """Logits [..., T, V] of the next token, for tokens [..., T]: ints below V."""
    options = _options(every, capacity, threshold, state_threshold, policy, chunk)
    x = _layers(tokens, params, options)[0][-1]
    return rms_norm(x, params.norm) @ params.embedding.T


def memmamba_lm_vjp(tokens, params: MemMambaParams, dlogits, *, every=4, capacity=50, threshold=0.5,
                    state_threshold=0.3, policy="priority", chunk=64):  # fmt: skip
    """dparams of `memmamba_lm` for dlogits [..., T, V]; every block is run again."""
    options = _options(every, capacity, threshold, state_threshold, policy, chunk)
    hidden, pools = _layers(tokens, params, options)
    dims(x=(hidden[-1], "... T C"), dlogits=(dlogits, f"... T {len(params.embedding)}"))
    dlast, dhead, _ = linear_vjp(rms_norm(hidden[-1], params.norm), params.embedding.T, dlogits, bias=False)
    dx, dnorm = rms_norm_vjp(hidden[-1], params.norm, dlast)
    dpools, blocks = [np.zeros_like(pool.summaries) for pool in pools], []
    for layer in reversed(range(len(params.blocks))):
        dx, grads, below = memmamba_block_vjp(hidden[layer], params.blocks[layer], pools[:layer], dx,
                                              dpools[layer], layer=layer, **options)  # fmt: skip
        dpools[:layer] = [a + b for a, b in zip(dpools[:layer], below, strict=True)]
        blocks.append(grads)
    dembedding = dhead.T.copy()
    np.add.at(dembedding, np.asarray(tokens), dx)
    return MemMambaParams(dembedding, tuple(blocks[::-1]), dnorm)


def memmamba_step(token, cache: MemMambaCache, params: MemMambaParams, *, every=4, threshold=0.5,
                  state_threshold=0.3, policy="priority"):  # fmt: skip
    """(logits [..., V], cache) for one more token [...]: `memmamba_lm` with chunk = 1, in constant memory."""
    x, mixers, pools, outputs = _embed(token, params), [], [], []
    for layer, p in enumerate(params.blocks):
        u, pool, z = rms_norm(x, p.norm), cache.pools[layer], cache.outputs[layer]
        one = u[..., None, :]
        check_notes(one, p.notes, pool.age.shape[-1], policy, 1, pool)
        opened = _opens(z, p, state_threshold)
        context = read_pool(one, pool, p.notes)[..., 0, :] @ p.w_token
        mixed = u + np.where(opened[..., None], p.gate_token * context, 0.0)
        if _reads_below(layer, every):
            below = cross_layer_attention(one, cache.pools[layer - every : layer], p.cross)[..., 0, :]
            mixed = mixed + p.gate_layer * (below @ p.w_layer)
        z, mixer = mamba_step(mixed, cache.mixers[layer], p.mamba)
        score, index = note_scores(one, p.notes)[..., 0], np.int32(cache.steps)
        pools.append(insert_note(pool, score, u @ p.notes.w_summary, index, threshold, policy))
        mixers.append(mixer)
        outputs.append(z)
        x = x + z
    cache = MemMambaCache(tuple(mixers), tuple(pools), tuple(outputs), cache.steps + 1)
    return rms_norm(x, params.norm) @ params.embedding.T, cache


def init_memmamba_cache(params: MemMambaParams, *, capacity=50, lead=()):
    """The cache before the first token, for sequences of leading axes `lead`."""
    mixers = tuple(init_mamba_cache(p.mamba, lead) for p in params.blocks)
    pools = tuple(empty_pool(lead, capacity, p.notes.w_summary.shape[1]) for p in params.blocks)
    return MemMambaCache(mixers, pools, tuple(np.zeros((*lead, len(p.norm))) for p in params.blocks), 0)


def init_memmamba(key, *, vocab, width, layers, state=16, summary=64, every=4):
    """MemMambaParams: fusion gates 0, so that training starts from plain Mamba (our choice).

    key: NumPy Generator or seed. Scorer width / 4; linear maps normal within fan_in^-1/2.
    """
    if min(vocab, width, layers, summary, every) < 1:
        raise ValueError(
            f"vocab, width, layers, summary and every must be at least 1, got {vocab}, {width}, {layers}, "
            f"{summary}, {every}"
        )
    rng, m, zero = np.random.default_rng(key), max(width // 4, 1), np.zeros(())
    draw = lambda *shape: rng.standard_normal(shape) / np.sqrt(shape[-2] if len(shape) > 1 else shape[0])
    attention = lambda: (draw(width, summary), draw(summary, summary), draw(summary, width))
    blocks = []
    for layer in range(layers):
        cross = {}
        if _reads_below(layer, every):
            maps = CrossParams(draw(every, summary, summary), *attention())
            cross = {"gate_layer": zero, "w_layer": draw(width, width), "cross": maps}
        notes = NoteParams(draw(width, m), np.zeros(m), draw(m), zero, draw(width, summary), *attention())
        mamba = init_mamba(rng, width, state=state)
        block = MemMambaBlock(
            np.ones(width), mamba, notes, draw(width), zero, zero, draw(width, width), **cross
        )
        blocks.append(block)
    return MemMambaParams(0.02 * rng.standard_normal((vocab, width)), tuple(blocks), np.ones(width))


def memmamba_macs(width, *, state=16, capacity=50, summary=64):
    """Multiply-accumulates of a token and layer with its own pool: mixer, scorer, note, reading, fusions.

    Independent of the length. The keys are never projected: (x w_q) w_k^T meets the summaries themselves.
    """
    m = max(width // 4, 1)
    reading = 2 * width * summary + summary**2 + 2 * capacity * summary
    return mamba_macs(width, state=state) + (width + 1) * m + width * summary + reading + width**2 + width


def _run(x, p, pools, layer, every, capacity, threshold, state_threshold, policy, chunk):
    """(y, history, what the backward pass needs: u, both contexts, the open gates, the mixer's input)."""
    check_block(x, p, pools, layer, every, capacity, policy, chunk)
    x = float64(x)
    u = rms_norm(x, p.norm)
    history = note_history(u, p.notes, capacity, threshold, policy, chunk)
    context = read_notes(u, history, p.notes, chunk)
    token, rest, across = p.gate_token * (context @ p.w_token), u, None
    if _reads_below(layer, every):
        across = read_layers(u, pools[-every:], p.cross, chunk)
        rest = u + p.gate_layer * (across @ p.w_layer)
    mixed, y = np.zeros_like(x), np.zeros_like(x)
    opened, z = np.zeros(x.shape[:-1], bool), np.zeros_like(x, shape=(*x.shape[:-2], x.shape[-1]))
    cache = init_mamba_cache(p.mamba, x.shape[:-2])
    for t in range(x.shape[-2]):
        opened[..., t] = _opens(z, p, state_threshold)
        mixed[..., t, :] = rest[..., t, :] + np.where(opened[..., t, None], token[..., t, :], 0.0)
        z, cache = mamba_step(mixed[..., t, :], cache, p.mamba)
        y[..., t, :] = z
    return x + y, history, (u, context, across, opened, mixed)


def _layers(tokens, params, options):
    """(input of every block and the last output, pools of every block)."""
    hidden, pools = [_embed(tokens, params)], []
    for layer, block in enumerate(params.blocks):
        x, pool = memmamba_block(hidden[-1], block, pools, layer=layer, **options)
        hidden.append(x)
        pools.append(pool)
    return hidden, pools


def _embed(tokens, params):
    return float64(params.embedding)[check_ids("tokens", tokens, len(params.embedding))]


def _opens(z, p, state_threshold):
    """Whether the mixer's last output z [..., C] suggests that something was lost: bool [...]."""
    return sigmoid((z[..., None, :] @ p.w_z)[..., 0] + p.b_z) > state_threshold


def _fuse_vjp(context, gate, w, dy):
    """(dcontext, dgate, dw) of gate * (context w)."""
    dcontext, dw, _ = linear_vjp(context, w, gate * dy, bias=False)
    return dcontext, np.sum(dy * (context @ w)), dw


def _reads_below(layer, every):
    return layer > 0 and layer % every == 0


def _options(every, capacity, threshold, state_threshold, policy, chunk):
    return {
        "every": every, "capacity": capacity, "threshold": threshold, "state_threshold": state_threshold,
        "policy": policy, "chunk": chunk,
    }  # fmt: skip


def check_block(x, p, pools, layer, every, capacity, policy, chunk):
    """Raise ValueError for a bad call of the block."""
    check_notes(x, p.notes, capacity, policy, chunk)
    dims(x=(x, "... T C"), norm=(p.norm, "C"), w_z=(p.w_z, "C"), w_token=(p.w_token, "C C"))
    if every < 1 or layer < 0 or len(pools) != layer:
        raise ValueError(
            f"need every >= 1, layer >= 0 and a pool of each of the layers below, got {every=}, {layer=}, "
            f"{len(pools)} pools"
        )
    if _reads_below(layer, every) and p.cross is None:
        raise ValueError(f"params.cross must not be None in layer {layer}, which reads the {every} below it")


def example(seed=0):
    """Eight channels and seven tokens of SmolLM2's hidden states; pools of two slots, three layers."""
    from ref.data import hidden_states, token_ids

    rng = np.random.default_rng(seed)
    x = hidden_states()[1:8, 8 * seed : 8 * seed + 8]
    x = np.stack([x, hidden_states("early")[1:8, :8]])
    model = init_memmamba(rng, vocab=50, width=8, layers=3, state=4, summary=4, every=2)
    opened = lambda b: b._replace(gate_token=np.ones(()), gate_layer=None if b.cross is None else np.ones(()))
    model = model._replace(blocks=tuple(opened(b) for b in model.blocks))
    notes, mamba = model.blocks[0].notes, model.blocks[0].mamba
    options = {"capacity": 2, "chunk": 3}
    pools, cross = [], model.blocks[2].cross
    for layer in (0, 1):
        pools.append(memmamba_block(x, model.blocks[layer], pools, layer=layer, every=2, **options)[1])
    ends = [pool_at(pool, -1) for pool in pools]
    u, delta, b, c = rng.standard_normal((4, 2, 7, 6))
    a, d, z = -np.exp(rng.standard_normal((6, 6))), rng.standard_normal(6), rng.standard_normal((2, 7, 6))
    cache = init_mamba_cache(mamba, (2,))
    return [
        Example("selective_scan", (u, delta, a, b, c, d, z), {"return_state": True}, (0, 1, 2, 3, 4, 5, 6)),
        Example("mamba_block", (x, mamba), {}, (0, 1)),
        Example("mamba_step", (x[:, 0], cache, mamba), {}, (0, 2)),
        Example("note_scores", (x, notes), {}, (0, 1)),
        Example("note_pool", (x, notes), {"capacity": 2}),
        Example("cross_layer_attention", (x, ends, cross), {}, (0, 2)),
        Example("memmamba_block", (x, model.blocks[2], pools), {"layer": 2, "every": 2, **options}),
        Example("memmamba_lm", (token_ids()[:14].reshape(2, 7) % 50, model), {"every": 2, **options}),
        Example("influence", (np.abs(delta), a), {"lag": 3}, (0, 1)),
    ]
