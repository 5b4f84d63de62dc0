"""int8 attention of one head depth first, x queries at a time, inside one arena of bytes.

A tile goes through its scores, their softmax and the product with the values before the next one begins, so
that x rows of the attention map exist and never all S. Source: Jung et al. 2024 (arXiv 2404.02945),
depth-first tiling. The projections before and after are not counted.
"""

import numpy as np

from ref.blocks.live_arena import Phase, run_phases
from ref.dims import dims


def attention_tile_bytes(head_dim, seq, queries):
    """(2 P + S) x + 2 P S for head_dim P, seq S, x queries a tile: bytes alive, of int8.

    A tile's queries, outputs and scores (softmax in place), and all keys and values. x = S is the whole map.
    Raises: ValueError unless P >= 1 and 1 <= x <= S.
    """
    if head_dim < 1 or not 1 <= queries <= seq:
        raise ValueError(f"need head_dim >= 1 and 1 <= queries <= seq, got {head_dim=}, {seq=}, {queries=}")
    return (2 * head_dim + seq) * queries + 2 * head_dim * seq


def tiled_attention(q, k, v, *, queries, scores, softmax, values, size=None):
    """(int8 [S, P], LiveArena): attention in an arena of `size` bytes, None = those that the plan needs.

    Args: q, k, v [S, P] int8. scores(q [x, P], k [S, P]) and softmax [x, S] give codes [x, S], values(weights
      [x, S], v^T [P, S]) gives [x, P], all int8: `Product8` and `Softmax8` of ref/blocks/vit_int8.py do.
    Raises: ValueError for bad shapes or queries; MemoryError if size is too small. A last, shorter tile uses
      the first rows of the buffers.
    """
    n = dims(q=(q, "S P"), k=(k, "S P"), v=(v, "S P"))
    S, P = n["S"], n["P"]
    attention_tile_bytes(P, S, queries)  # checks
    out = []

    def load(a):
        a.put("k", slice(None), k)
        a.put("v", slice(None), v)

    def tile(a, start):
        rows = slice(len(q[start : start + queries]))
        a.put("q", rows, q[start : start + queries])
        a.put("scores", rows, scores(a.get("q", rows), a.get("k")))
        a.put("scores", rows, softmax(a.get("scores", rows)))
        a.put("out", rows, values(a.get("scores", rows), a.get("v").T))
        out.append(a.get("out", rows))
        a.drop("q", "scores", "out")

    held = {"k": (S, P), "v": (S, P)}
    live = {**held, "q": (queries, P), "scores": (queries, S), "out": (queries, P)}
    tiles = [Phase("tile", live, lambda a, i=i: tile(a, i)) for i in range(0, S, queries)]
    arena = run_phases([Phase("load", held, load), *tiles], size=size)
    return np.concatenate(out), arena
