"""Laws of Mesa on ref alone: NumPy and Hypothesis."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.attention import split_heads
from ref.blocks.mlp import gelu, gelu_grad, linear
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.softmax import softmax, softmax_vjp
from ref.blocks.transformer import init_block, transformer_block, transformer_block_vjp
from ref.training.mesa import (
    MesaConfig,
    MesaPolicy,
    Saved,
    activation_bytes,
    dequantize_groups,
    draw_noise,
    init_range,
    init_states,
    largest_batch,
    largest_width,
    mesa_block,
    mesa_block_backward,
    mesa_gelu,
    mesa_gelu_backward,
    mesa_layer_norm,
    mesa_layer_norm_backward,
    mesa_linear,
    mesa_linear_backward,
    mesa_matmul,
    mesa_matmul_backward,
    mesa_softmax,
    mesa_softmax_backward,
    overflow_fraction,
    pack_groups,
    quantize_groups,
    unpack_groups,
    update_range,
)

EPS, EPS32 = np.finfo(np.float64).eps, float(np.finfo(np.float32).eps)
seeds = st.integers(0, 2**32 - 1)
groupings = st.sampled_from(
    (((2, 3, 12), 4, -1), ((5, 6), 1, -1), ((1, 4), 4, -1), ((2, 4, 3, 5), 4, -3), ((4, 1, 2), 2, -3))
)


@st.composite
def grouped(draw):
    """(x, groups, group_axis): entries of each group's own size and offset."""
    shape, groups, axis = draw(groupings)
    rng = np.random.default_rng(draw(seeds))
    x = rng.standard_normal(shape)
    size, offset = 10.0 ** rng.uniform(-3, 3, groups), rng.normal(0, 2, groups)
    rows = pack_groups(x, groups=groups, group_axis=axis)
    return unpack_groups(size[:, None] * (rows + offset[:, None]), shape, group_axis=axis), groups, axis


def ranges(x, groups, axis):
    rows = pack_groups(x, groups=groups, group_axis=axis)
    return rows.max(axis=1) - rows.min(axis=1), rows.min(axis=1)


def group_of(index, shape, groups, axis):
    """The group of an entry, by counting: which part of its channels, or of its heads, it lies in."""
    return index[axis] // (shape[axis] // groups)


@given(grouped())
def law_mesa_pack_collects_each_group_in_a_row(case):
    x, groups, axis = case
    rows = pack_groups(x, groups=groups, group_axis=axis)
    assert rows.shape == (groups, x.size // groups)
    members = [[] for _ in range(groups)]
    for index in np.ndindex(x.shape):
        members[group_of(index, x.shape, groups, axis)].append(x[index])
    np.testing.assert_array_equal(np.sort(rows), np.sort(np.array(members)))
    np.testing.assert_array_equal(unpack_groups(rows, x.shape, group_axis=axis), x)


def written_quantize(x, alpha, beta, u, levels):
    """Equation 2 for one number, in float32 by the kernel's order of operations; ours clips at the top."""
    f = np.float32
    if alpha == 0:
        return 0
    v = f(f(f(x) - f(beta)) * f(f(levels - 1) / f(alpha))) + f(u) - f(0.5)
    return min(round(float(max(v, f(0)))), levels - 1)  # Python rounds half to even, as rint does


@given(grouped(), st.sampled_from((2, 16, 256, 4096, 65536)), st.booleans(), seeds, st.booleans())
def law_mesa_quantize_is_equation_2(case, levels, stochastic, seed, narrow):
    x, groups, axis = case
    alpha, beta = ranges(x, groups, axis)
    alpha = np.where(np.arange(groups) == 0, 0, alpha) if narrow else alpha  # a constant group
    u = np.random.default_rng(seed).random(x.shape) if stochastic else None
    q = quantize_groups(x, alpha, beta, group_axis=axis, levels=levels, uniform=u)
    assert q.dtype == (np.uint8 if levels <= 256 else np.uint16)
    back = dequantize_groups(q, alpha, beta, group_axis=axis, levels=levels)
    for index in np.ndindex(x.shape):
        g = group_of(index, x.shape, groups, axis)
        noise = 0.5 if u is None else u[index]
        assert q[index] == written_quantize(x[index], alpha[g], beta[g], noise, levels)
        want = q[index] * alpha[g] / (levels - 1) + beta[g]
        assert abs(back[index] - want) <= 4 * EPS * (abs(alpha[g]) + abs(beta[g]))


@given(grouped(), st.sampled_from((4, 256, 4096)), st.booleans(), seeds)
def law_mesa_error_is_at_most_a_step(case, levels, stochastic, seed):
    x, groups, axis = case
    alpha, beta = ranges(x, groups, axis)
    u = np.random.default_rng(seed).random(x.shape) if stochastic else None
    q = quantize_groups(x, alpha, beta, group_axis=axis, levels=levels, uniform=u)
    error = pack_groups(np.abs(dequantize_groups(q, alpha, beta, group_axis=axis, levels=levels) - x),
                        groups=groups, group_axis=axis)  # fmt: skip
    step = alpha / (levels - 1) * (1 if stochastic else 0.5)
    # float32: x, beta and their difference off by half an ulp each; scale, product and noise by one of q
    slack = 4 * EPS32 * (np.abs(alpha) + np.abs(beta)) + 4 * EPS32 * alpha
    assert (error <= (step + slack)[:, None]).all()


@given(grouped(), st.sampled_from((16, 256)))
def law_mesa_stochastic_rounding_is_unbiased(case, levels):
    """The mean over n equally spaced u is exact to 1/n of a level: no luck involved."""
    x, groups, axis = case
    alpha, beta = ranges(x, groups, axis)
    n = 64
    mean = 0
    for i in range(n):
        u = np.full(x.shape, (i + 0.5) / n)
        q = quantize_groups(x, alpha, beta, group_axis=axis, levels=levels, uniform=u)
        mean = mean + dequantize_groups(q, alpha, beta, group_axis=axis, levels=levels) / n
    error = pack_groups(np.abs(mean - x), groups=groups, group_axis=axis)
    step = alpha / (levels - 1)
    # a float32 error in v may move one more of the n draws across a half; its size as in the law above
    slack = 4 * EPS32 * (np.abs(alpha) + np.abs(beta)) + 4 * EPS32 * alpha
    assert (error <= (2 * step / n + slack)[:, None]).all()


@given(grouped(), st.floats(0, 0.99))
def law_mesa_first_step_takes_the_range_and_a_constant_input_keeps_it(case, momentum):
    x, groups, axis = case
    rows, state = pack_groups(x, groups=groups, group_axis=axis), init_range((groups,))
    alpha, beta = ranges(x, groups, axis)
    for step in range(1, 4):
        state = update_range(state, rows, momentum=momentum, axis=0)
        assert state.step == step
        # two products and a sum: an ulp or two of the larger end
        np.testing.assert_allclose(state.lo, beta, rtol=0, atol=step * 4 * EPS * np.abs(rows).max())
        np.testing.assert_allclose(
            state.hi - state.lo, alpha, rtol=0, atol=step * 8 * EPS * np.abs(rows).max()
        )
        if step == 1:
            inside = 1e-12 * alpha.max()  # hi - lo is rounded
            assert overflow_fraction(x, state.hi - state.lo + inside, state.lo, group_axis=axis) == 0


def drawn(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((2, 5, 12)), rng


@given(seeds)
def law_mesa_running_range_lags_and_clips(seed):
    """A batch ten times as wide makes the range 1.9 times as wide; the rest is clipped, not wrapped."""
    x, _ = drawn(seed)
    state = init_range((1,))
    _, _, state = mesa_gelu(x, state, groups=1)
    old = state.hi - state.lo
    _, saved, moved = mesa_gelu(10 * x, state, groups=1)
    np.testing.assert_allclose(moved.hi - moved.lo, 1.9 * old, rtol=16 * EPS)
    assert overflow_fraction(10 * x, saved.alpha, saved.beta) > 0
    assert saved.q.reshape(-1)[np.argmax(x)] == 255
    assert saved.q.reshape(-1)[np.argmin(x)] == 0
    # "after" stores with what the earlier batches left, and leaves the same state behind
    _, late, same = mesa_gelu(10 * x, state, groups=1, update="after")
    np.testing.assert_array_equal(late.alpha, old)
    np.testing.assert_array_equal(same.hi, moved.hi)
    _, first, _ = mesa_gelu(x, init_range((1,)), groups=1, update="after")
    np.testing.assert_array_equal(first.alpha, old)


@given(seeds, st.sampled_from(("before", "after")))
def law_mesa_forward_is_the_plain_layer_bit_for_bit(seed, update):
    x, rng = drawn(seed)
    w, b, scale, bias = rng.standard_normal((12, 7)), rng.standard_normal(7), *rng.standard_normal((2, 12))
    state, how = init_range((3,)), {"groups": 3, "levels": 4, "update": update}
    heads = split_heads(x, 3)
    keys = np.swapaxes(heads, -1, -2)
    pairs = (
        (mesa_linear(x, w, b, state, **how), linear(x, w, b)),
        (mesa_linear(x, w, None, state, **how), linear(x, w, None)),
        (mesa_matmul(heads, keys, state, state, **how), heads @ keys),
        (mesa_softmax(heads, state, group_axis=-3, **how), softmax(heads)),
        (mesa_gelu(x, state, **how), gelu(x)),
        (mesa_layer_norm(x, scale, bias, state, **how), layer_norm(x, scale, bias)),
    )
    for got, want in pairs:
        np.testing.assert_array_equal(got[0], want)
    p = init_block(rng, 12, 24, std=0.3)
    policy = MesaPolicy(levels=4, update=update)
    y, _, states = mesa_block(x, p, init_states(3), num_heads=3, policy=policy)
    exact = MesaPolicy(layers=())
    np.testing.assert_array_equal(y, mesa_block(x, p, init_states(3), num_heads=3, policy=exact)[0])
    # the shared block divides by softmax's sum after the product: other roundings in sums of 24 terms
    np.testing.assert_allclose(
        y, transformer_block(x, p, num_heads=3), rtol=0, atol=64 * EPS * np.abs(y).max()
    )
    np.testing.assert_array_equal(mesa_block(x, p, states, num_heads=3, policy=policy)[0], y)


def gradients(levels, seed):
    """Gradients of the five layers from 4 equal tensors in `levels` levels, and the exact ones."""
    x, rng = drawn(seed)
    w, weight, bias = rng.standard_normal((12, 7)), *rng.standard_normal((2, 12))
    heads = split_heads(x, 3)
    keys = np.swapaxes(heads, -1, -2)
    dy, dn, ds = (
        rng.standard_normal((2, 5, 7)),
        rng.standard_normal(x.shape),
        rng.standard_normal((2, 3, 5, 5)),
    )
    scores, state = heads @ keys, init_range((3,))
    how, back = {"groups": 3, "levels": levels}, {"levels": levels}
    got = (
        *mesa_linear_backward(dy, mesa_linear(x, w, None, state, **how)[1], **back),
        *mesa_matmul_backward(ds, mesa_matmul(heads, keys, state, state, **how)[1], **back),
        mesa_softmax_backward(
            ds, mesa_softmax(scores, state, group_axis=-3, **how)[1], group_axis=-3, **back
        ),
        mesa_gelu_backward(dn, mesa_gelu(x, state, **how)[1], **back),
        *mesa_layer_norm_backward(dn, mesa_layer_norm(x, weight, bias, state, **how)[1], **back),
    )
    swap = lambda a: np.swapaxes(a, -1, -2)
    want = (
        dy @ w.T, np.einsum("blc,blf->cf", x, dy), dy.sum(axis=(0, 1)),
        ds @ heads, swap(heads) @ ds, softmax_vjp(softmax(scores), ds), dn * gelu_grad(x),
        *layer_norm_vjp(x, weight, dn),
    )  # fmt: skip
    return got, want


@given(seeds)
def law_mesa_gradients_converge_with_the_levels(seed):
    """Error falls as 1 / levels: 4, 8, 12 and 16 bits, with float32's rounding as the floor."""
    first = None
    for bits in (4, 8, 12, 16):
        got, want = gradients(2**bits, seed)
        errors = np.array([np.abs(g - w).max() / np.abs(w).max() for g, w in zip(got, want, strict=True)])
        if first is None:
            first = errors
        # 3: the largest of a few errors is no constant times the step. 2e-5: statistics and integers are
        # float32; a norm's 1 / deviation carries their ulp to sums of 12 entries of order 10.
        assert (errors <= 3 * first.max() * 2.0 ** (4 - bits) + 2e-5).all(), bits


@given(seeds)
def law_mesa_weight_gradients_are_unbiased(seed):
    """Linear in what is stored: the mean gradient over equally spaced u is the exact one, to a level / n."""
    x, rng = drawn(seed)
    w, dy, n, levels = rng.standard_normal((12, 7)), rng.standard_normal((2, 5, 7)), 32, 16
    heads = split_heads(x, 3)
    keys, ds = np.swapaxes(heads, -1, -2), rng.standard_normal((2, 3, 5, 5))
    state, how = init_range((3,)), {"groups": 3, "levels": levels}
    grad_w, grad_a, bent = 0, 0, 0
    for i in range(n):
        u = np.full(x.shape, (i + 0.5) / n)
        uk = np.full(keys.shape, (i + 0.5) / n)
        kept = mesa_linear(x, w, None, state, uniform=u, **how)[1]
        grad_w = grad_w + mesa_linear_backward(dy, kept, levels=levels)[1] / n
        kept = mesa_matmul(heads, keys, state, state, uniform=(u.reshape(heads.shape), uk), **how)[1]
        grad_a = grad_a + mesa_matmul_backward(ds, kept, levels=levels)[0] / n
        kept = mesa_gelu(x, state, uniform=u, **how)[1]
        bent = bent + mesa_gelu_backward(np.ones_like(x), kept, levels=levels) / n
    step = np.max(kept.alpha) / (levels - 1)
    level = 2 * step / n + 16 * EPS32 * np.abs(x).max()
    rows = np.abs(dy).reshape(-1, 7).sum(axis=0)
    assert (np.abs(grad_w - np.einsum("blc,blf->cf", x, dy)) <= level * rows).all()
    assert (np.abs(grad_a - ds @ heads) <= level * np.abs(ds).sum(axis=-1, keepdims=True)).all()
    # GELU bends: half its third derivative (at most 0.8) times a variance of at most step^2 / 4 is bias; the
    # mean itself is off by a level, with slope at most 0.8
    assert np.abs(bent - gelu_grad(x)).max() <= 0.8 / 2 * step**2 / 4 + 0.8 * level


@given(seeds)
def law_mesa_heads_of_their_own_range_beat_one_range(seed):
    x, _ = drawn(seed)
    x = x * np.repeat((1.0, 100.0, 1.0), 4)
    error = {}
    for groups in (1, 3):
        alpha, beta = ranges(x, groups, -1)
        q = quantize_groups(x, alpha, beta)
        error[groups] = (dequantize_groups(q, alpha, beta) - x) ** 2
    assert error[3].sum() <= 1.05 * error[1].sum()
    quiet = np.repeat((True, False, True), 4)
    assert error[3][..., quiet].sum() < 0.01 * error[1][..., quiet].sum()


@given(seeds)
def law_mesa_order_of_the_batch_leaves_ranges_alone(seed):
    x, rng = drawn(seed)
    p, order = init_block(rng, 12, 24, std=0.3), rng.permutation(2)
    a = mesa_block(x, p, init_states(3), num_heads=3)
    b = mesa_block(x[order], p, init_states(3), num_heads=3)
    for s, t in zip(a[2], b[2], strict=True):
        # a BLAS may sum rows of another batch in another order: 24 terms of order 1
        np.testing.assert_allclose(s.lo, t.lo, rtol=0, atol=64 * EPS * 8)
        np.testing.assert_allclose(s.hi, t.hi, rtol=0, atol=64 * EPS * 8)


@given(seeds, st.sampled_from((None, 1)))
def law_mesa_block_gradients_approach_the_exact_ones(seed, groups):
    """Exact where nothing is compressed; at 16 bits within float32; and each layer's subset lies between."""
    x, rng = drawn(seed)
    p, dy = init_block(rng, 12, 24, std=0.3), rng.standard_normal(x.shape)
    dx, dp = transformer_block_vjp(x, p, dy, num_heads=3)
    noise = draw_noise(rng, x.shape, p, num_heads=3)
    for layers, levels, atol in (
        ((), 256, 2e-5),  # statistics of the norms are float32, ulp 1e-7, in sums of 10 tokens
        (MesaPolicy().layers, 65536, 2e-3),  # steps of 1e-4 in eleven tensors
        (("linear",), 256, 0.5),
        (("matmul", "softmax"), 256, 0.5),
        (("gelu", "layer_norm"), 256, 0.5),
    ):
        policy = MesaPolicy(layers=layers, levels=levels, groups=groups)
        states = init_states(3, policy=policy)
        _, kept, moved = mesa_block(x, p, states, num_heads=3, policy=policy, uniform=noise)
        gx, gp = mesa_block_backward(dy, kept, num_heads=3, policy=policy)
        for got, want in zip((gx, *gp), (dx, *dp), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=atol * max(1, np.abs(want).max()))
        assert isinstance(kept.u, Saved) == ("gelu" in layers)
        assert isinstance(kept.p, Saved) == bool({"matmul", "softmax"} & set(layers))
        assert moved.u.step == ("gelu" in layers)


# --8<-- [start:flush]
def share_lost(length, uniform=None):
    """Share of the attention that rounding removes when `length` keys get almost equal weight."""
    y = softmax(np.random.default_rng(0).normal(0, 0.1, (1, length)))
    y[0, 0] = 1.0  # one row somewhere looks at one key only, and sets the range
    alpha, beta = np.array([1.0]), np.array([0.0])
    y_hat = dequantize_groups(quantize_groups(y, alpha, beta, uniform=uniform), alpha, beta)
    return 1 - y_hat[0, 1:].sum() / y[0, 1:].sum()


def law_mesa_exercise_long_rows_vanish():
    noise = np.random.default_rng(1).random((1, 1000))
    assert share_lost(100) < 0.5  # 1/100 is 2.6 steps
    assert share_lost(1000) == 1.0  # 1/1000 is a quarter of a step: everything is rounded to 0
    # 255/1000 of the entries become one step: a binomial count, 5 standard errors of 1 / sqrt(255)
    assert abs(share_lost(1000, noise)) < 5 / math.sqrt(255)


# --8<-- [end:flush]


# --8<-- [start:lag]
def steps_until_covered(growth, share=0.99, momentum=0.9):
    """Batches until a running range has grown to `share` of a batch range that jumped by `growth`."""
    state = update_range(init_range((1,)), np.array([[0.0, 1.0]]), momentum=momentum, axis=0)
    n = 0
    while state.hi[0] < share * growth:
        state, n = update_range(state, np.array([[0.0, growth]]), momentum=momentum, axis=0), n + 1
    return n


def law_mesa_exercise_the_range_lags():
    # hi = growth - (growth - 1) 0.9^n, so n = log(0.01 growth / (growth - 1)) / log 0.9
    for growth in (2.0, 10.0):
        assert steps_until_covered(growth) == math.ceil(
            math.log(0.01 * growth / (growth - 1)) / math.log(0.9)
        )
    assert steps_until_covered(10.0) == 43


# --8<-- [end:lag]


# --8<-- [start:budget]
def reinvested(config, batch):
    """(batch, width) that Mesa affords in the activation memory of exact training."""
    budget = sum(activation_bytes(config, batch=batch).values())
    return (
        largest_batch(config, budget_bytes=budget, policy="mesa"),
        largest_width(config, budget_bytes=budget, batch=batch, policy="mesa"),
    )


def law_mesa_exercise_what_the_saved_memory_buys():
    tiny = MesaConfig(dim=192, depth=12, num_heads=3, tokens=197)
    batch, width = reinvested(tiny, 128)
    assert batch == 510  # four times, but for the exact means and ranges
    assert width == 876  # 4.6 times: the attention maps do not grow with the width


# --8<-- [end:budget]


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.sampled_from((2, 4)))
def law_mesa_bytes_are_what_a_block_keeps(head, heads, tokens, batch, itemsize):
    """The closed form against the arrays that `mesa_block` returns, and what planners find against it."""
    config = MesaConfig(dim=head * heads, depth=2, num_heads=heads, tokens=min(tokens, 6), hidden=3 * heads)
    shape = (min(batch, 2), config.tokens, config.dim)
    rng = np.random.default_rng(0)
    p = init_block(rng, config.dim, config.hidden)
    _, kept, _ = mesa_block(rng.standard_normal(shape), p, init_states(heads), num_heads=heads)
    found = 0
    for name, value in kept._asdict().items():
        if name == "params":
            continue
        saved = value if isinstance(value, Saved) else value.x
        found += saved.q.nbytes + 4 * (saved.alpha.size + saved.beta.size)
        if not isinstance(value, Saved):
            found += value.mean.nbytes + value.rstd.nbytes
    total = lambda b, policy, c=config: sum(
        activation_bytes(c, batch=b, policy=policy, itemsize=itemsize).values()
    )
    assert total(shape[0], "mesa") == config.depth * found
    wide = sum(activation_bytes(config, batch=3, policy="mesa", levels=4096).values())
    assert total(3, "mesa") < wide < 2 * total(3, "mesa")
    for policy in ("exact", "mesa", "checkpoint"):
        budget = total(batch, policy)
        assert largest_batch(config, budget_bytes=budget, policy=policy, itemsize=itemsize) == batch
        options = {"batch": batch, "policy": policy, "itemsize": itemsize}
        width = largest_width(config, budget_bytes=budget, **options)
        assert width == config.dim
