"""Beam search over any function that gives the next token's logits, as ClipCap's (Mokady et al. 2021)."""

import numpy as np

from ref.blocks.softmax import log_softmax


def beam_search(step_fn, prefix, *, beam, max_len, stop_id=None):
    """Token lists, best first by mean log-probability; the stop token, where produced, ends one and is kept.

    step_fn(prefix, tokens [b, t]) -> logits [b, V] of the next token. A finished list stays a candidate at
    its own score. Not every list of V^t is seen: a wider beam may end with a worse best.
    Raises: ValueError for beam or max_len below 1, or logits of which none is finite.
    """
    if beam < 1 or max_len < 1:
        raise ValueError(f"beam and max_len must be at least 1, got {beam=} and {max_len=}")
    tokens, score, length = np.zeros((1, 0), np.int64), np.zeros(1), np.zeros(1, int)
    done = np.zeros(1, bool)
    for _ in range(max_len):
        log_p = log_softmax(step_fn(prefix, tokens))
        log_p[done] = -np.inf
        log_p[done, 0] = 0.0  # a finished list goes on in one way, for nothing
        length = length + ~done
        total = score[:, None] + log_p
        mean = (total / length[:, None]).ravel()
        best = np.argsort(-mean, kind="stable")[:beam]
        best = best[np.isfinite(mean[best])]
        if not best.size:
            raise ValueError("step_fn must return at least one logit that is finite")
        row, token = np.divmod(best, log_p.shape[1])
        tokens, score = np.concatenate([tokens[row], token[:, None]], axis=1), total.ravel()[best]
        length, done = length[row], done[row] | (token == stop_id)
        if done.all():
            break
    order = np.argsort(-score / length, kind="stable")
    return [tokens[i, : length[i]].tolist() for i in order]
