"""The exercises of the chapter on user-aware prefix-tuning: stubs for the reader, what their solutions must
do, solutions.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:tfidf]
import numpy as np


def tfidf(counts):
    """Weights of words by users from counts [users, words], equation (1). As it stands
    frequent words win.
    """
    return counts.astype(float)
    # --8<-- [end:tfidf]


# --8<-- [start:solve_tfidf]
def solve_tfidf(counts):
    users, df = len(counts), (counts > 0).sum(axis=0)
    return counts * (np.log((1 + users) / (1 + df)) + 1)
    # --8<-- [end:solve_tfidf]


def check_tfidf(tfidf):
    """The library's weights, without norm."""
    from ref.training.user_prefix import user_tfidf

    docs = ["sun sun sea sand", "sea hill hill hill", "sea sun rain"]
    want, words = user_tfidf(docs, norm=None)
    counts = np.array([[doc.split().count(w) for w in words] for doc in docs])
    got = np.asarray(tfidf(counts.copy()))
    assert got.shape == want.shape, f"the weights have shape {got.shape}, not {want.shape}"
    for u, w in np.argwhere(np.abs(got - want) > 1e-12):
        raise AssertionError(f"user {u}, {words[w]!r}: {want[u, w]:.3f}, not {got[u, w]:.3f}")


# --8<-- [start:loss]
def loss(log_p, prefix, caption):
    """Mean of -log p of the caption's tokens: log_p [prefix + n, V] at every position of
    the prefix's vectors and the n tokens behind them. As it stands each token is read
    at its own position.
    """
    n = len(caption)
    return -sum(log_p[prefix + j][caption[j]] for j in range(n)) / n
    # --8<-- [end:loss]


# --8<-- [start:solve_loss]
def solve_loss(log_p, prefix, caption):
    n = len(caption)
    return -sum(log_p[prefix - 1 + j][caption[j]] for j in range(n)) / n  # said one position before
    # --8<-- [end:solve_loss]


def check_loss(loss):
    """The library's loss of a small language model."""
    from ref.blocks.softmax import log_softmax
    from ref.models.gpt import gpt_blocks, gpt_head, init_gpt
    from ref.training.user_prefix import prefix_lm_loss

    rng = np.random.default_rng(0)
    lm = init_gpt(rng, vocab=7, context=8, dim=8, depth=1, std=0.5)
    prefix, caption = rng.standard_normal((1, 3, 8)), rng.integers(0, 7, (1, 4))
    whole = np.concatenate([prefix, lm.wte[caption]], axis=1) + lm.wpe[:7]
    log_p = log_softmax(gpt_head(gpt_blocks(whole, lm, num_heads=2)[-1], lm))[0]
    want = prefix_lm_loss(prefix, caption, np.ones((1, 4), bool), lm, num_heads=2)
    got = loss(log_p, 3, caption[0])
    assert abs(got - want) < 1e-9, f"the loss is {want:.4f}, not {got:.4f}"


# --8<-- [start:penalised]
def penalised(f, matches, chunks):
    """METEOR's score from the mean f of precision and recall, the number of words that
    match, and of runs that they form in both sentences. As it stands order is free.
    """
    return f
    # --8<-- [end:penalised]


# --8<-- [start:solve_penalised]
def solve_penalised(f, matches, chunks):
    return f * (1 - 0.5 * (chunks / matches) ** 3)
    # --8<-- [end:solve_penalised]


def check_penalised(penalised):
    """The library's score of whole sentences in other orders, where f is 1."""
    from ref.training.user_prefix import meteor

    for said, runs in (("drawn gloomy one", 1), ("gloomy one drawn", 2), ("one gloomy drawn", 3)):
        want = meteor([["drawn gloomy one"]], [said])[0]
        got = penalised(1.0, 3, runs)
        assert abs(got - want) < 1e-12, f"{said!r} for 'drawn gloomy one' scores {want:.3f}, not {got:.3f}"
