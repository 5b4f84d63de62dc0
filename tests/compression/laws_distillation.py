"""Laws of distillation on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.compression.distillation import (
    Activations,
    attention_mse,
    attention_mse_vjp,
    cosine_loss,
    cross_entropy,
    distill,
    encoder_cost,
    hard_distillation_loss,
    hidden_mse,
    hidden_mse_vjp,
    init_student_from_teacher,
    kd_loss,
    layer_map,
    minilm_loss,
    patient_loss,
    soft_cross_entropy,
    soft_kl,
    tinybert_loss,
    tinybert_loss_vjp,
)
from ref.models.gpt import init_gpt

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
temperatures = st.sampled_from((0.5, 1.0, 4.0))


def softened(z, T):
    e = np.exp(z / T - (z / T).max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def slope(f, x, d, h=1e-4):
    """Central difference of f at x along d, with one Richardson step: error of order h^4."""
    at = lambda h: (f(x + h * d) - f(x - h * d)) / (2 * h)
    return at(h) + (at(h) - at(2 * h)) / 3


@given(seeds, temperatures, st.sampled_from((0.0, 3.0, 100.0)))
def law_distillation_soft_losses_are_the_definition(seed, T, size):
    rng = np.random.default_rng(seed)
    s, t = size * rng.standard_normal((4, 6)), size * rng.standard_normal((4, 6))
    p, q = softened(t, T), softened(s, T)
    ce, grad = soft_cross_entropy(s, t, temperature=T)
    kl, same = soft_kl(s, t, temperature=T)
    np.testing.assert_array_equal(grad, same)
    np.testing.assert_allclose(grad, (q - p) / (4 * T), rtol=0, atol=64 * EPS * (1 + size / T))
    # log-probabilities of size |z| / T are off by that many ulps, which exp hands on to the sums of p and q
    np.testing.assert_allclose(grad.sum(axis=-1), 0, rtol=0, atol=32 * EPS * (1 + size / T))
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum() / 4
    np.testing.assert_allclose(ce, kl + entropy, rtol=0, atol=256 * EPS * (1 + size / T))
    assert kl >= -64 * EPS * (1 + size / T)
    zero, none = soft_kl(t, t, temperature=T)
    assert abs(zero) <= 64 * EPS * (1 + size / T)
    np.testing.assert_array_equal(none, 0)
    moved = soft_kl(s + rng.standard_normal((4, 1)), t + rng.standard_normal((4, 1)), temperature=T)[0]
    np.testing.assert_allclose(moved, kl, rtol=0, atol=512 * EPS * (1 + size / T))
    order = rng.permutation(6)
    np.testing.assert_allclose(soft_kl(s[:, order], t[:, order], temperature=T)[0], kl, rtol=0,
                               atol=256 * EPS * (1 + size / T))  # fmt: skip
    whole = soft_cross_entropy(s, t, temperature=T, reduction="mean_all")
    np.testing.assert_allclose(whole[0], ce / 6, rtol=4 * EPS)
    np.testing.assert_allclose(whole[1], grad / 6, rtol=4 * EPS)


@given(seeds, temperatures, st.sampled_from((0.0, 0.3, 1.0)), st.booleans())
def law_distillation_kd_gradient_is_the_slope(seed, T, alpha, squared):
    rng = np.random.default_rng(seed)
    s, t, d = (rng.standard_normal((3, 5)) for _ in range(3))
    y = rng.integers(0, 5, 3)
    options = {"temperature": T, "alpha": alpha, "scale_by_t2": squared}
    loss, grad = kd_loss(s, t, y, **options)
    weight = alpha * (T * T if squared else 1)
    hard = -np.log(softened(s, 1)[range(3), y]).mean()
    np.testing.assert_allclose(
        loss, weight * soft_kl(s, t, temperature=T)[0] + (1 - alpha) * hard, rtol=1e-12
    )
    # losses of size 1 to 20, differences over 1e-4: rounding 1e-11, truncation h^4
    np.testing.assert_allclose((grad * d).sum(), slope(lambda z: kd_loss(z, t, y, **options)[0], s, d),
                               rtol=1e-8, atol=1e-9)  # fmt: skip


@given(seeds)
def law_distillation_hot_labels_tend_to_matching_logits(seed):
    """T^2 KL -> sum (zc_s - zc_t)^2 / (2 K) for centred logits, relative error of order max|z| / T."""
    rng = np.random.default_rng(seed)
    s, t = rng.uniform(-5, 5, (2, 1, 8))
    t = t + np.eye(8)[:1] * 3  # not nearly equal
    T = 1000.0
    zc = (s - s.mean()) - (t - t.mean())
    want = (zc**2).sum() / 16
    np.testing.assert_allclose(T * T * soft_kl(s, t, temperature=T)[0], want, rtol=1e-2, atol=1e-3)


@given(seeds, st.booleans(), st.booleans())
def law_distillation_hidden_states_and_their_gradients(seed, projected, masked):
    rng = np.random.default_rng(seed)
    ds = 3 if projected else 4
    s, t = rng.standard_normal((2, 5, ds)), rng.standard_normal((2, 5, 4))
    proj = rng.standard_normal((4, 3)) if projected else None
    mask = np.arange(5) < np.array([[5], [2]]) if masked else None
    valid = np.ones((2, 5), bool) if mask is None else mask
    out = s @ proj.T if projected else s
    want = sum(((out[b, i] - t[b, i]) ** 2).sum() for b in range(2) for i in range(5) if valid[b, i])
    np.testing.assert_allclose(hidden_mse(s, t, proj, mask=mask), want / (valid.sum() * 4), rtol=1e-13)
    grad_s, grad_p = hidden_mse_vjp(s, t, proj, mask=mask)
    d = rng.standard_normal(s.shape)
    f = lambda z: hidden_mse(z, t, proj, mask=mask)
    np.testing.assert_allclose((grad_s * d).sum(), slope(f, s, d), rtol=1e-8, atol=1e-9)
    assert not grad_s[~valid].any()
    if projected:
        e = rng.standard_normal(proj.shape)
        g = lambda w: hidden_mse(s, t, w, mask=mask)
        np.testing.assert_allclose((grad_p * e).sum(), slope(g, proj, e), rtol=1e-8, atol=1e-9)
    noise = np.where(valid[..., None], s, 99.0)
    assert hidden_mse(noise, t, proj, mask=mask) == hidden_mse(s, t, proj, mask=mask)
    assert hidden_mse(t, t, np.eye(4), mask=mask) == 0


@given(seeds, st.booleans())
def law_distillation_attention_scores_and_their_gradient(seed, masked):
    rng = np.random.default_rng(seed)
    s, t = rng.standard_normal((2, 2, 3, 4, 4))
    s[:, :, :, 3] -= 1e4  # the usual way to hide a key
    mask = np.arange(4) < np.array([[4], [2]]) if masked else None
    valid = np.ones((2, 4), bool) if mask is None else mask
    total, count = 0.0, 0
    for b in range(2):
        for i in range(4):
            for j in range(4):
                if valid[b, i] and valid[b, j]:
                    a = np.where(s[b, :, i, j] <= -100, 0, s[b, :, i, j])
                    total, count = total + ((a - t[b, :, i, j]) ** 2).sum(), count + 3
    np.testing.assert_allclose(attention_mse(s, t, mask=mask), total / count, rtol=1e-13)
    d = rng.standard_normal(s.shape)
    got = (attention_mse_vjp(s, t, mask=mask) * d).sum()
    np.testing.assert_allclose(
        got, slope(lambda z: attention_mse(z, t, mask=mask), s, d), rtol=1e-8, atol=1e-9
    )
    order = rng.permutation(3)
    again = attention_mse(s[:, order], t[:, order], mask=mask)
    np.testing.assert_allclose(again, attention_mse(s, t, mask=mask), rtol=1e-13)


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from(("uniform", "last", "skip")))
def law_distillation_layer_maps_rise_and_end_at_the_end(student, p, kind):
    teacher = student * p
    att, hidden = layer_map(teacher, student, kind=kind)
    assert len(att) == student
    assert len(hidden) == student + 1
    for idx, top in ((att, teacher - 1), (hidden, teacher)):
        assert (np.diff(idx) > 0).all()
        assert idx[0] >= 0
        assert idx[-1] == top
    assert hidden[0] == 0
    if kind == "uniform":
        assert att.tolist() == [i * p + p - 1 for i in range(student)]


@given(seeds)
def law_distillation_tinybert_adds_the_mapped_layers(seed):
    rng = np.random.default_rng(seed)
    acts = lambda layers, d: Activations(
        rng.standard_normal((layers, 2, 2, 3, 3)), rng.standard_normal((layers + 1, 2, 3, d))
    )
    s, t, proj = acts(2, 3), acts(4, 5), rng.standard_normal((5, 3))
    mask = np.arange(3) < np.array([[3], [2]])
    total, att, hidden = tinybert_loss(s, t, proj, mask=mask)
    want_att = sum(attention_mse(s.attention[i], t.attention[2 * i + 1], mask=mask) for i in range(2))
    want_hid = sum(hidden_mse(s.hidden[i], t.hidden[2 * i], proj, mask=mask) for i in range(3))
    np.testing.assert_allclose((total, att, hidden), (want_att + want_hid, want_att, want_hid), rtol=1e-13)
    grads, grad_proj = tinybert_loss_vjp(s, t, proj, mask=mask)
    for name, x, g in (("attention", s.attention, grads.attention), ("hidden", s.hidden, grads.hidden)):
        d = rng.standard_normal(x.shape)
        f = lambda z, name=name: tinybert_loss(s._replace(**{name: z}), t, proj, mask=mask)[0]
        np.testing.assert_allclose((g * d).sum(), slope(f, x, d), rtol=1e-8, atol=1e-8)
    d = rng.standard_normal(proj.shape)
    f = lambda w: tinybert_loss(s, t, w, mask=mask)[0]
    np.testing.assert_allclose((grad_proj * d).sum(), slope(f, proj, d), rtol=1e-8, atol=1e-8)


@given(seeds, st.booleans())
def law_distillation_minilm_compares_relations_of_any_width(seed, masked):
    rng = np.random.default_rng(seed)
    qkv = lambda d: tuple(rng.standard_normal((2, 2, 4, d)) for _ in range(3))
    s, t = qkv(3), qkv(5)
    mask = np.arange(4) < np.array([[4], [2]]) if masked else None
    valid = np.ones((2, 4), bool) if mask is None else mask

    def want(a, b):
        out = []
        for i in range(2):
            n = valid[i].sum()
            for h in range(2):
                probs = [softened(x[a][i, h, :n] @ x[b][i, h, :n].T, np.sqrt(x[a].shape[-1])) for x in (s, t)]
                out += list((probs[1] * np.log(probs[1] / probs[0])).sum(axis=-1))
        return np.mean(out)

    total, att, val = minilm_loss(s, t, mask=mask)
    np.testing.assert_allclose((att, val), (want(0, 1), want(2, 2)), rtol=1e-11, atol=1e-13)
    assert total == att + val
    assert minilm_loss(t, t, mask=mask)[0] == 0


@given(seeds)
def law_distillation_cosine_and_patient_losses_ignore_length(seed):
    rng = np.random.default_rng(seed)
    s, t = rng.standard_normal((2, 2, 3, 5))
    mask = np.arange(3) < np.array([[3], [1]])
    cos = [s[b, i] @ t[b, i] / np.sqrt(s[b, i] @ s[b, i] * (t[b, i] @ t[b, i])) for b, i in np.argwhere(mask)]
    np.testing.assert_allclose(cosine_loss(s, t, mask=mask), 1 - np.mean(cos), rtol=1e-12)
    np.testing.assert_allclose(cosine_loss(3 * s, t, mask=mask), cosine_loss(s, t, mask=mask), rtol=1e-13)
    assert cosine_loss(0 * s, t) == 1
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    want = ((unit(s) - unit(t)) ** 2).sum() / s.size
    np.testing.assert_allclose(patient_loss(2 * s, 5 * t), want, rtol=1e-12)


@given(seeds)
def law_distillation_hard_labels_are_two_cross_entropies(seed):
    rng = np.random.default_rng(seed)
    a, b, t = rng.standard_normal((3, 4, 5))
    y = rng.integers(0, 5, 4)
    ce = lambda z, y: -np.log(softened(z, 1)[range(4), y]).mean()
    want = (ce(a, y) + ce(b, t.argmax(axis=1))) / 2
    np.testing.assert_allclose(hard_distillation_loss(a, b, t, y), want, rtol=1e-12)
    grad, d = cross_entropy(a, y)[1], rng.standard_normal(a.shape)
    np.testing.assert_allclose((grad * d).sum(), slope(lambda z: ce(z, y), a, d), rtol=1e-8, atol=1e-9)


def law_distillation_student_starts_from_the_teachers_blocks():
    teacher = init_gpt(np.random.default_rng(0), vocab=7, context=4, dim=8, depth=4)
    student = init_student_from_teacher(teacher, (0, 2))
    assert student.blocks == (teacher.blocks[0], teacher.blocks[2])
    assert student.wte is teacher.wte


def law_distillation_stages_follow_the_schedule():
    seen = []

    def step(params, batch, stage):
        seen.append((batch, stage))
        return params + batch, params

    params, history = distill(step, 0, range(1, 9), schedule=(("inner", 3), ("prediction", 2)))
    assert params == 15
    assert seen == [(1, "inner"), (2, "inner"), (3, "inner"), (4, "prediction"), (5, "prediction")]
    assert history == [
        ("inner", 0.0),
        ("inner", 1.0),
        ("inner", 3.0),
        ("prediction", 6.0),
        ("prediction", 10.0),
    ]


def law_distillation_costs_count_the_arrays():
    h, f, layers = 768, 3072, 6
    block = 4 * (h * h + h) + (h * f + f) + (f * h + h) + 4 * h
    assert (
        encoder_cost(layers, h, f, 12, tokens=1)[0]
        == 30522 * h + 512 * h + 2 * h + layers * block
        == 66_362_880
    )
    assert encoder_cost(1, h, f, 12, tokens=128)[1] == 128 * (4 * h * h + 2 * h * f) + 2 * 128**2 * h
    bert, tiny = (encoder_cost(*s, tokens=128) for s in ((12, 768, 3072, 12), (4, 312, 1200, 12)))
    assert bert[0] == (30522 + 512 + 2) * h + 12 * block
    assert 7.5 < bert[0] / tiny[0] < 7.7  # the TinyBERT paper rounds to 7.5
