"""Laws of BigBird on ref alone: NumPy and Hypothesis."""

import math
from collections import deque

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from ref.attention.bigbird import (
    BigBirdConfig,
    bigbird_attention,
    bigbird_attention_bwd,
    bigbird_block_mask,
    bigbird_cost,
    bigbird_encoder,
    bigbird_rand_blocks,
    bigbird_self_attention,
    graph_stats,
    init_rand_blocks,
    pad_to_blocks,
)
from ref.blocks.attention import attention_dense, split_heads
from ref.blocks.transformer import QKVParams, transformer_block
from ref.counting import Tally, count
from ref.models.bert import bert_embed, init_bert

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


def sees(i, j, nb, rand):
    """Block i sees block j; rand: the random blocks of every middle row."""
    return i in (0, nb - 1) or j in (0, nb - 1) or abs(i - j) <= 1 or j in rand[i - 1]


def definition(q, k, v, nb, b, g, rand, real):
    """One head, token by token, with exact sums."""
    L, D = v.shape
    at = lambda t: (t - g) // b
    o = np.zeros((L, D))
    for i in range(L):
        keys = [j for j in range(L) if real[j] and (min(i, j) < g or sees(at(i), at(j), nb, rand))]
        if not real[i]:
            continue
        s = [math.fsum(q[i] * k[j]) / math.sqrt(D) for j in keys]
        e = [math.exp(x - max(s)) for x in s]
        o[i] = [math.fsum(w * v[j, c] for w, j in zip(e, keys, strict=True)) / math.fsum(e) for c in range(D)]
    return o


def rounding(q, k, v):
    """Scores are off by D eps |q||k| / sqrt(D), exp passes on twice that; sums add L eps |v|."""
    L, D = q.shape[-2:]
    scores = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() / np.sqrt(D)
    return EPS * (2 * (D + 2) * scores + 2 * L + 8) * max(1.0, np.abs(v).max())


@st.composite
def calls(draw, most=9):
    """(q, k, v [2, 2, L, 3], options): 1 to 9 blocks, random ones where they fit, padding, globals."""
    nb, b, g = draw(st.integers(1, most)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(seeds))
    L = g + nb * b
    q, k, v = draw(st.sampled_from((1.0, 30.0, 1e-3))) * rng.standard_normal((3, 2, 2, L, 3))
    options = {"block_size": b, "num_global_tokens": g}
    if nb > 5 and draw(st.booleans()):
        r = draw(st.integers(1, nb - 5))
        tables = [bigbird_rand_blocks(rng.random((2, nb - 2, nb)), num_rand=r) for _ in range(2)]
        options["rand_blocks"] = np.stack(tables[: draw(st.integers(1, 2))])
    if draw(st.booleans()):
        options["token_mask"] = rng.random((2, L)) < 0.8
    return q, k, v, options


def parts(q, options):
    """(nb, b, g, tables [2, 2, nb - 2, r], real [2, L])."""
    L, b, g = q.shape[-2], options["block_size"], options["num_global_tokens"]
    nb = (L - g) // b
    rand = options.get("rand_blocks", np.zeros((1, 2, max(nb - 2, 0), 0), int))
    return (
        nb,
        b,
        g,
        np.broadcast_to(rand, (2, *rand.shape[1:])),
        options.get("token_mask", np.ones((2, L), bool)),
    )


@given(calls())
def law_bigbird_both_methods_equal_the_definition(call):
    q, k, v, options = call
    nb, b, g, rand, real = parts(q, options)
    want = np.zeros_like(q)
    for n, h in np.ndindex(2, 2):
        want[n, h] = definition(q[n, h], k[n, h], v[n, h], nb, b, g, rand[n, h], real[n])
    for method in ("blocked", "dense"):
        got = bigbird_attention(q, k, v, method=method, **options)
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding(q, k, v), err_msg=method)


@given(calls())
def law_bigbird_padding_is_never_seen(call):
    """NaN in padded tokens changes no bit, forward or backward; their rows and gradients are 0."""
    q, k, v, options = call
    real = parts(q, options)[-1][:, None, :, None]
    do = np.ones_like(q)
    dirty = lambda *xs: [np.where(real, x, np.nan) for x in xs]
    for fn, args in ((bigbird_attention, (q, k, v)), (bigbird_attention_bwd, (do, q, k, v))):
        want = np.array(fn(*args, **options))
        np.testing.assert_array_equal(np.array(fn(*dirty(*args), **options)), want)
        assert not np.where(real, 0, want).any()


@given(calls())
def law_bigbird_what_a_block_does_not_see_cannot_reach_it(call):
    """NaN in unseen keys and values leaves a row as it was, and its gradients towards them are exactly 0."""
    q, k, v, options = call
    nb, b, g, rand, _ = parts(q, options)
    o = bigbird_attention(q, k, v, **options)
    for i in range(1, nb - 1):
        rows = slice(g + i * b, g + (i + 1) * b)
        unseen = np.zeros((2, 2, q.shape[-2], 1), bool)
        for n, h in np.ndindex(2, 2):
            for j in range(nb):
                unseen[n, h, g + j * b : g + (j + 1) * b] = not sees(i, j, nb, rand[n, h])
        hidden = [np.where(unseen, np.nan, x) for x in (k, v)]
        np.testing.assert_array_equal(bigbird_attention(q, *hidden, **options)[..., rows, :], o[..., rows, :])
        do = np.zeros_like(q)
        do[..., rows, :] = 1
        _, dk, dv = bigbird_attention_bwd(do, q, k, v, **options)
        assert not np.where(unseen, dk, 0).any()
        assert not np.where(unseen, dv, 0).any()


@given(calls(most=7))
def law_bigbird_gradients_are_central_differences(call):
    """h = 1e-5 on data of size 1: error h^2 f''' + eps f / h, both under 1e-8 of the terms' size."""
    q, k, v, options = call
    gain = max(np.abs(q).max(), np.abs(k).max(), np.abs(v).max())
    q, k, v = q / gain, k / gain, v / gain
    do, *d = np.random.default_rng(1).standard_normal((4, *q.shape))
    for at, g in enumerate(bigbird_attention_bwd(do, q, k, v, **options)):
        moved = lambda h, at=at: [x + h * d[at] * (n == at) for n, x in enumerate((q, k, v))]
        f = lambda h, m=moved: np.sum(do * bigbird_attention(*m(h), **options))
        size = 1 + np.abs(do).sum() * np.abs(d[at]).max() ** 3
        np.testing.assert_allclose(np.sum(g * d[at]), (f(1e-5) - f(-1e-5)) / 2e-5, rtol=0, atol=1e-8 * size)


@given(seeds, st.integers(1, 4), st.integers(1, 3))
def law_bigbird_few_blocks_are_full_attention(seed, nb, b):
    """Up to four blocks window and ends are everything."""
    q, k, v = np.random.default_rng(seed).standard_normal((3, 1, 2, nb * b, 4))
    got = bigbird_attention(q, k, v, block_size=b)
    np.testing.assert_allclose(got, attention_dense(q, k, v), rtol=0, atol=2 * rounding(q, k, v))


@given(seeds, st.integers(6, 14), st.integers(0, 4), st.integers(0, 2))
def law_bigbird_mask_is_the_rule(seed, nb, r, front):
    r = min(r, nb - 5)
    rand = bigbird_rand_blocks(np.random.default_rng(seed).random((3, nb - 2, nb)), num_rand=r)
    mask = bigbird_block_mask(nb, rand, num_global_blocks=front)
    assert mask.shape == (3, front + nb, front + nb)
    assert mask[:, :front].all()
    assert mask[:, :, :front].all()
    inner = mask[:, front:, front:]
    for h in range(3):
        assert all(inner[h, i, j] == sees(i, j, nb, rand[h]) for i in range(nb) for j in range(nb))
    assert (inner[:, 2:-2].sum(axis=-1) == 5 + r).all()
    assert (inner[:, [1, -2]].sum(axis=-1) == 4 + r).all()
    cost = bigbird_cost(nb * 2, 6, num_heads=3, block_size=2, num_rand=r)
    assert (inner.sum(axis=(1, 2)) == cost["blocks"]).all()
    assert graph_stats(mask[0])["diameter"] <= 2  # through the ends


def hf_row(i, nb, r, u):
    """The blocks of row i under the plan of transformers, by its own loop; the order is that of u."""
    if 2 * r + 5 < nb:
        plan = [(0, 2 * r + 5, r)]
    elif r + 5 < nb:
        plan = [(0, r + 5, r // 2), (r + 5, nb, r - r // 2)]
    else:
        plan = [(0, nb, r)]
    chosen = []
    for start, end, most in plan:
        illegal = [i - 1, i, i + 1, 0, end - 1]
        illegal += [end - 2] if i == 1 else []
        illegal += [1] if i == end - 2 else []
        order = sorted((j for j in range(start, end) if j not in illegal), key=lambda j: u[j])
        chosen += order[:most]
    return sorted(chosen)


@given(seeds, st.integers(6, 20), st.integers(0, 4))
@example(seed=0, nb=12, r=3)
def law_bigbird_random_blocks_are_legal_and_those_of_the_least_numbers(seed, nb, r):
    r = min(r, nb - 5)
    u = np.random.default_rng(seed).random((2, nb - 2, nb))
    possible = all(len(hf_row(i, nb, r, u[0, 0])) == r for i in range(1, nb - 1))
    if not possible:  # a part of the plan may be too narrow
        try:
            raise AssertionError(bigbird_rand_blocks(u, num_rand=r, plan="hf"))
        except ValueError as error:
            assert "too few" in str(error)  # noqa: PT017 (laws do without pytest)
    for plan in ("uniform", "hf")[: 1 + possible]:
        rand = bigbird_rand_blocks(u, num_rand=r, plan=plan)
        assert rand.shape == (2, nb - 2, r)
        assert rand.dtype == np.int32
        bigbird_block_mask(nb, rand)  # raises for an illegal table
        np.testing.assert_array_equal(rand, bigbird_rand_blocks(u, num_rand=r, plan=plan))
        for h, i in np.ndindex(2, nb - 2):
            legal = [j for j in range(1, nb - 1) if abs(j - i - 1) > 1]
            least = sorted(sorted(legal, key=lambda j: u[h, i, j])[:r])
            assert rand[h, i].tolist() == (least if plan == "uniform" else hf_row(i + 1, nb, r, u[h, i]))


def law_bigbird_random_blocks_are_uniform():
    """Chi-square of how often row 5 of 14 draws each of its 9 legal blocks, 3 at a time, over 3,000 heads."""
    rand = bigbird_rand_blocks(np.random.default_rng(0).random((3000, 12, 14)), num_rand=3)
    assert (rand[0] != rand[1]).any()
    hits = np.bincount(rand[:, 4].ravel(), minlength=14)
    legal = [j for j in range(1, 13) if abs(j - 5) > 1]
    assert hits.sum() == hits[legal].sum() == 9000
    # A head draws 3 of 9: the covariance of the hits is 750 (identity less mean), so this sum is chi-square
    # with 8 degrees of freedom, whose 0.999 point is 26.1.
    assert ((hits[legal] - 1000) ** 2).sum() / 750 < 26.1


@given(seeds)
def law_bigbird_heads_may_change_places(seed):
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, 1, 3, 16, 4))
    rand = bigbird_rand_blocks(rng.random((3, 6, 8)), num_rand=2)
    order = rng.permutation(3)
    got = bigbird_attention(*(x[:, order] for x in (q, k, v)), block_size=2, rand_blocks=rand[order])
    want = bigbird_attention(q, k, v, block_size=2, rand_blocks=rand)[:, order]
    np.testing.assert_array_equal(got, want)


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2))
def law_bigbird_cost_is_what_is_counted(nb, b, g, r):
    rng, r = np.random.default_rng(0), min(r, max(nb - 5, 0))
    L = g + nb * b
    x, *w = count(tally := Tally(), rng.standard_normal((1, L, 6)), *(np.ones((6, 6)) for _ in range(3)))
    params = QKVParams(w[0], None, w[1], None, w[2], None)
    rand = bigbird_rand_blocks(rng.random((2, max(nb - 2, 0), nb)), num_rand=r) if nb > 2 else None
    bigbird_self_attention(x, params, num_heads=2, block_size=b, num_global_tokens=g, rand_blocks=rand)
    cost = bigbird_cost(nb * b, 6, num_heads=2, block_size=b, num_rand=r, num_global_tokens=g)
    assert tally.macs == cost["macs"]
    if nb > 4 and not g:  # rows 1 and nb - 2 compute one block that they mask
        assert cost["score_elements"] == 2 * (cost["blocks"] + 2) * b * b


def law_bigbird_paper_size_sees_an_eighth():
    """4,096 tokens in blocks of 64: 512 keys a middle row, and 622 of 4,096 blocks in all."""
    cost = bigbird_cost(4096, 768, num_heads=12, block_size=64, num_rand=3)
    assert (5 + 3) * 64 == 512
    assert cost["blocks"] == 2 * 64 + 62 * 8 - 2 == 622
    assert round(cost["blocks"] / 64**2, 3) == 0.152


def by_search(mask):
    """Longest shortest path by breadth-first search, inf if there is none."""
    joined = mask | mask.T
    worst = 0
    for start in range(len(mask)):
        far, todo = {start: 0}, deque([start])
        while todo:
            i = todo.popleft()
            for j in np.flatnonzero(joined[i]):
                if int(j) not in far:
                    far[int(j)] = far[i] + 1
                    todo.append(int(j))
        worst = max(worst, *far.values()) if len(far) == len(mask) else math.inf
    return worst


@given(seeds, st.integers(1, 12), st.sampled_from((0.05, 0.2, 0.5)))
def law_bigbird_graph_stats_are_their_definitions(seed, nb, density):
    mask = np.random.default_rng(seed).random((nb, nb)) < density
    got = graph_stats(mask)
    assert got["density"] == mask.mean()
    assert got["diameter"] == by_search(mask)
    joined = mask | mask.T | np.eye(nb, dtype=bool)
    assert got["max_degree"] == joined.sum(axis=1).max()
    # a random walk on the joined blocks has the same eigenvalues
    walk = np.sort(np.linalg.eigvals(joined / joined.sum(axis=1, keepdims=True)).real)
    if nb > 1:
        np.testing.assert_allclose(got["spectral_gap"], 1 - walk[-2], rtol=0, atol=1e-7)  # near-double roots


def law_bigbird_random_edges_make_an_expander():
    """Window and three random blocks, without the ends: a gap that stays and few hops."""
    rng = np.random.default_rng(0)
    for nb in (64, 128):
        i = np.arange(nb)
        window = np.abs(i[:, None] - i) <= 1
        drawn = window.copy()
        rand = bigbird_rand_blocks(rng.random((1, nb - 2, nb)), num_rand=3)[0]
        np.put_along_axis(drawn[1:-1], rand, True, axis=-1)
        stats, alone = graph_stats(drawn), graph_stats(window)
        assert stats["spectral_gap"] > 0.2
        assert stats["diameter"] <= 3 + math.log2(nb) / 2
        assert alone["diameter"] == nb - 1
        # a walk on a path that stays put a third of the time: 1 - (1 + 2 cos(pi / nb)) / 3, but for the ends
        np.testing.assert_allclose(alone["spectral_gap"], (1 - math.cos(math.pi / nb)) * 2 / 3, rtol=0.05)


@given(seeds, st.integers(1, 9), st.integers(1, 4))
def law_bigbird_padding_to_blocks_changes_nothing(seed, L, b):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, L, 4))
    params = QKVParams(*(rng.standard_normal(s) / 2 for s in ((4, 4), 4) * 3))
    padded, real = pad_to_blocks(x, block_size=b, axis=-2)
    assert padded.shape[1] % b == 0
    assert real.sum() == 2 * L
    got = bigbird_self_attention(padded, params, num_heads=2, block_size=padded.shape[1], token_mask=real)
    q, k, v = (split_heads(x @ params[i] + params[i + 1], 2) for i in (0, 2, 4))
    want = np.swapaxes(attention_dense(q, k, v), 1, 2).reshape(x.shape)
    np.testing.assert_allclose(got[:, :L], want, rtol=0, atol=8 * rounding(q, k, v))
    assert not got[:, L:].any()
    ids, real = pad_to_blocks(np.ones((2, L), int), block_size=b)
    assert ids.sum() == real.sum() == 2 * L


@given(seeds)
def law_bigbird_encoder_is_full_on_short_texts_and_ignores_padding(seed):
    rng = np.random.default_rng(seed)
    params = init_bert(rng, vocab=9, context=20, dim=6, depth=2, std=0.4)
    config = BigBirdConfig(2, block_size=2, num_rand=1)  # full up to 14 tokens
    ids, real = rng.integers(0, 9, (2, 20)), np.arange(20) < np.array([[20], [15]])
    rand = init_rand_blocks(rng, config, length=20, depth=2)
    y = bigbird_encoder(params, ids, config=config, rand_blocks=rand, token_mask=real)
    other = np.where(real, ids, (ids + 1) % 9)
    again = bigbird_encoder(params, other, config=config, rand_blocks=rand, token_mask=real)
    np.testing.assert_array_equal(again[real], y[real])
    x = bert_embed(ids, params)
    for p, table in zip(params.blocks, rand, strict=True):
        seen = np.kron(bigbird_block_mask(10, table), np.ones((2, 2), bool)) & real[:, None, None, :]
        x = transformer_block(x, p, num_heads=2, norm="post", eps=1e-12, activation="gelu_tanh", mask=seen)
    np.testing.assert_allclose(y[real], x[real], rtol=0, atol=1e4 * EPS)  # two blocks behind layer norms
    full = bigbird_encoder(params, ids[:, :14], config=config)
    wide = BigBirdConfig(2, block_size=14, num_rand=0)
    np.testing.assert_array_equal(full, bigbird_encoder(params, ids[:, :14], config=wide))
