"""Laws of PiToMe and ToMe on ref alone: NumPy and Hypothesis, so that they also run in the reader's
browser.
"""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.attention import attention_dense
from ref.models.vit import init_vit, vit_forward
from ref.vision.pitome import (
    MergeConfig,
    bipartite_soft_matching,
    energy_score,
    energy_score_vjp,
    margin_schedule,
    merge_flops,
    merge_tokens,
    merge_tokens_vjp,
    merged_block,
    pitome_matching,
    pitome_text_matching,
    pitome_token_schedule,
    proportional_attention,
    random_plan,
    removed_tokens,
    spectral_distance,
    tome_schedule,
    unmerge_tokens,
    vit_forward_merged,
)

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


@st.composite
def metrics(draw, least=2, most=14):
    """metric [B, N, D] of any small shape: ordinary, clustered, or with a large common part."""
    B, N, D = draw(st.integers(1, 2)), draw(st.integers(least, most)), draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(seeds))
    x = rng.standard_normal((B, N, D))
    return x + draw(st.sampled_from((0.0, 3.0))) * x[:, rng.integers(0, min(3, N), N)]


@st.composite
def plans(draw, least=3):
    """(metric, plan, class_token) of one of the five ways to match."""
    metric = draw(metrics(least=least))
    class_token, margin = draw(st.booleans()), draw(st.floats(-0.2, 0.95))
    ratio = draw(st.sampled_from((0.5, 0.6, 0.75, 0.9, 1.0)))
    B, N = metric.shape[:2]
    way = draw(st.sampled_from(("pitome", "bsm", "text", "tome", "random")))
    options = {"ratio": ratio, "margin": margin, "class_token": class_token}
    if way == "text":
        return metric, pitome_text_matching(metric, **options), class_token
    if way == "tome":
        return metric, bipartite_soft_matching(metric, r=N // 3, class_token=class_token), class_token
    if way == "random":
        rng = np.random.default_rng(draw(seeds))
        return metric, random_plan(rng, N, N // 3, batch=B, class_token=class_token), class_token
    return metric, pitome_matching(metric, bsm=way == "bsm", **options), class_token


def cosine(a, b):
    return math.fsum(a * b) / math.sqrt(math.fsum(a * a)) / math.sqrt(math.fsum(b * b))


def written_energy(x, margin, alpha=1.0, paper_form=False):
    """Equation 4 written out with exact sums, one token at a time."""
    out = []
    for a in x:
        terms = []
        for b in x:
            c = cosine(a, b)
            if c >= margin:
                terms.append(c if paper_form else c - margin)
            else:
                terms.append(alpha * (math.exp(c - margin) - 1))
        out.append(math.fsum(terms) / len(x))
    return np.array(out)


@given(metrics(), st.floats(-0.5, 1.2), st.floats(0.1, 3), st.booleans())
def law_pitome_energy_is_equation_4(metric, margin, alpha, paper_form):
    got = energy_score(metric, margin=margin, alpha=alpha, paper_form=paper_form)
    # Exact self-similarity may fall on either side of a margin of 1, where the paper's form jumps.
    if paper_form and abs(margin - 1) < 1e-9:
        return
    want = [written_energy(x, margin, alpha, paper_form) for x in metric]
    # a cosine is within (D + 4) eps, f has slope at most max(1, alpha e^2), and T terms are averaged
    np.testing.assert_allclose(got, want, rtol=0, atol=64 * EPS * max(1, alpha * np.e**2))


@given(metrics(), st.floats(0, 0.95), st.floats(0.2, 2))
def law_pitome_energy_stays_in_its_range(metric, margin, alpha):
    energy = energy_score(metric, margin=margin, alpha=alpha)
    assert (energy <= 1 - margin + 32 * EPS).all()
    assert (energy >= -alpha * (1 - math.exp(-1 - margin)) - 32 * EPS).all()


@given(metrics(), st.floats(0, 0.9), seeds)
def law_pitome_energy_ignores_scale_and_rotation(metric, margin, seed):
    rng = np.random.default_rng(seed)
    want = energy_score(metric, margin=margin)
    scaled = metric * rng.uniform(0.1, 10, (*metric.shape[:2], 1))
    q, _ = np.linalg.qr(rng.standard_normal((metric.shape[-1],) * 2))
    huge = metric * 10.0 ** rng.choice((-200, 200), (*metric.shape[:2], 1))  # squares would overflow
    for other in (scaled, metric @ q, huge):  # D products of numbers up to 1, slope 1: far below 64 D eps
        np.testing.assert_allclose(
            energy_score(other, margin=margin), want, rtol=0, atol=64 * EPS * metric.shape[-1]
        )


@given(metrics(), st.floats(0, 0.9), st.data())
def law_pitome_a_copy_raises_the_energy(metric, margin, data):
    """The new term f(1) = 1 - margin is the largest there is, so the mean rises unless all tokens are
    parallel.
    """
    i = data.draw(st.integers(0, metric.shape[1] - 1))
    before = energy_score(metric, margin=margin)[:, i]
    after = energy_score(np.concatenate([metric, metric[:, i : i + 1]], axis=1), margin=margin)[:, i]
    assert (after >= before - 16 * EPS).all()
    spread = 1 - margin - before  # 0 when all are parallel; the mean moves by spread / (T + 1)
    assert (after[spread > 1e-9] > before[spread > 1e-9]).all()


def written_pitome(x, r, margin):
    """The released merging step on one image's patches, in plain loops: -> [(source, destination)]."""
    energy = written_energy(x, margin)
    order = sorted(range(len(x)), key=lambda i: (-energy[i], i))
    a, b = order[0 : 2 * r : 2], order[1 : 2 * r : 2]
    return [(i, max(b, key=lambda j: (cosine(x[i], x[j]), -b.index(j)))) for i in a], order[2 * r :], b


@given(metrics(), st.floats(0, 0.9), st.sampled_from((0.5, 0.7, 0.9)), st.booleans())
def law_pitome_matching_is_the_algorithm(metric, margin, ratio, class_token):
    first = int(class_token)
    N = metric.shape[1]
    r = math.floor((N - first) - (N - first) * ratio)
    plan = pitome_matching(metric, ratio=ratio, margin=margin, class_token=class_token)
    assert plan.n_out == N - r
    for x, group in zip(metric, plan.group, strict=True):
        moves, kept, b = written_pitome(x[first:], r, margin)
        want = {0: 0} if class_token else {}
        want |= {first + i: first + n for n, i in enumerate([*kept, *b])} if r else {i: i for i in range(N)}
        want |= {first + i: want[first + j] for i, j in moves}
        assert group.tolist() == [want[i] for i in range(N)]


@given(metrics(), st.integers(0, 9), st.booleans())
def law_pitome_tome_merges_the_most_similar_pairs(metric, r, class_token):
    """Written out: each even token's best odd partner; the r best such pairs merge."""
    plan = bipartite_soft_matching(metric, r=r, class_token=class_token)
    N = metric.shape[1]
    r = max(0, min(r, (N - class_token) // 2))
    assert plan.n_out == N - r
    for x, group in zip(metric, plan.group, strict=True):
        if r == 0:
            assert group.tolist() == list(range(N))
            continue
        best = {i: max((cosine(x[i], x[j]), -j) for j in range(1, N, 2)) for i in range(0, N, 2)}
        ranked = sorted((i for i in best if i or not class_token), key=lambda i: (-best[i][0], i))
        moved = set(ranked[:r])
        assert all(group[i] == group[-best[i][1]] for i in moved)
        kept = [i for i in range(0, N, 2) if i not in moved]
        assert sorted(group[i] for i in kept) == list(range(len(kept)))  # unmerged first, then all odd ones
        assert [group[j] for j in range(1, N, 2)] == list(range(len(kept), N - r))
        if class_token:
            assert [group[i] for i in kept] == list(range(len(kept)))


@given(plans(), seeds)
def law_pitome_merging_conserves_size_and_mean(case, seed):
    metric, plan, class_token = case
    rng = np.random.default_rng(seed)
    B, N = metric.shape[:2]
    x, size = rng.standard_normal((B, N, 3)), rng.integers(1, 5, (B, N)).astype(float)
    y, total = merge_tokens(x, *plan, size=size)
    assert y.shape == (B, plan.n_out, 3)
    np.testing.assert_array_equal(total.sum(-1), size.sum(-1))
    for row in plan.group:
        assert sorted(set(row.tolist())) == list(range(plan.n_out))
    if class_token:
        assert (plan.group[:, 0] == 0).all()
        assert (plan.group[:, 1:] > 0).all()
        np.testing.assert_array_equal(y[:, 0], x[:, 0] * size[:, :1] / size[:, :1])
    np.testing.assert_allclose(
        (y * total[..., None]).sum(1), (x * size[..., None]).sum(1), rtol=0, atol=1e-12
    )


@given(plans(), seeds)
def law_pitome_tokens_alone_in_their_slot_are_untouched(case, seed):
    """Bit for bit when their size is 1; x s / s rounds twice otherwise, within 2 ulp."""
    metric, plan, _ = case
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*metric.shape[:2], 3))
    y, total = merge_tokens(x, *plan)
    back, heavy = unmerge_tokens(y, plan.group), rng.integers(2, 9, x.shape[:2]).astype(float)
    alone = np.take_along_axis(total, plan.group, axis=-1) == 1
    np.testing.assert_array_equal(back[alone], x[alone])
    back = unmerge_tokens(merge_tokens(x, *plan, size=heavy)[0], plan.group)
    np.testing.assert_array_max_ulp(back[alone], x[alone], maxulp=2)


@given(plans(), seeds)
def law_pitome_merge_inverts_unmerge(case, seed):
    _, plan, _ = case
    y = np.random.default_rng(seed).standard_normal((len(plan.group), plan.n_out, 3))
    spread = unmerge_tokens(y, plan.group)
    for mode in ("mean", "wavg", "max", "prune"):  # a mean of n equal numbers is within n eps of them
        got, _ = merge_tokens(spread, *plan, mode=mode)
        np.testing.assert_allclose(got, y, rtol=16 * EPS, atol=0)


@given(plans(), seeds)
def law_pitome_modes_are_what_they_say(case, seed):
    _, plan, _ = case
    rng = np.random.default_rng(seed)
    x, size = rng.standard_normal((*plan.group.shape, 2)), rng.integers(1, 4, plan.group.shape).astype(float)
    got = {m: merge_tokens(x, *plan, size=size, mode=m) for m in ("mean", "sum", "max", "prune")}
    for b, row in enumerate(plan.group):
        for slot in range(plan.n_out):
            members = np.flatnonzero(row == slot)
            mine = x[b, members]
            heaviest = max(members, key=lambda i: (size[b, i], -i))
            np.testing.assert_allclose(got["mean"][0][b, slot], mine.mean(0), rtol=0, atol=1e-14)
            np.testing.assert_allclose(got["sum"][0][b, slot], mine.sum(0), rtol=0, atol=1e-13)
            np.testing.assert_array_equal(got["max"][0][b, slot], mine.max(0))
            np.testing.assert_array_equal(got["prune"][0][b, slot], x[b, heaviest])
            assert got["prune"][1][b, slot] == size[b, heaviest]
            assert got["sum"][1][b, slot] == size[b, members].sum()


@given(seeds, st.integers(2, 8), st.integers(1, 4))
def law_pitome_duplicates_count_by_their_log_size(seed, N, copies):
    """Attention over every copy equals attention over the survivors with log size added."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, 2, N, 4))
    size = rng.integers(1, copies + 1, N)
    full = [np.repeat(x, size, axis=1) for x in (k, v)]
    got = proportional_attention(q, k, v, size.astype(float))
    np.testing.assert_allclose(got, attention_dense(q, *full), rtol=0, atol=1e-10)
    np.testing.assert_allclose(
        proportional_attention(q, k, v, np.ones(N)), attention_dense(q, k, v), rtol=0, atol=1e-14
    )


@given(metrics(least=4), st.floats(0, 0.9), st.sampled_from((0.6, 0.8)), seeds)
def law_pitome_follows_permuted_tokens(metric, margin, ratio, seed):
    """Who merges with whom does not depend on the order of the tokens, as long as no energies are equal."""
    energy = np.sort(energy_score(metric, margin=margin), axis=-1)
    if np.diff(energy, axis=-1).min() < 1e-9:
        return
    order = np.random.default_rng(seed).permutation(metric.shape[1])
    together = lambda g: g[:, :, None] == g[:, None, :]
    a = pitome_matching(metric, ratio=ratio, margin=margin).group
    b = pitome_matching(metric[:, order], ratio=ratio, margin=margin).group
    np.testing.assert_array_equal(together(a)[:, order][:, :, order], together(b))


def scene(rng, *, clusters=3, background=12, noise=0.15, one_parity=False):
    """Unit centres with 4 to 8 noisy tokens each, and a background: -> (tokens [1, N, D], labels [N]).

    one_parity: the cluster tokens stand at even places only, where ToMe cannot pair them.
    """
    D = 16
    centres = np.linalg.qr(rng.standard_normal((D, clusters)))[0].T
    labels = np.repeat(np.arange(clusters), rng.integers(4, 9, clusters))
    x = centres[labels] + noise * rng.standard_normal((len(labels), D))
    if one_parity:
        background = len(labels)
    strangers = rng.standard_normal((background, D))
    N = len(labels) + background
    places = 2 * rng.permutation(len(labels)) if one_parity else rng.permutation(N)[: len(labels)]
    out, names = np.empty((N, D)), -np.ones(N, int)
    others = np.setdiff1d(np.arange(N), places)
    out[places], names[places], out[others] = x, labels, strangers
    return out[None], names


def pairing_holds(energy, labels, r):
    """Every cluster that has a token in a has one in b, and only clusters are merged."""
    order = np.argsort(-energy, kind="stable")[: 2 * r]
    a, b = labels[order[0::2]], labels[order[1::2]]
    return (labels[order] >= 0).all() and set(a) <= set(b)


def merged_across(group, labels):
    """How many slots hold tokens of different clusters."""
    return sum(len(set(labels[group == slot])) > 1 for slot in set(group.tolist()))


@given(seeds, st.integers(1, 4), st.integers(3, 6))
def law_pitome_merges_inside_clusters_when_they_pair(seed, clusters, r):
    """The pairing condition. 200 random scenes with noise small enough that a cluster is tighter than the
    gaps.
    """
    rng = np.random.default_rng(seed)
    x, labels = scene(rng, clusters=clusters, noise=0.05)
    r = min(r, (labels >= 0).sum() // 2)
    ratio = 1 - (r + 0.5) / len(labels)
    if pairing_holds(energy_score(x, margin=0.6)[0], labels, r):
        assert merged_across(pitome_matching(x, ratio=ratio, margin=0.6).group[0], labels) == 0


def law_pitome_tome_merges_across_when_clusters_share_a_parity():
    """Four equal tokens at even places: their only partners are strangers."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, labels = scene(rng, clusters=1, one_parity=True)
        plan = bipartite_soft_matching(x, r=2)
        assert merged_across(plan.group[0], labels) > 0
        same = pitome_matching(x, ratio=1 - 2.5 / len(labels), margin=0.6).group[0]
        assert merged_across(same, labels) == 0


# --8<-- [start:counterexample]
def interleaved_clusters():
    """Two clusters of four whose energies alternate: x = e0 ± t e1 and e2 ± t e3, t = .1, .2, .3, .4."""
    x, labels = np.zeros((1, 8, 4)), np.arange(8) % 2
    for i, t in enumerate((0.1, 0.2, 0.3, 0.4)):
        x[0, 2 * i, :2] = 1, t * (-1) ** i
        x[0, 2 * i + 1, 2:] = 1, t * (-1) ** i
    return x, labels


def greedy_pairs(metric, r):
    """A repair: among the 2r mergeable tokens take the most similar pair, remove both, and go on."""
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    s = unit @ unit.T
    np.fill_diagonal(s, -np.inf)
    pairs = []
    for _ in range(r):
        i, j = np.unravel_index(np.argmax(s), s.shape)
        pairs.append((i, j))
        s[[i, j]], s[:, [i, j]] = -np.inf, -np.inf
    return pairs
    # --8<-- [end:counterexample]


def law_pitome_counterexample_merges_across_and_greedy_pairs_repair_it():
    x, labels = interleaved_clusters()
    plan = pitome_matching(x, ratio=0.5, margin=0.6)
    assert plan.n_out == 4
    # the second cluster is b, one slot each, so all four tokens of the first have joined the other cluster
    assert sorted(plan.group[0][labels == 1].tolist()) == [0, 1, 2, 3]
    assert all(labels[i] == labels[j] for i, j in greedy_pairs(x[0], 4))


def graph(x):
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return np.maximum(unit @ unit.T, 0)


@given(seeds, st.integers(2, 5), st.integers(1, 4))
def law_pitome_merging_duplicates_leaves_the_spectral_distance_at_zero(seed, distinct, copies):
    rng = np.random.default_rng(seed)
    group = np.r_[np.arange(distinct), rng.integers(0, distinct, copies)]
    x = rng.standard_normal((distinct, 6))[group]
    # eigvalsh is within N eps of eigenvalues of order 1, N of them
    assert spectral_distance(graph(x), group) <= 32 * len(group) ** 2 * EPS


def spectral_trials(trials, seed, one_parity):
    """Spectral distances of (pitome, tome, random) on planted clusters: [trials, 3]."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(trials):
        x, labels = scene(rng, one_parity=one_parity)
        r = max(2, int((labels >= 0).sum()) // 2 - 1)
        ratio = 1 - (r + 0.5) / len(labels)
        three = (
            pitome_matching(x, ratio=ratio, margin=0.6),
            bipartite_soft_matching(x, r=r),
            random_plan(rng, len(labels), r, class_token=False),
        )
        out.append([spectral_distance(graph(x[0]), p.group[0]) for p in three])
    return np.array(out)


def law_pitome_keeps_the_eigenvalues_better_than_chance_and_parity():
    d = spectral_trials(30, 0, one_parity=True)
    assert (d[:, 0] <= d[:, 2]).all()
    assert (d[:, 0] <= d[:, 1]).mean() >= 0.95


def central(f, h=1e-5):
    return (f(h) - f(-h)) / (2 * h)


@given(metrics(least=3), st.floats(0, 0.9), st.floats(0.5, 2), seeds)
def law_pitome_energy_gradient_is_a_central_difference(metric, margin, alpha, seed):
    rng = np.random.default_rng(seed)
    metric = metric / np.linalg.norm(metric, axis=-1, keepdims=True)  # third derivatives of order 1
    unit = metric
    if np.abs(unit @ unit.swapaxes(-1, -2) - margin).min() < 1e-3:
        return  # a kink of f within reach of the difference
    d, cotangent = rng.standard_normal(metric.shape), rng.standard_normal(metric.shape[:2])
    grad = energy_score_vjp(metric, cotangent, margin=margin, alpha=alpha)
    f = lambda h: np.sum(cotangent * energy_score(metric + h * d, margin=margin, alpha=alpha))
    size = 1 + np.abs(cotangent).sum() * np.abs(d).max() ** 3
    np.testing.assert_allclose(np.sum(grad * d), central(f), rtol=0, atol=1e-7 * size)


@given(plans(), seeds)
def law_pitome_merge_gradient_is_a_central_difference(case, seed):
    _, plan, _ = case
    rng = np.random.default_rng(seed)
    x, size = rng.standard_normal((*plan.group.shape, 3)), rng.uniform(1, 3, plan.group.shape)
    dy, d_size = rng.standard_normal((len(x), plan.n_out, 3)), rng.standard_normal((len(x), plan.n_out))
    at = rng.standard_normal(x.shape), rng.standard_normal(size.shape)

    def f(h):
        y, total = merge_tokens(x + h * at[0], *plan, size=size + h * at[1])
        return np.sum(dy * y) + np.sum(d_size * total)

    dx, ds = merge_tokens_vjp(x, *plan, size, dy, d_size)
    want = np.sum(dx * at[0]) + np.sum(ds * at[1])
    np.testing.assert_allclose(want, central(f), rtol=0, atol=1e-7 * (1 + np.abs(dy).sum() * 30))


@given(st.integers(1, 24), st.integers(0, 30), st.floats(-1, 1))
def law_pitome_tome_schedule_is_a_line_through_r(depth, r, inflect):
    flat = tome_schedule(depth, r=r)
    assert flat == [r] * depth
    line = tome_schedule(depth, r=r, inflect=inflect)
    assert len(line) == depth
    assert min(line) >= 0
    if depth > 1:
        assert abs(sum(line) - r * depth) <= depth  # each entry is cut down by less than 1
    assert tome_schedule(5, r=[3, 2]) == [3, 2, 0, 0, 0]


@given(st.integers(2, 300), st.integers(1, 12), st.floats(0.5, 1.0), st.booleans())
def law_pitome_token_schedule_is_the_matching_repeated(n, depth, ratio, class_token):
    left, tokens = pitome_token_schedule(n, depth, ratio=ratio, class_token=class_token), n - class_token
    for now in left:
        assert now == tokens - math.floor(tokens - tokens * ratio)
        assert removed_tokens(tokens, ratio) == tokens - now
        tokens = now


def law_pitome_flops_of_the_published_networks():
    """Published counts, in units of 10^9 multiply-accumulates; patches 196 or 256, and the class token."""
    table = (
        (12, 197, 192, {1.0: "1.225", 0.9: "0.712", 0.95: "0.926"}),  # ViT-T/16
        (12, 197, 384, {1.0: "4.541", 0.9: "2.698"}),  # ViT-S/16
        (24, 197, 1024, {1.0: "61.40", 0.925: "29.84", 0.95: "37.15"}),  # ViT-L/16
        (32, 257, 1280, {1.0: "167.1", 0.95: "86.19", 0.925: "65.40"}),  # ViT-H/14
    )
    for depth, n, dim, rows in table:
        for ratio, want in rows.items():
            digits = len(want.split(".")[1])
            assert f"{merge_flops(depth, n, dim, ratio=ratio) / 1e9:.{digits}f}" == want
    assert pitome_token_schedule(197, 12, ratio=0.9)[-1] == 59
    assert merge_flops(12, 197, 192, ratio=1.0) == 12 * (12 * 197 * 192**2 + 2 * 197**2 * 192)


def law_pitome_margin_falls_in_a_line():
    m = margin_schedule(12, m0=0.9)
    assert m[0] == 0.9
    np.testing.assert_allclose(np.diff(m), -0.9 / 12, rtol=1e-13)
    assert m[-1] > 0


def small_vit(seed=0):
    rng = np.random.default_rng(seed)
    params = init_vit(rng, image_size=8, patch=2, dim=12, depth=2, num_classes=4, std=0.3)
    return params, rng.random((2, 8, 8, 3))


def law_pitome_without_merging_the_network_is_the_plain_one():
    params, images = small_vit()
    want = vit_forward(images, params, num_heads=3)
    cfg = MergeConfig(num_heads=3)
    for options in ({"ratio": 1.0}, {"method": "tome", "r": 0}, {"method": "none"}):
        np.testing.assert_allclose(
            vit_forward_merged(images, params, cfg, **options), want, rtol=0, atol=1e-13
        )
    pooled = vit_forward_merged(images, params, MergeConfig(num_heads=3, global_pool=True), method="none")
    np.testing.assert_allclose(
        pooled, vit_forward(images, params, num_heads=3, global_pool=True), rtol=0, atol=1e-13
    )


def law_pitome_every_method_leaves_the_tokens_it_promises():
    params, images = small_vit()
    x = np.random.default_rng(1).standard_normal((2, 17, 12))
    drawn = random_plan(np.random.default_rng(2), 17, 4, batch=2)
    calls = (
        ({"ratio": 0.75, "margin": 0.5}, 13),
        ({"ratio": 0.75, "margin": 0.5, "bsm": True, "prop_attn": False}, 13),
        ({"method": "tome", "r": 5}, 12),
        ({"method": "random", "seed_groups": drawn.group, "ratio": 0.75}, 13),
        ({"method": "random", "seed_groups": drawn.group, "r": 4}, 13),
        ({"method": "none"}, 17),
    )
    for options, left in calls:
        y, size = merged_block(x, params.blocks[0], num_heads=3, **options)
        assert y.shape == (2, left, 12)
        np.testing.assert_array_equal(size.sum(-1), 17.0)
        assert (size[:, 0] == 1).all()
    one = random_plan(np.random.default_rng(3), 13, 3, batch=2)
    cfg = MergeConfig(num_heads=3, bsm_layers=(1,), global_pool=True)
    assert vit_forward_merged(images, params, cfg, ratio=0.8).shape == (2, 4)
    got = vit_forward_merged(images, params, cfg, method="random", r=(4, 3), seed_groups=[drawn, one])
    assert np.isfinite(got).all()


# The chapter's exercises; the first, the counterexample, stands above.


# --8<-- [start:ratio]
def ratio_that_halves(depth=12, n=197, dim=384):
    """The largest ratio, in steps of a thousandth, that halves the multiply-accumulates of ViT-S/16."""
    whole = merge_flops(depth, n, dim, ratio=1.0)
    return max(k / 1000 for k in range(500, 1001) if merge_flops(depth, n, dim, ratio=k / 1000) <= whole / 2)
    # --8<-- [end:ratio]


def law_pitome_exercise_which_ratio_halves_the_work():
    ratio = ratio_that_halves()
    whole = merge_flops(12, 197, 384, ratio=1.0)
    assert (
        merge_flops(12, 197, 384, ratio=ratio) <= whole / 2 < merge_flops(12, 197, 384, ratio=ratio + 0.001)
    )
    assert 0.8 < ratio < 0.9


# --8<-- [start:duplicates]
def three_copies():
    """One query, three copies of one key beside another: attention over all, merged, merged without sizes."""
    q, k, v = np.ones((1, 2)), np.array([[1.0, 0]] * 3 + [[0, 0.5]]), np.array([[1.0]] * 3 + [[0]])
    group = np.array([0, 0, 0, 1])
    merged, size = merge_tokens(np.hstack([k, v]), group, 2)
    k2, v2 = merged[:, :2], merged[:, 2:]
    every = attention_dense(q, k, v)
    return [
        float(o[0, 0]) for o in (every, proportional_attention(q, k2, v2, size), attention_dense(q, k2, v2))
    ]
    # --8<-- [end:duplicates]


def law_pitome_exercise_sizes_keep_the_softmax():
    every, merged, unsized = three_copies()
    assert abs(every - merged) < 1e-15
    assert every - unsized > 0.1


# --8<-- [start:parity]
def pairs_at_one_parity():
    """Four equal tokens at even places, strangers between: slots where both kinds meet, (ToMe, PiToMe)."""
    x = np.zeros((1, 8, 5))
    x[0, 0::2, 0] = 1
    x[0, 1::2, 1:] = np.eye(4)
    across = lambda plan: sum(len(set(np.flatnonzero(plan.group[0] == s) % 2)) > 1 for s in range(plan.n_out))
    return across(bipartite_soft_matching(x, r=2)), across(pitome_matching(x, ratio=0.75, margin=0.5))
    # --8<-- [end:parity]


def law_pitome_exercise_parity_decides_what_tome_may_merge():
    """ToMe merges two of the four into a stranger; PiToMe merges them with one another."""
    assert pairs_at_one_parity() == (1, 0)
