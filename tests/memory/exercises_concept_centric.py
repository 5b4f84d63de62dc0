"""The exercises of the chapter on concept-centric transformers: a stub for the reader, what its solution must
do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:won]
import numpy as np


def won(logits, v):
    """What each slot wins, u [C, d]: logits [T, C] of tokens and slots, values v
    [T, d] of the tokens. Tokens are shared out among the slots, then each slot
    takes the mean of v under its shares (plus 1e-8). As it stands slots choose
    tokens and do not compete.
    """
    A = np.exp(logits - logits.max(axis=0))
    A /= A.sum(axis=0)
    share = A + 1e-8
    return (share / share.sum(axis=0)).T @ v
    # --8<-- [end:won]


# --8<-- [start:solve_won]
def solve_won(logits, v):
    A = np.exp(logits - logits.max(axis=1, keepdims=True))
    A /= A.sum(axis=1, keepdims=True)  # over slots: a token is one, whoever gets it
    share = A + 1e-8
    return (share / share.sum(axis=0)).T @ v
    # --8<-- [end:solve_won]


def check_won(won):
    """The library's slots after a step, with a GRU that passes tanh of what was won."""
    from ref.blocks.norms import layer_norm
    from ref.memory.concept_centric import SlotParams, concept_slot_attention

    d = 3
    one, zero, eye = np.ones(d), np.zeros(d), np.eye(d)
    w_ih = np.concatenate([np.zeros((d, 2 * d)), eye], axis=1)
    b_ih = np.concatenate([zero, -50 * one, zero])  # the update gate is shut: nothing of the old slot stays
    p = SlotParams(one, zero, one, zero, eye, eye, eye, w_ih, np.zeros((d, 3 * d)), b_ih, np.zeros(3 * d),
                   np.zeros((1, 1, d)), np.zeros((1, 1, d)))  # fmt: skip
    for seed, T, C in ((0, 4, 2), (1, 5, 3), (2, 2, 1)):
        rng = np.random.default_rng(seed)
        x, slots = rng.standard_normal((T, d)), rng.standard_normal((C, d))
        v = layer_norm(x, one, zero)
        logits = v @ layer_norm(slots, one, zero).T / np.sqrt(d)
        want = np.arctanh(concept_slot_attention(x[None], slots[None], p)[0][0])
        got = won(logits, v)
        # the tanh of numbers below 1.5 is undone: its slope is above 0.18
        assert np.allclose(got, want, rtol=0, atol=1e-10), (
            f"{T} tokens, {C} slots: the first slot wins {want[0].round(3)}, not {np.round(got[0], 3)}"
        )


# --8<-- [start:said]
import numpy as np


def said(attn, v, w):
    """What each concept adds to each class, [C, classes], for one token: attn
    [H, C] by head, v [H, C, D] the concepts' values, w [H * D, classes] the
    output map, heads one after the other. As it stands heads are averaged
    before they meet their part of w.
    """
    H, _, D = v.shape
    mean = attn.mean(axis=0)[:, None] * v.mean(axis=0)
    return mean @ w.reshape(H, D, -1).sum(axis=0)
    # --8<-- [end:said]


# --8<-- [start:solve_said]
def solve_said(attn, v, w):
    H, _, D = v.shape
    by_head = v @ w.reshape(H, D, -1)  # [H, C, classes]
    return np.sum(attn[..., None] * by_head, axis=0)
    # --8<-- [end:solve_said]


def check_said(said):
    """The library's contributions; with the bias they add up to the logits."""
    from ref.blocks.attention import split_heads
    from ref.memory.concept_centric import CrossParams, concept_contributions, concept_cross_attention

    for seed, H in ((0, 1), (1, 2), (2, 3)):
        rng = np.random.default_rng(seed)
        p = CrossParams(*(rng.standard_normal(s) for s in ((6, 6), (6, 12), (6, 4), 4)))
        token, concepts = rng.standard_normal((1, 1, 6)), rng.standard_normal((1, 5, 6))
        attn = concept_cross_attention(token, concepts, p, heads=H)[1][0, :, 0]
        v = split_heads(concepts @ p.w_kv[:, 6:], H)[0]
        want = concept_contributions(token, concepts, p, heads=H)[0, 0]
        got = said(attn, v, p.w_proj)
        assert np.shape(got) == want.shape, f"5 concepts and 4 classes: {want.shape}, not {np.shape(got)}"
        # sums of six products of size 1 to 20
        assert np.allclose(got, want, rtol=0, atol=1e-11), (
            f"{H} heads: the first concept says {want[0].round(2)}, not {np.round(got[0], 2)}"
        )


# --8<-- [start:explained]
import numpy as np


def explained(attn, target):
    """The explanation loss: C times the mean squared distance of attn [N, C]
    from the targets [N, C] >= 0, each row of which is brought to sum 1; rows
    that hold NaN are not known and do not count. As it stands targets are taken
    as they are.
    """
    return attn.shape[1] * np.mean((attn - target) ** 2)
    # --8<-- [end:explained]


# --8<-- [start:solve_explained]
def solve_explained(attn, target):
    known = ~np.isnan(target).any(axis=1)
    if not known.any():
        return 0.0
    want = target[known] / target[known].sum(axis=1, keepdims=True)
    return attn.shape[1] * np.mean((attn[known] - want) ** 2)
    # --8<-- [end:solve_explained]


def check_explained(explained):
    """The library's loss, also where nothing is annotated."""
    from ref.memory.concept_centric import explanation_loss

    nan = [np.nan] * 3
    rows = [[1.0, 1.0, 0.0], [0.0, 0.0, 2.0], [1.0, 0.0, 0.0]]
    for target in (rows, [rows[0], nan, rows[2]], [nan, nan, nan]):
        attn = np.random.default_rng(0).dirichlet(np.ones(3), 3)
        want = explanation_loss(attn[None], np.array(target)[None])
        got = explained(attn, np.array(target))
        # nine squares below 1
        assert abs(got - want) < 1e-12, f"targets {target}: the loss is {want:.4f}, not {got:.4f}"
