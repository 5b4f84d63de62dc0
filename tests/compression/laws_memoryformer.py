"""Laws of MemoryFormer on ref alone: NumPy and Hypothesis."""

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.attention import attention_dense, join_heads, split_heads
from ref.blocks.mlp import linear
from ref.blocks.norms import layer_norm
from ref.blocks.optim import adam, adam_init, tree_leaves, tree_map
from ref.blocks.softmax import softmax
from ref.compression.memoryformer import (
    EXPANSIONS,
    block_macs,
    corners,
    dense_complexity,
    expected_linear_table,
    hash_chunks,
    hash_chunks_vjp,
    init_memory_layer,
    init_memoryformer,
    look_up,
    memory_complexity,
    memory_layer,
    memory_layer_vjp,
    memoryformer_block,
    memoryformer_block_vjp,
    memoryformer_lm,
    memoryformer_lm_vjp,
)
from ref.counting import Tally, count
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
scores = st.sampled_from(("l1_prob", "prob"))
taus = st.sampled_from((1, 2, 5))


@given(seeds, taus, scores, st.sampled_from((0.5, 1.0, 3.0)))
def law_memoryformer_hash_finds_the_most_likely_corner(seed, tau, score, temperature):
    """Brute force: softmax of <z, c> over all corners, most significant bit first."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 3 * tau))
    codes, got = hash_chunks(x, tau=tau, score=score, temperature=temperature)
    assert codes.dtype == np.int32
    signs = np.array(list(product((-1, 1), repeat=tau)))
    np.testing.assert_array_equal(corners(tau), signs)
    for n, k in np.ndindex(codes.shape):
        z = x[n, k * tau : (k + 1) * tau]
        e = np.exp(signs @ z / temperature)
        p = e / e.sum()
        assert codes[n, k] == p.argmax()
        want = p.max() * (np.abs(z).sum() if score == "l1_prob" else 1)
        np.testing.assert_allclose(got[n, k], want, rtol=1e-12)
        assert score == "l1_prob" or 2.0**-tau < got[n, k] <= 1


@given(seeds, taus)
def law_memoryformer_bits_follow_signs(seed, tau):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 2 * tau))
    codes, p = hash_chunks(x, tau=tau, score="prob")
    assert ((codes >= 0) & (codes < 2**tau)).all()
    i = rng.integers(0, 2 * tau)
    flipped = x.copy()
    flipped[:, i] *= -1
    change = hash_chunks(flipped, tau=tau)[0] ^ codes
    want = np.zeros_like(codes)
    want[:, i // tau] = 2 ** (tau - 1 - i % tau)
    np.testing.assert_array_equal(change, want)
    np.testing.assert_array_equal(hash_chunks(3.7 * x, tau=tau)[0], codes)
    louder = x.copy()
    louder[:, i] *= 1.5
    more = hash_chunks(louder, tau=tau, score="prob")[1]
    assert (more[:, i // tau] > p[:, i // tau]).all()
    zero = np.array([[0.0, -0.0]])  # counted as positive, either sign of zero
    np.testing.assert_array_equal(hash_chunks(zero, tau=2)[0], 3)
    np.testing.assert_array_equal(hash_chunks(zero, tau=2, score="prob")[1], 0.25)


def layer(seed, tau, K=3, h=4, lead=(2, 5)):
    rng = np.random.default_rng(seed)
    tables, bias = rng.standard_normal((K, 2**tau, h)), rng.standard_normal(h)
    return rng, rng.standard_normal((*lead, K * tau)), tables, bias


@given(seeds, taus, scores)
def law_memoryformer_layer_is_a_sparse_product(seed, tau, score):
    """The one-hot form, and linearity in the tables."""
    rng, x, tables, bias = layer(seed, tau)
    codes, w = hash_chunks(x, tau=tau, score=score)
    one_hot = w[..., None] * (codes[..., None] == np.arange(2**tau))
    want = one_hot.reshape(2, 5, -1) @ tables.reshape(-1, 4) + bias
    y = memory_layer(x, tables, bias, score=score)
    np.testing.assert_allclose(y, want, rtol=0, atol=64 * EPS * (1 + np.abs(want).max()))
    other = rng.standard_normal(tables.shape)
    both = memory_layer(x, tables + other, score=score)
    parts = memory_layer(x, tables, score=score) + memory_layer(x, other, score=score)
    np.testing.assert_allclose(both, parts, rtol=0, atol=64 * EPS * (1 + np.abs(tables).max()) * w.max())
    order = rng.permutation(5)
    np.testing.assert_array_equal(memory_layer(x[:, order], tables, bias, score=score), y[:, order])
    np.testing.assert_array_equal(
        memory_layer(x.reshape(10, -1), tables, bias, score=score), y.reshape(10, 4)
    )
    np.testing.assert_array_equal(memory_layer(x[0, 0], tables, bias, score=score), y[0, 0])
    assert memory_layer(x[:0], tables, bias).shape == (0, 5, 4)
    loud = memory_layer(1e4 * x, tables, score="prob")  # where 1 - p underflows: the plain sum of rows
    sure = (np.abs(x) > 1e-2).all(axis=-1)
    rows = tables[np.arange(3), codes].sum(axis=-2)
    np.testing.assert_allclose(loud[sure], rows[sure], rtol=0, atol=64 * EPS * (1 + np.abs(rows).max()))


@given(seeds)
def law_memoryformer_one_bit_is_a_gate(seed):
    _, x, tables, _ = layer(seed, 1)
    want = np.zeros((2, 5, 4))
    for k in range(3):
        a = np.abs(x[..., k, None])
        want += a / (1 + np.exp(-2 * a)) * np.where(x[..., k, None] >= 0, tables[k, 1], tables[k, 0])
    np.testing.assert_allclose(
        memory_layer(x, tables), want, rtol=0, atol=64 * EPS * (1 + np.abs(want).max())
    )


@given(seeds, taus, scores, st.sampled_from((1.0, 2.5)))
def law_memoryformer_layer_backward_is_the_slope(seed, tau, score, temperature):
    rng, x, tables, bias = layer(seed, tau)
    x = np.where(np.abs(x) < 1e-3, 1e-3, x)  # away from the edges between addresses
    g, options = rng.standard_normal((2, 5, 4)), {"score": score, "temperature": temperature}
    dx, dtables, dbias = memory_layer_vjp(x, tables, g, **options)
    directions = [rng.standard_normal(a.shape) for a in (x, tables, bias)]

    def value(h):
        moved = (a + h * d for a, d in zip((x, tables, bias), directions, strict=True))
        return np.sum(g * memory_layer(*moved, **options))

    slope, change = slope_of(value)
    got = sum(np.sum(a * d) for a, d in zip((dx, dtables, dbias), directions, strict=True))
    # truncation, seen by doubling the step, and cancellation: 40 terms, each good to 64 eps, over h
    error = 2 * change + 64 * EPS / 1e-5 * np.abs(g).sum() * (1 + np.abs(tables).max())
    np.testing.assert_allclose(got, slope, rtol=0, atol=error)
    codes, w = hash_chunks(x, tau=tau, **options)
    read = np.zeros((3, 2**tau), bool)
    read[np.arange(3), codes.reshape(-1, 3)] = True
    assert not dtables[~read].any()
    want = w.reshape(10, 3).T @ g.reshape(10, 4)
    np.testing.assert_allclose(dtables.sum(axis=1), want, rtol=0, atol=256 * EPS * (1 + np.abs(want).max()))
    np.testing.assert_array_equal(hash_chunks_vjp(0 * x, w, tau=tau, **options), 0)


@given(seeds, st.sampled_from((1, 2, 4)), st.sampled_from((0.3, 1.0, 2.0)))
def law_memoryformer_tables_of_a_linear_map_are_exact_on_corners(seed, tau, c):
    rng = np.random.default_rng(seed)
    weight, s = rng.standard_normal((5, 8)), rng.choice((-1.0, 1.0), (6, 8))
    tables = expected_linear_table(weight, tau=tau)
    want = (1 / (1 + np.exp(-2 * c))) ** tau * s @ weight.T
    got = memory_layer(c * s, tables, score="prob")
    np.testing.assert_allclose(got, want, rtol=0, atol=256 * EPS * np.abs(weight).sum())
    double = expected_linear_table(weight, tau=tau, scale=2.0)
    np.testing.assert_array_equal(double, 2 * tables)


def small(rng, expansion="wider_hash", depth=2):
    net = init_memoryformer(rng, vocab=11, dim=8, depth=depth, tau=2, expansion=expansion)
    return tree_map(lambda a: a + 0.3 * rng.standard_normal(a.shape), net)


@given(seeds, st.sampled_from(EXPANSIONS), st.booleans(), st.sampled_from((0.0, 0.25, 0.5, 1.0)))
def law_memoryformer_block_is_its_definition(seed, expansion, causal, fraction):
    """Three projections with an address each, rotary embedding by rotations, no output projection."""
    rng = np.random.default_rng(seed)
    p, x = small(rng, expansion, 1).blocks[0], rng.standard_normal((2, 5, 8))
    u = layer_norm(x, p.ln1_scale, p.ln1_bias)
    q, k, v = (split_heads(memory_layer(u, *m), 1) for m in (p.q, p.k, p.v))
    R = int(8 * fraction)
    for t in range(5):
        for i in range(R // 2):
            angle = t * 10000.0 ** (-2 * i / R)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            for a in (q, k):
                a[..., t, [i, i + R // 2]] = a[..., t, [i, i + R // 2]] @ turn.T
    mid = x + join_heads(attention_dense(q, k, v, causal=causal))
    h = memory_layer(layer_norm(mid, p.ln2_scale, p.ln2_bias), *p.up)
    want = mid + memory_layer(layer_norm(h, p.ln_up_scale, p.ln_up_bias), *p.down)
    got = memoryformer_block(x, p, num_heads=1, causal=causal, rope_fraction=fraction)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)
    K = 4 if expansion == "wider_hash" else 8
    assert p.down.tables.shape == (K, 16 if expansion == "wider_hash" else 4, 8)


@given(seeds)
def law_memoryformer_model_never_sees_later_tokens(seed):
    rng = np.random.default_rng(seed)
    net, tokens = small(rng), rng.integers(0, 11, (2, 6))
    logits = memoryformer_lm(tokens, net, num_heads=2)
    assert logits.shape == (2, 6, 11)
    later = tokens.copy()
    later[:, 4:] = (later[:, 4:] + 1) % 11
    np.testing.assert_allclose(
        memoryformer_lm(later, net, num_heads=2)[:, :4], logits[:, :4], rtol=0, atol=1e-12
    )


@given(seeds, st.sampled_from(EXPANSIONS), st.booleans())
def law_memoryformer_model_backward_is_the_slope(seed, expansion, causal):
    """Along the gradient itself: every parameter takes part. Then the block, with its options."""
    rng = np.random.default_rng(seed)
    net, tokens = small(rng, expansion), rng.integers(0, 11, (2, 4))
    g = rng.standard_normal((2, 4, 11))
    grads = memoryformer_lm_vjp(tokens, net, g, num_heads=2)
    check_slope(lambda p: np.sum(g * memoryformer_lm(tokens, p, num_heads=2)), net, grads)
    options = {"num_heads": 2, "causal": causal, "rope_fraction": 0.5}
    x, g = rng.standard_normal((2, 4, 8)), rng.standard_normal((2, 4, 8))
    both = memoryformer_block_vjp(x, net.blocks[0], g, **options)
    check_slope(lambda xp: np.sum(g * memoryformer_block(*xp, **options)), (x, net.blocks[0]), both)


def check_slope(value, at, grads):
    """The gradient's length against the central difference along it, steps small enough to stay put."""
    leaves = tree_leaves(grads)
    assert [a.shape for a in leaves] == [a.shape for a in tree_leaves(at)]
    length = sum(np.sum(a**2) for a in leaves)
    move = lambda h: value(tree_map(lambda a, d: a + h / np.sqrt(length) * d, at, grads))
    slope, change = slope_of(move, 1e-7)
    # truncation, seen by doubling the step, and cancellation: sums near 100, good to some 100 eps, over h;
    # an address that flips within the step would show as a jump of 1e5 and more
    error = 2 * change + 1e4 * EPS / 1e-7
    np.testing.assert_allclose(np.sqrt(length), slope, rtol=0, atol=error)


def law_memoryformer_layer_learns_a_linear_map():
    """From empty tables Adam gets as near as the tables made from the map; more bits a row fit less well."""
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((3, 8)) / np.sqrt(8), rng.standard_normal((500, 8))
    target, left = x @ weight.T, []
    for tau in (1, 2, 4):
        _, w = hash_chunks(x, tau=tau)
        error = lambda tables: np.mean((memory_layer(x, tables) - target) ** 2) / np.mean(target**2)
        made = error(expected_linear_table(weight, tau=tau, scale=np.abs(x).mean() / w.mean()))
        tables = np.zeros((8 // tau, 2**tau, 3))
        state = adam_init(tables)
        for _ in range(120):
            _, grad, _ = memory_layer_vjp(x, tables, (memory_layer(x, tables) - target) / len(x))
            tables, state = adam(tables, grad, state, lr=0.05)
        left.append(error(tables))
        assert left[-1] < 1.05 * made < 0.5
    assert left[0] < left[1] < left[2]


def law_memoryformer_counts():
    """Multiply-adds of ref, the paper's share of the dense block, and what a row costs in bytes."""
    rng, tally = np.random.default_rng(0), Tally()
    x = count(tally, rng.standard_normal((7, 12)))
    tables = init_memory_layer(rng, 12, 5, tau=3)
    memory_layer(x, *tables)
    cost = memory_complexity(12, 5, tau=3, tokens=7)
    assert tally.macs == cost.muls - 2 * 7 * 12 == 7 * 4 * 5  # the hash's own operations multiply no matrices
    assert cost.adds == cost.muls
    assert cost.table_bytes == 2 * tables.tables.size
    np.testing.assert_allclose(
        block_macs(2048, seq=2048, tau=8) / block_macs(2048, seq=2048), 0.19, rtol=0.01
    )
    np.testing.assert_allclose((block_macs(2048, seq=0, tau=8)) / 2048**2, 0.65625)
    dense = dense_complexity(2048, 2048)
    memory = memory_complexity(2048, 2048, tau=8)
    assert memory.table_bytes == 32 * dense.table_bytes  # 2^tau / tau: the price
    assert dense.bytes_read == 8 * memory.bytes_read  # one token reads a tau-th
    at = lambda n: memory_complexity(2048, 2048, tau=8, tokens=n).bytes_read
    assert at(8) == dense.bytes_read  # tokens share a weight matrix but not rows: even at tau tokens
    assert at(10**6) == memory.table_bytes


def law_memoryformer_shared_address_needs_one_hash():
    rng, x, tables, bias = layer(3, 2)
    codes, w = hash_chunks(x, tau=2)
    for t in (tables, rng.standard_normal(tables.shape)):
        np.testing.assert_array_equal(look_up(codes, w, t, bias), memory_layer(x, t, bias))
    assert np.isfinite(memory_layer(1e300 * x, tables, score="prob")).all()


def law_memoryformer_softmax_head_reads_the_stream():
    """Logits are the final norm times the head, and the head is not the embedding."""
    rng = np.random.default_rng(5)
    net, tokens = small(rng, depth=0), np.arange(6)[None]
    want = linear(layer_norm(net.embed[tokens], net.norm_scale, net.norm_bias), net.w_head)
    logits = memoryformer_lm(tokens, net, num_heads=2)
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-13)
    np.testing.assert_allclose(softmax(logits).sum(axis=-1), 1, rtol=0, atol=16 * EPS)
