"""The exercises of the chapter on PMI: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:compete]
import numpy as np


def compete(logits, k):
    """What each slot takes from each token, [N, T]: the softmax over tokens, of
    which the k largest of a row are kept as they are. As it stands the tokens
    that lose are left out of the softmax as well.
    """
    order = np.argsort(-logits, axis=1)
    kept = np.zeros(logits.shape, bool)
    np.put_along_axis(kept, order[:, :k], True, axis=1)
    p = np.where(kept, np.exp(logits - logits.max(axis=1, keepdims=True)), 0.0)
    return p / p.sum(axis=1, keepdims=True)
    # --8<-- [end:compete]


# --8<-- [start:solve_compete]
def solve_compete(logits, k):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    order = np.argsort(-logits, axis=1)
    kept = np.zeros(logits.shape, bool)
    np.put_along_axis(kept, order[:, :k], True, axis=1)
    return np.where(kept, p, 0.0)
    # --8<-- [end:solve_compete]


def check_compete(compete):
    """The library's weights, with maps that change nothing."""
    from ref.memory.pmi import WriteParams, write_weights

    eye, zero = np.eye(3), np.zeros(3)
    p = WriteParams(*(eye, zero) * 4)
    for seed, T, k in ((0, 4, 2), (1, 5, 1), (2, 3, 3)):
        rng = np.random.default_rng(seed)
        x, slots = rng.standard_normal((T, 3)), rng.standard_normal((2, 3))
        want = write_weights(x[None], slots[None], p, heads=1, topk=k)[0, 0]
        got = compete(slots @ x.T, k)
        # exponentials and sums of at most five terms
        assert np.allclose(got, want, rtol=0, atol=1e-12), (
            f"{k} of {T} tokens: the first slot takes {want[0].round(3)}, not {np.round(got[0], 3)}"
        )


# --8<-- [start:relations]
import numpy as np


def relations(q, k, v):
    """[S, D, D]: R_s is the sum over slots m of the outer product of tanh(q_s *
    k_m) and v_m; q [S, D], k, v [N, D]. As it stands keys and values are added
    up before they are paired.
    """
    return np.tanh(q * k.sum(axis=0))[:, :, None] * v.sum(axis=0)
    # --8<-- [end:relations]


# --8<-- [start:solve_relations]
def solve_relations(q, k, v):
    paired = np.tanh(q[:, None] * k)  # [S, N, D]
    return np.einsum("snd,ne->sde", paired, v)
    # --8<-- [end:solve_relations]


def check_relations(relations):
    """The library's outer-product attention."""
    from ref.memory.pmi import outer_product_attention

    for seed, S, N in ((0, 1, 1), (1, 2, 3), (2, 3, 2)):
        rng = np.random.default_rng(seed)
        q, k, v = rng.standard_normal((S, 4)), rng.standard_normal((N, 4)), rng.standard_normal((N, 4))
        want = outer_product_attention(q[None], k[None], v[None])[0]
        got = relations(q, k, v)
        assert np.shape(got) == want.shape, f"{S} queries give shape {want.shape}, not {np.shape(got)}"
        # sums of three products below 3
        assert np.allclose(got, want, rtol=0, atol=1e-12), (
            f"{N} slots: the first row is {want[0, 0].round(3)}, not {np.round(got[0, 0], 3)}"
        )


# --8<-- [start:store]
import numpy as np


def store(L, R, rate):
    """Long-term memory [D, D] after relations R [D, D]: every row of L + rate R
    is normed to mean 0 and variance 1 (plus 1e-5 under the root). As it stands
    rows are scaled to length 1.
    """
    total = L + rate * R
    return total / np.linalg.norm(total, axis=1, keepdims=True)
    # --8<-- [end:store]


# --8<-- [start:solve_store]
def solve_store(L, R, rate):
    total = L + rate * R
    mean = total.mean(axis=1, keepdims=True)
    variance = total.var(axis=1, keepdims=True)
    return (total - mean) / np.sqrt(variance + 1e-5)
    # --8<-- [end:solve_store]


def check_store(store):
    """The library's consolidation of one slot into one segment."""
    from ref.memory.pmi import ConsolidateParams, consolidate, outer_product_attention

    eye = np.eye(4)
    for seed, rate in ((0, 0.1), (1, 1.0), (2, 0.0)):
        rng = np.random.default_rng(seed)
        slot, L = rng.standard_normal((1, 1, 4)), rng.standard_normal((4, 4))
        p = ConsolidateParams(np.ones((1, 1)), eye, eye, eye, rate, np.ones(4), np.zeros(4))
        R = outer_product_attention(slot, slot, slot)[0, 0]
        want, got = consolidate(slot, L[None, None], p)[0, 0], store(L, R, rate)
        # a mean, a variance and a division by a root above 0.1
        assert np.allclose(got, want, rtol=0, atol=1e-11), (
            f"rate {rate}: the first row is {want[0].round(3)}, not {np.round(got[0], 3)}"
        )
