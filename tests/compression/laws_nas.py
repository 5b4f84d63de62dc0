"""Laws of architecture search on ref alone: NumPy and Hypothesis."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.compression.nas import (
    LatencyModel,
    MlpParams,
    SearchSpace,
    canonical,
    extract_subnet,
    gene_cost,
    kendall_tau,
    random_gene,
    saliency_maps,
    spearman,
    super_layer_norm,
    super_linear,
    super_linear_vjp,
    super_transformer,
    zero_cost_score,
)
from ref.models.gpt import gpt_forward, init_gpt

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
SPACE = SearchSpace(((8, 12), (1, 2), (16, 24), (16, 24), (1, 2, 3), (1, 2, 3)), depth_index=1)


def shared(seed):
    return init_gpt(np.random.default_rng(seed), vocab=9, context=6, dim=12, depth=2, hidden=24, std=0.3)


def network(seed, sizes=(5, 7, 6, 4), bias=True):
    rng = np.random.default_rng(seed)
    w = tuple(rng.standard_normal((o, i)) for i, o in pairwise(sizes))
    return MlpParams(w, tuple(bias * rng.standard_normal(len(m)) for m in w))


def batch(seed, n=6, width=5, classes=4):
    rng = np.random.default_rng(seed + 1)
    return rng.standard_normal((n, width)), rng.integers(0, classes, n)


def outputs(params, x):
    a = x
    for n, (w, b) in enumerate(zip(params.w, params.b, strict=True)):
        a = a @ w.T + b
        if n < len(params.w) - 1:
            a = np.maximum(a, 0)
    return a


def loss(params, x, y):
    z = outputs(params, x)
    z = z - z.max(axis=1, keepdims=True)
    return (np.log(np.exp(z).sum(axis=1)) - z[range(len(x)), y]).mean()


def moved(params, v, h):
    return params._replace(w=tuple(w + h * d for w, d in zip(params.w, v, strict=True)))


@given(seeds, st.sampled_from(((8, 5, 3, 2), (8, 5, 8, 5), (3, 3, 1, 1))))
def law_nas_slices_are_the_small_layer_and_the_masked_one(seed, size):
    out, inside, i, o = size[0], size[1], size[3], size[2]
    rng = np.random.default_rng(seed)
    x, w, b = rng.standard_normal((4, i)), rng.standard_normal((out, inside)), rng.standard_normal(out)
    y = super_linear(x, w, b, out_features=o)
    wide = np.pad(x, ((0, 0), (0, inside - i))) @ w.T + b
    np.testing.assert_allclose(y, wide[:, :o], rtol=0, atol=32 * EPS * max(1, np.abs(y).max()))
    g, d = rng.standard_normal(y.shape), [rng.standard_normal(a.shape) for a in (x, w, b)]
    grads = super_linear_vjp(x, w, b, g)
    f = lambda h: (g * super_linear(x + h * d[0], w + h * d[1], b + h * d[2], out_features=o)).sum()
    # bilinear: the central difference at h = 1 has no truncation error
    want = sum((a * c).sum() for a, c in zip(grads, d, strict=True))
    np.testing.assert_allclose((f(1) - f(-1)) / 2, want, rtol=1e-11, atol=1e-11)
    assert not grads[1][o:].any()
    assert not grads[1][:, i:].any()
    assert not grads[2][o:].any()
    np.testing.assert_allclose(super_linear(x, w, None, out_features=o) + b[:o], y, rtol=0, atol=1e-14)
    *same, none = super_linear_vjp(x, w, None, g)
    assert none is None
    np.testing.assert_array_equal(same[1], grads[1])


@given(seeds, st.integers(1, 8))
def law_nas_norm_counts_active_channels_only(seed, active):
    rng = np.random.default_rng(seed)
    x, g, b = rng.standard_normal((3, 8)), rng.standard_normal(8), rng.standard_normal(8)
    y = super_layer_norm(x, g, b, active=active)
    part = x[:, :active]
    centred = part - part.mean(axis=1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * g[:active] + b[:active]
    np.testing.assert_allclose(y[:, :active], want, rtol=0, atol=64 * EPS * max(1, np.abs(want).max()))
    assert not y[:, active:].any()
    np.testing.assert_array_equal(super_layer_norm(part, g, b), y[:, :active])


@given(seeds)
def law_nas_subnet_is_the_extracted_network(seed):
    """The slice equals the extracted network run on its own; the largest gene is the plain network."""
    params, rng = shared(seed), np.random.default_rng(seed)
    tokens = rng.integers(0, 9, (2, 5))
    np.testing.assert_allclose(
        super_transformer(params, (12, 2, 24, 24, 3, 3), tokens, head_dim=4),
        gpt_forward(tokens, params, num_heads=3), rtol=0, atol=1e-12,
    )  # fmt: skip
    heads = int(rng.integers(1, 4))
    gene = (8, 2, 16, 24, heads, heads)
    small = extract_subnet(params, gene, head_dim=4)
    np.testing.assert_allclose(
        super_transformer(params, gene, tokens, head_dim=4), gpt_forward(tokens, small, num_heads=heads),
        rtol=0, atol=1e-12,
    )  # fmt: skip
    changed = (8, 1, 16, 24, heads, 3)
    np.testing.assert_array_equal(
        super_transformer(params, changed, tokens, head_dim=4),
        super_transformer(params, canonical(changed, SPACE), tokens, head_dim=4),
    )
    outside = params._replace(wte=params.wte + np.where(np.arange(12) < 8, 0, 7.0))
    np.testing.assert_array_equal(
        super_transformer(outside, gene, tokens, head_dim=4),
        super_transformer(params, gene, tokens, head_dim=4),
    )


@given(seeds)
def law_nas_cost_counts_the_arrays(seed):
    gene = random_gene(np.random.default_rng(seed), SPACE)
    small = extract_subnet(shared(0), gene, head_dim=4)
    count = small.wte.size + small.wpe.size + small.lnf_scale.size + small.lnf_bias.size
    count += sum(a.size for block in small.blocks for a in block)
    params, macs = gene_cost(gene, tokens=6, vocab=9, head_dim=4)
    assert params == count
    E, n = gene[:2]
    layers = [2 * E * gene[2 + i] + 4 * E * 4 * gene[4 + i] for i in range(n)]
    attention = [2 * 36 * 4 * gene[4 + i] for i in range(n)]
    assert macs == 6 * sum(layers) + sum(attention) + 6 * 9 * E


@given(seeds)
def law_nas_gradient_scores_are_slopes(seed):
    """snip and grad_norm against central differences, along each weight's own direction."""
    params, (x, y) = network(seed), batch(seed)
    rng = np.random.default_rng(seed + 2)
    maps = saliency_maps(params, x, y, kind="snip")
    for _ in range(3):
        n = int(rng.integers(3))
        at = tuple(rng.integers(s) for s in params.w[n].shape)
        one = [np.zeros_like(w) for w in params.w]
        one[n][at] = 1.0
        h = 1e-6
        slope = (loss(moved(params, one, h), x, y) - loss(moved(params, one, -h), x, y)) / (2 * h)
        # rounding eps loss / h, and a kink of a ReLU within h of a sample is next to impossible
        np.testing.assert_allclose(maps[n][at], abs(params.w[n][at] * slope), rtol=1e-5, atol=1e-7)
    total = zero_cost_score(params, x, y, kind="snip")
    np.testing.assert_allclose(total, sum(m.sum() for m in maps), rtol=1e-13)
    twice = MlpParams((*params.w[:-1], params.w[-1]), params.b)
    assert zero_cost_score(twice, x, y, kind="grad_norm") > 0


@given(seeds)
def law_nas_grasp_is_a_hessian_product(seed):
    """-sum W (H g) against the difference of gradients along g."""
    params, (x, y) = network(seed), batch(seed)
    grad = lambda p: _loss_gradients(p, x, y)
    g, h = grad(params), 1e-6
    g_up, g_down = grad(moved(params, g, h)), grad(moved(params, g, -h))
    hg = [(u - d) / (2 * h) for u, d in zip(g_up, g_down, strict=True)]
    want = -sum((w * z).sum() for w, z in zip(params.w, hg, strict=True))
    size = sum(np.abs(w * z).sum() for w, z in zip(params.w, hg, strict=True))
    np.testing.assert_allclose(
        zero_cost_score(params, x, y, kind="grasp"), want, rtol=0, atol=1e-6 * (1 + size)
    )


def _loss_gradients(params, x, y):
    """Back-propagation, written again."""
    a = [x]
    for n, (w, b) in enumerate(zip(params.w, params.b, strict=True)):
        z = a[-1] @ w.T + b
        a.append(z if n == len(params.w) - 1 else np.maximum(z, 0))
    e = np.exp(a[-1] - a[-1].max(axis=1, keepdims=True))
    d = (e / e.sum(axis=1, keepdims=True) - np.eye(e.shape[1])[y]) / len(x)
    out = []
    for n in (2, 1, 0):
        out.append(d.T @ a[n])
        d = (d @ params.w[n]) * (a[n] > 0)
    return out[::-1]


@given(seeds)
def law_nas_synflow_needs_no_data_and_is_conserved(seed):
    params, (x, y) = network(seed, bias=False), batch(seed)
    score = zero_cost_score(params, x, y, kind="synflow")
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (8, 8))
    flipped = params._replace(w=tuple(w * signs[: w.shape[0], : w.shape[1]] for w in params.w))
    assert zero_cost_score(flipped, 3 * x, y, kind="synflow") == score
    total = outputs(params._replace(w=tuple(map(np.abs, params.w))), np.ones((1, 5))).sum()
    for m in saliency_maps(params, x, y, kind="synflow"):
        np.testing.assert_allclose(m.sum(), total, rtol=1e-10)
    np.testing.assert_allclose(score, 3 * total, rtol=1e-10)


@given(seeds)
def law_nas_covariance_and_code_scores(seed):
    params, (x, y) = network(seed), batch(seed)
    h = 1e-5
    J = np.empty((6, 5))
    for n in range(6):
        for j in range(5):
            up, down = x[n].copy(), x[n].copy()
            up[j] += h
            down[j] -= h
            J[n, j] = (outputs(params, up[None]).sum() - outputs(params, down[None]).sum()) / (2 * h)
    got = zero_cost_score(params, x, y, kind="jacob_cov")
    if (np.ptp(J, axis=1) < 1e-8).any():
        assert got == -np.inf  # an input that moves no output
    else:
        v = np.linalg.eigvalsh(np.corrcoef(J)) + 1e-5
        # equal codes give equal rows: eigenvalues near 0 make 1 / (v + k) up to 1e5, off by 1e-5 of that
        np.testing.assert_allclose(got, -(np.log(v) + 1 / v).sum(), rtol=1e-3)
    codes, a = [], x
    for w, b in zip(params.w[:-1], params.b[:-1], strict=True):
        a = np.maximum(a @ w.T + b, 0)
        codes.append(a > 0)
    c = np.concatenate(codes, axis=1)
    K = np.array([[13 - (p != q).sum() for q in c] for p in c], float)
    want = np.linalg.slogdet(K)[1]
    np.testing.assert_allclose(zero_cost_score(params, x, y, kind="naswot"), want, rtol=1e-9, atol=1e-9)
    assert zero_cost_score(params, np.stack([x[0], x[0]]), y[:2], kind="naswot") == -np.inf


@given(seeds)
def law_nas_rank_correlations(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.permutation(9).astype(float), rng.permutation(9).astype(float)
    pairs = [(a[i] - a[j]) * (b[i] - b[j]) for i in range(9) for j in range(i)]
    np.testing.assert_allclose(kendall_tau(a, b), np.sign(pairs).mean(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(kendall_tau(np.exp(a), b), kendall_tau(a, b), rtol=1e-12)
    assert kendall_tau(a, a) == 1
    assert abs(spearman(a, -a) + 1) < 1e-12


@given(seeds)
def law_nas_latency_model_recovers_cost_models(seed):
    """Held-out genes of a cost with products of entries: R^2 above 0.95."""
    rng = np.random.default_rng(seed)
    space = SearchSpace(((32, 48, 64), (1, 2, 3, 4), (64, 128, 256), (1, 2, 4)))
    genes = np.array([random_gene(rng, space) for _ in range(160)], float)
    cost = genes[:, 1] * (genes[:, 0] * genes[:, 2] + 16 * genes[:, 0] * genes[:, 3]) + 1e4
    model = LatencyModel.fit(genes[:120], cost[:120])
    error = ((model.predict(genes[120:]) - cost[120:]) ** 2).sum()
    assert 1 - error / ((cost[120:] - cost[120:].mean()) ** 2).sum() > 0.95
    assert model.r2 > 0.95
