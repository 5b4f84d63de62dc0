"""Three schedules of an int8 vision transformer, run inside one arena of bytes.

As far as MCUFormer (Liang et al. 2023) tells them: operators fused token by token and row by row, patches
read one row of the image at a time, results written over the inputs that they alone needed. The memory is
that of ref/blocks/live_arena.py, planned by `plan_arena`; a `Phase` names whatever is alive while it runs.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.arena import Plan, best_plan
from ref.blocks.int8_ops import lut_s8
from ref.blocks.integer import requantize
from ref.blocks.live_arena import Phase, lifetimes, live_bytes, run_phases
from ref.blocks.vit_int8 import PIXEL, Layer8, Linear8, QModel, frame


class Trace(NamedTuple):
    """What a run used: the plan, bytes alive by operator, the most alive at a time, the last byte touched."""

    schedule: str
    plan: Plan
    table: dict
    peak: int
    high: int


def run_int8(img, q: QModel, schedule, arena_bytes=None):
    """(logits int32 [K], Trace) of one image uint8 [S, S, C]."""
    result = []
    phases = list(SCHEDULES[schedule](q, img.astype(np.int16) - 128, result))
    arena = run_phases(phases, size=arena_bytes)
    return result[0], Trace(schedule, arena.plan, live_bytes(phases), arena.most, arena.high)


def plan_int8(q: QModel, *, schedule="integrated") -> Trace:
    """The plan of a schedule and its bytes by operator, without running it: touched bytes are 0."""
    phases = list(SCHEDULES[schedule](q, np.zeros((q.image, q.image, q.channels), np.int16), []))
    plan = best_plan(lifetimes(phases), align=1)
    table = live_bytes(phases)
    return Trace(schedule, plan, table, max(table.values()), 0)


def _row(i):
    return slice(i, i + 1)


def _patch_row(q, image, r):
    """Pixels of the r-th row of patches, int8 [<= p, S C], and how many rows of zeros come before them."""
    start = r * q.patch - frame(q.image, q.patch)[0]
    rows = image[max(start, 0) : start + q.patch]
    return rows.reshape(len(rows), -1).astype(np.int8), max(-start, 0)


def _patch(q, rows, skipped, c):
    """The c-th patch [1, p p C] of rows of pixels; what lies outside the image has the code of 0."""
    p = q.patch
    tile = np.full((p, p, q.channels), PIXEL[1], np.int8)
    start = c * p - frame(q.image, p)[0]
    pixels = rows.reshape(len(rows), q.image, q.channels)[:, max(start, 0) : start + p]
    left = max(-start, 0)
    tile[skipped : skipped + len(rows), left : left + pixels.shape[1]] = pixels
    return tile.reshape(1, -1)


def _embed(a, q, image, source):
    """Tokens into x. source "row": one row of patches at a time; "image": the whole image is held."""
    (before, n), C = frame(q.image, q.patch), q.channels
    a.put("x", 0, q.first)
    if source == "image":
        a.put("image", slice(None), image.reshape(q.image, -1).astype(np.int8))
    for r in range(n):
        rows, skipped = _patch_row(q, image, r)
        if source == "row":
            a.put("row", slice(len(rows)), rows)
            rows = a.get("row", slice(len(rows)))
        else:
            start = max(r * q.patch - before, 0)
            rows = a.get("image", slice(start, start + len(rows)))
        assert rows.shape[1] == q.image * C
        for c in range(n):
            i = 1 + r * n + c
            token = q.embed(_patch(q, rows, skipped, c))
            a.put("x", _row(i), q.place(token, q.positions[i - 1][None]))
        if source == "row":
            a.drop("row")


def _pooled(q, total):
    """int32 sums of normalised codes [1, E] -> the pooled vector, int8 [1, E]."""
    multiplier, shift, zero, out = q.pool
    y = requantize((total - zero).astype(np.int32), multiplier, shift).astype(np.int64) + out
    return np.clip(y, -128, 127).astype(np.int8)


def _logits(q, pooled):
    """int32 [K]: each leaves the arena as it is computed."""
    return (pooled.astype(np.int32) @ q.w_head.T.astype(np.int32) + q.b_head)[0].astype(np.int32)


def _heads(q, i):
    d = q.head_dim
    return [slice(h * d, (h + 1) * d) for h in range(q.heads[i])]


def _score(p: Layer8, q_row, k, i, acc=None):
    """The int8 logits [1, N] of one query; acc: its int32 sums, where the schedule holds them."""
    s = p.scores(q_row, k) if acc is None else p.scores.finish(acc)
    return s if p.near is None else p.join(s, p.near(q_row, p.r_k.rows(i, len(k))))


def _mix(p: Layer8, weights, v, i):
    """The output [1, d] of one query."""
    o = p.values(weights, v.T)
    return o if p.offsets is None else p.merge(o, p.offsets(weights, p.r_v.rows(i, len(v)).T))


def _through(a, fns, names, start):
    """The first function on `start`, each next one on the result in its buffer: scratch of one token."""
    for fn, name in zip(fns, names, strict=True):
        a.put(name, slice(None), fn(start))
        start = a.get(name)
    return start


def _integrated(q: QModel, image, result, *, by_head=False):
    N, E, S = q.tokens, len(q.first), q.image
    x = {"x": (N, E)}
    yield Phase("patch", {"row": (q.patch, S * q.channels), **x}, lambda a: _embed(a, q, image, "row"))
    for i, p in enumerate(q.layers):
        A, R, M, F = (len(w.w) for w in (p.heads_of[0], p.qkv[0], p.fc1[0], p.fc1[2]))
        n = lambda name, i=i: f"{i}.{name}"
        if by_head:
            d = q.head_dim
            yield Phase("attention", {**x, n("q"): (N, A), n("k"): (N, d), n("v"): (N, d), n("q1"): (1, d),
                        n("scores"): (1, 4 * N), n("weights"): (1, N), n("norm"): (1, E), n("r1"): (1, R),
                        n("r2"): (1, R)},
                        lambda a, i=i, p=p, n=n: _one_head_at_a_time(a, q, p, i, n))  # fmt: skip
        else:
            held = {**x, n("q"): (N, A), n("k"): (N, A), n("v"): (N, A)}
            yield Phase("qkv", {**held, n("norm"): (1, E), n("r1"): (1, R), n("r2"): (1, R)},
                        lambda a, p=p, n=n: _qkv_by_token(a, q, p, n))  # fmt: skip
            yield Phase("attention", {**held, n("scores"): (1, 4 * N), n("weights"): (1, N)},
                        lambda a, i=i, p=p, n=n: _attention_by_row(a, q, p, i, n))  # fmt: skip
        yield Phase("proj", {**x, n("q"): (N, A), n("p1"): (1, R), n("p2"): (1, R), n("p3"): (1, E)},
                    lambda a, p=p, n=n: _project_by_token(a, q, p, n))  # fmt: skip
        yield Phase("ffn", {**x, n("norm2"): (1, E), n("f1"): (1, M), n("f2"): (1, M), n("f3"): (1, F),
                    n("g1"): (1, M), n("g2"): (1, M), n("g3"): (1, E)},
                    lambda a, p=p, n=n: _mlp_by_token(a, q, p, n))  # fmt: skip
    yield Phase("head", {**x, "norm": (1, E), "sum": (1, 4 * E)}, lambda a: _head_by_token(a, q, result))


def _qkv_by_token(a, q, p, n):
    names = n("norm"), n("r1"), n("r2")
    for i in range(q.tokens):
        low = _through(a, (p.norm1, *p.qkv), names, a.get("x", _row(i)))
        for name, fn in zip("qkv", p.heads_of, strict=True):
            a.put(n(name), _row(i), fn(low))
        a.drop(*names)


def _weigh(a, p, q_row, k, i, n):
    """Weights of one query: int32 sums, int8 logits over their first quarter, then the weights' own row."""
    a.put(n("scores"), slice(None), p.scores.sums(q_row, k).view(np.int8))
    logits = _score(p, q_row, k, i, a.get(n("scores")).view(np.int32))
    first = (slice(None), slice(len(k)))
    a.put(n("scores"), first, logits)
    a.put(n("weights"), slice(None), p.softmax(a.get(n("scores"), first)))
    a.drop(n("scores"))
    return a.get(n("weights"))


def _attention_by_row(a, q, p, layer, n):
    for i in range(q.tokens):
        for cols in _heads(q, layer):
            k, v = a.get(n("k"), (slice(None), cols)), a.get(n("v"), (slice(None), cols))
            weights = _weigh(a, p, a.get(n("q"), (_row(i), cols)), k, i, n)
            a.drop(n("q"), key=(_row(i), cols))  # this head of q_i is dead: the result takes its place
            a.put(n("q"), (_row(i), cols), _mix(p, weights, v, i))
            a.drop(n("weights"))


def _one_head_at_a_time(a, q, p, layer, n):
    names = n("norm"), n("r1"), n("r2")
    for cols in _heads(q, layer):
        part = [Linear8(f.w[cols], f.b[cols], f.multiplier[cols], f.shift[cols], *f[4:]) for f in p.heads_of]
        for i in range(q.tokens):
            low = _through(a, (p.norm1, *p.qkv), names, a.get("x", _row(i)))
            for name, fn in zip("kv", part[1:], strict=True):
                a.put(n(name), _row(i), fn(low))
            a.drop(*names)
        for i in range(q.tokens):
            low = _through(a, (p.norm1, *p.qkv), names, a.get("x", _row(i)))
            a.put(n("q1"), slice(None), part[0](low))
            weights = _weigh(a, p, a.get(n("q1")), a.get(n("k")), i, n)
            a.put(n("q"), (_row(i), cols), _mix(p, weights, a.get(n("v")), i))
            a.drop(*names, n("q1"), n("weights"))
        a.drop(n("k"), n("v"))


def _project_by_token(a, q, p, n):
    names = n("p1"), n("p2"), n("p3")
    for i in range(q.tokens):
        y = _through(a, p.proj, names, a.get(n("q"), _row(i)))
        a.drop(n("q"), key=_row(i))
        a.put("x", _row(i), p.add1(a.get("x", _row(i)), y))  # the residual is read before it is overwritten
        a.drop(*names)


def _mlp_by_token(a, q, p, n):
    names = [n(name) for name in ("norm2", "f1", "f2", "f3", "g1", "g2", "g3")]
    for i in range(q.tokens):
        y = _through(a, (p.norm2, *p.fc1), names[:4], a.get("x", _row(i)))
        a.put(names[3], slice(None), lut_s8(y, p.gelu))
        y = _through(a, p.fc2, names[4:], a.get(names[3]))
        a.put("x", _row(i), p.add2(a.get("x", _row(i)), y))
        a.drop(*names)


def _head_by_token(a, q, result):
    a.put("sum", slice(None), np.zeros((1, len(q.first)), np.int32).view(np.int8))
    for i in [0] if q.pooling == "class_token" else range(1, q.tokens):
        a.put("norm", slice(None), q.norm(a.get("x", _row(i))))
        total = a.get("sum").view(np.int32) + a.get("norm")
        a.put("sum", slice(None), total.astype(np.int32).view(np.int8))
        a.drop("norm")
    pooled = _pooled(q, a.get("sum").view(np.int32))
    a.put("norm", slice(None), pooled)
    result.append(_logits(q, a.get("norm")))


def _naive(q: QModel, image, result):
    """Every operator on the whole map, its result beside its operands."""
    N, E, S = q.tokens, len(q.first), q.image
    every = slice(None)
    yield Phase("patch", {"image": (S, S * q.channels), "x": (N, E)}, lambda a: _embed(a, q, image, "image"))
    x = "x"

    def one(op, fn, src, dst, **buffers):
        return Phase(op, buffers, lambda a: a.put(dst, every, fn(*(a.get(s) for s in src))))

    for i, p in enumerate(q.layers):
        A, R, M, F, h = *(len(w.w) for w in (p.heads_of[0], p.qkv[0], p.fc1[0], p.fc1[2])), q.heads[i]
        n = lambda name, i=i: f"{i}.{name}"

        def op(kind, fn, src, dst, sizes, keep=(), n=n):
            """An operator whose buffers are its operands, its result and what must stay."""
            return Phase(kind, {b: sizes[b] for b in (*keep, *src, dst)},
                         lambda a: a.put(dst, every, fn(*(a.get(s) for s in src))))  # fmt: skip

        y1, y2 = n("x1"), n("x2")
        sizes = {x: (N, E), y1: (N, E), y2: (N, E)} | {n(b): (N, w) for b, w in (
            ("norm1", E), ("r1", R), ("r2", R), ("q", A), ("k", A), ("v", A), ("o", A), ("p1", R), ("p2", R),
            ("p3", E), ("norm2", E), ("f1", M), ("f2", M), ("f3", F), ("g", F), ("g1", M), ("g2", M),
            ("g3", E),
        )}  # fmt: skip
        sizes |= {n("s"): (h * N, N), n("w"): (h * N, N)}
        yield op("ln", p.norm1, [x], n("norm1"), sizes)
        yield op("qkv1", p.qkv[0], [n("norm1")], n("r1"), sizes, [x])
        yield op("qkv2", p.qkv[1], [n("r1")], n("r2"), sizes, [x])
        three = {b: sizes[b] for b in (x, n("r2"), n("q"), n("k"), n("v"))}
        yield Phase(
            "qkv3",
            three,
            lambda a, p=p, n=n: [
                a.put(n(b), every, fn(a.get(n("r2")))) for b, fn in zip("qkv", p.heads_of, strict=True)
            ],
        )
        scores = lambda q_, k, p=p, i=i: _all_scores(q, p, i, q_, k)
        yield op("scores", scores, [n("q"), n("k")], n("s"), sizes, [x, n("v")])
        yield op("softmax", p.softmax, [n("s")], n("w"), sizes, [x, n("v")])
        yield op(
            "pv", lambda w, v, p=p, i=i: _all_values(q, p, i, w, v), [n("w"), n("v")], n("o"), sizes, [x]
        )
        yield op("proj1", p.proj[0], [n("o")], n("p1"), sizes, [x])
        yield op("proj2", p.proj[1], [n("p1")], n("p2"), sizes, [x])
        yield op("proj3", p.proj[2], [n("p2")], n("p3"), sizes, [x])
        yield op("add", p.add1, [x, n("p3")], y1, sizes)
        yield op("ln", p.norm2, [y1], n("norm2"), sizes)
        yield op("fc11", p.fc1[0], [n("norm2")], n("f1"), sizes, [y1])
        yield op("fc12", p.fc1[1], [n("f1")], n("f2"), sizes, [y1])
        yield op("fc13", p.fc1[2], [n("f2")], n("f3"), sizes, [y1])
        yield op("gelu", lambda f, p=p: lut_s8(f, p.gelu), [n("f3")], n("g"), sizes, [y1])
        yield op("fc21", p.fc2[0], [n("g")], n("g1"), sizes, [y1])
        yield op("fc22", p.fc2[1], [n("g1")], n("g2"), sizes, [y1])
        yield op("fc23", p.fc2[2], [n("g2")], n("g3"), sizes, [y1])
        yield op("add", p.add2, [y1, n("g3")], y2, sizes)
        x = y2
    yield one("ln", q.norm, [x], "norm", **{x: (N, E)}, norm=(N, E))
    rows = every if q.pooling == "patch_mean" else _row(0)
    first = 1 if q.pooling == "patch_mean" else 0
    pool = lambda m: _pooled(q, m[first:][rows].astype(np.int32).sum(axis=0, keepdims=True))
    yield one("pool", pool, ["norm"], "pooled", norm=(N, E), pooled=(1, E))
    yield Phase("pool", {"pooled": (1, E)}, lambda a: result.append(_logits(q, a.get("pooled"))))


def _all_scores(q, p, layer, queries, k):
    """[h N, N]: the two products of an entry are joined as it is computed."""
    return np.concatenate([_score(p, queries[_row(i), cols], k[:, cols], i)
                           for cols in _heads(q, layer) for i in range(q.tokens)])  # fmt: skip


def _all_values(q, p, layer, weights, v):
    """[N, A], head beside head."""
    N = q.tokens
    return np.concatenate([
        np.concatenate([_mix(p, weights[_row(h * N + i)], v[:, cols], i) for i in range(N)])
        for h, cols in enumerate(_heads(q, layer))
    ], axis=1)  # fmt: skip


SCHEDULES = {
    "integrated": _integrated,
    "naive": _naive,
    "head_by_head": lambda q, image, result: _integrated(q, image, result, by_head=True),
}
