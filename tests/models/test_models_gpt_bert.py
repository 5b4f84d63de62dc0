"""The language models in ref: shapes, causality, masking, and hand-written gradients against central
differences.
"""

import numpy as np
import pytest

from ref.blocks.losses import cross_entropy
from ref.models import bert, gpt
from tests.slopes import slope_of

H = 1e-5  # step of the central differences


def slopes(f, params, grads, rng, path=()):
    """(path, analytic, numeric, error of the numeric) of a directional derivative for every array of a tree.

    The error is what doubling the step changes (truncation, with room for its own error) plus cancellation.
    """
    for name, g in zip(params._fields, grads, strict=True):
        value = getattr(params, name) if g is not None else None
        if isinstance(value, tuple) and value and hasattr(value[0], "_fields"):
            for i, (block, dblock) in enumerate(zip(value, g, strict=True)):
                put = lambda new, i=i, value=value, name=name: params._replace(
                    **{name: (*value[:i], new, *value[i + 1 :])}
                )
                yield from slopes(lambda p, put=put: f(put(p)), block, dblock, rng, (*path, name, i))
        elif value is not None:
            d = rng.standard_normal(value.shape)
            at = lambda h, d=d, name=name, value=value: f(params._replace(**{name: value + h * d}))
            slope, change = slope_of(at, H)
            yield (*path, name), np.sum(g * d), slope, 2 * change + 1e-8 * np.abs(d).sum()


def check(f, params, grads):
    for path, got, want, error in slopes(f, params, grads, np.random.default_rng(5)):
        np.testing.assert_allclose(got, want, rtol=0, atol=error, err_msg=str(path))


def test_models_gpt_is_causal_and_its_gradients_are_central_differences():
    rng = np.random.default_rng(0)
    params = gpt.init_gpt(rng, vocab=11, context=6, dim=8, depth=2, std=0.3)
    ids = rng.integers(0, 11, (2, 5))
    logits = gpt.gpt_forward(ids, params, num_heads=2)
    assert logits.shape == (2, 5, 11)
    later = ids.copy()
    later[:, 3:] = 0
    np.testing.assert_allclose(gpt.gpt_forward(later, params, num_heads=2)[:, :3], logits[:, :3], atol=1e-13)
    cotangent = rng.standard_normal(logits.shape)
    grads = gpt.gpt_forward_vjp(ids, params, cotangent, num_heads=2)
    check(lambda p: np.sum(cotangent * gpt.gpt_forward(ids, p, num_heads=2)), params, grads)


def test_models_gpt_loss_is_cross_entropy_of_the_next_tokens():
    """By the logits' definition; padding (token 0) is not scored; gradients by central differences."""
    rng = np.random.default_rng(3)
    params = gpt.init_gpt(rng, vocab=11, context=6, dim=8, depth=1, std=0.3)
    ids = rng.integers(1, 11, (2, 6))
    ids[1, 4:] = 0
    told = {"num_heads": 2, "ignore": 0, "chunk": 3}
    logits = gpt.gpt_forward(ids[:, :-1], params, num_heads=2)
    want, dlogits = cross_entropy(logits, ids[:, 1:], ignore=0)
    # the same products and the same eight losses in float64, added in another order: some tens of steps
    np.testing.assert_allclose(gpt.gpt_loss(ids, params, **told), want, rtol=1e-14)
    check(lambda p: gpt.gpt_loss(ids, p, **told), params, gpt.gpt_loss_vjp(ids, params, **told))
    pulled = gpt.gpt_forward_vjp(ids[:, :-1], params, -3 * dlogits, num_heads=2)
    for got, want in zip(
        gpt.gpt_loss_vjp(ids, params, -3.0, **told).blocks[0], pulled.blocks[0], strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="ids must hold at least two tokens"):
        gpt.gpt_loss(ids[:, :1], params, num_heads=2)


def test_models_bert_ignores_padding_and_its_gradients_are_central_differences():
    rng = np.random.default_rng(1)
    params = bert.init_bert(rng, vocab=11, context=6, dim=8, depth=2, std=0.3)
    ids, types = rng.integers(0, 11, (2, 5)), rng.integers(0, 2, (2, 5))
    token_mask = np.arange(5) < np.array([[5], [3]])
    run = lambda ids, p=params: bert.bert_encode(ids, p, num_heads=2, token_mask=token_mask, types=types)
    y = run(ids)
    padded = ids.copy()
    padded[1, 3:] = 7
    np.testing.assert_allclose(run(padded)[1, :3], y[1, :3], atol=1e-13)
    cotangent = rng.standard_normal(y.shape)
    grads = bert.bert_encode_vjp(ids, params, cotangent, num_heads=2, token_mask=token_mask, types=types)
    check(lambda p: np.sum(cotangent * run(ids, p)), params, grads)
    pooled = bert.bert_pool(y, params)
    weights = rng.standard_normal(pooled.shape)
    dx, dw, db = bert.bert_pool_vjp(y, params, weights)
    d = rng.standard_normal(y.shape)
    slope = (
        np.sum(weights * bert.bert_pool(y + H * d, params))
        - np.sum(weights * bert.bert_pool(y - H * d, params))
    ) / (2 * H)
    np.testing.assert_allclose(np.sum(dx * d), slope, rtol=0, atol=1e-7 * np.abs(d).sum())
    check(
        lambda p: np.sum(weights * bert.bert_pool(y, p)),
        params,
        params._replace(**dict.fromkeys(params._fields))._replace(w_pool=dw, b_pool=db, blocks=None),
    )


@pytest.mark.parametrize(
    ("ids", "message"),
    [(np.array([0, 11]), "ids must be in 0..10"), (np.zeros(7, int), "7")],
    ids=["range", "length"],
)
def test_models_gpt_and_bert_reject_bad_ids(ids, message):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=message):
        gpt.gpt_forward(ids, gpt.init_gpt(rng, vocab=11, context=6, dim=4, depth=1), num_heads=1)
    with pytest.raises(ValueError, match=message):
        bert.bert_encode(ids, bert.init_bert(rng, vocab=11, context=6, dim=4, depth=1), num_heads=1)
