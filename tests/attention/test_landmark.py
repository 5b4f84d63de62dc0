"""Landmark attention: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.attention import laws_landmark
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_landmark))


def house(raw):
    """The stored maps, [out, in] with q, k, v fused, as LandmarkParams."""
    return ref.landmark.LandmarkParams(*(w.T for w in (*np.split(raw["qkv_w"], 3), raw["proj_w"])))


@golden("landmark")
def test_landmark_golden_ref(case):
    run(case, ref.landmark, build={"params": house})


M = ref.landmark
Q, FLAGS = np.ones((1, 2, 8, 4)), (np.arange(8) % 4 == 3)[None]
CACHE = M.init_landmark_cache(1, 2, 4, block_size=3, cache_blocks=2)
SIZES = {"block_size": 3, "top_k": 1, "cache_blocks": 2}
DECODE = lambda q=Q, flags=FLAGS, cache=CACHE, **o: M.landmark_decode(q, q, q, flags, cache, **{**SIZES, **o})
WIDE = np.eye(8)
PARAMS = M.LandmarkParams(WIDE, WIDE, WIDE, WIDE)
STREAM = lambda params=PARAMS, **o: M.landmark_stream(
    np.ones((1, 8, 8)), params, FLAGS, **{"num_heads": 2, "chunk_lengths": (4, 4), **SIZES, **o}
)
STORE = M.LandmarkStore(np.zeros((2, 1, 2, 4, 3)))
STORE.put(np.ones((2, 4, 3)), np.ones((2, 4, 3)))
BAD = {
    "block": (lambda: M.insert_landmarks(np.arange(5), block_size=0, landmark_id=9), "block_size must be"),
    "twice": (lambda: M.insert_landmarks(np.arange(5), block_size=2, landmark_id=3), "landmark_id=3 already"),
    "flags": (lambda: M.landmark_attention(Q, Q, Q, FLAGS.astype(int)), "is_landmark must be boolean"),
    "flags_shape": (lambda: M.landmark_attention(Q, Q, Q, FLAGS[:, :7]), r"is_landmark\.shape\[1\] = 7"),
    "heads": (lambda: M.landmark_attention(Q, Q[:, [0, 0, 0]], Q[:, [0, 0, 0]], FLAGS), "not a multiple"),
    "irregular": (lambda: M.landmark_attention(Q, Q, Q, FLAGS, block_size=2), "after every 2 tokens"),
    "tile": (lambda: M.landmark_attention(Q, Q, Q, FLAGS, block_size=0), "block_size must be at least 1"),
    "none": (lambda: M.landmark_attention(*[Q[:, :, :0]] * 3, FLAGS[:, :0]), "at least one position"),
    "cotangent": (lambda: M.landmark_attention_bwd(Q[:, :1], Q, Q, Q, FLAGS), "axis H is 1 in do"),
    "no_heads": (lambda: M.landmark_attention_bwd(Q, Q, Q[0, 0], Q, FLAGS), "k must have shape"),
    "back": (lambda: M.landmark_attention_bwd(Q, Q, Q, Q, FLAGS, block_size=2), "after every 2 tokens"),
    "queries": (lambda: M.grouped_softmax(np.ones((1, 1, 9, 8)), FLAGS), "L <= S"),
    "no_keys": (lambda: M.grouped_softmax(np.ones((1, 1, 0, 0)), FLAGS[:, :0]), "1 <= S"),
    "k": (lambda: M.select_blocks(np.ones((1, 1, 1, 2)), top_k=0), "top_k must be at least 1"),
    "empty": (lambda: M.select_blocks(np.ones((1, 1, 1, 0)), top_k=1), "at least one block"),
    "selection": (lambda: DECODE(selection="max"), "selection must be one of"),
    "decode_k": (lambda: DECODE(top_k=0), "top_k must be at least 1"),
    "batch": (
        lambda: DECODE(np.ones((2, 2, 8, 4)), FLAGS[[0, 0]]),
        r"cache\.block_k\.shape\[0\] = 1, but axis B is 2",
    ),
    "capacity": (lambda: DECODE(cache_blocks=3), "but must be 3"),
    "phase": (lambda: DECODE(Q[:, :, 1:], FLAGS[:, 1:]), "is_landmark must close a block"),
    "odd": (
        lambda: DECODE(Q[..., :3], cache=M.init_landmark_cache(1, 2, 3, block_size=3, cache_blocks=2)),
        "head_dim must be even",
    ),
    "no_chunk": (lambda: DECODE(Q[:, :, :0], FLAGS[:, :0]), "at least one position"),
    "cache": (lambda: M.init_landmark_cache(1, 2, 4, block_size=3, cache_blocks=0), "cache_blocks must be"),
    "num_heads": (lambda: STREAM(num_heads=3), "num_heads must divide the width 8"),
    "chunks": (lambda: STREAM(chunk_lengths=(4, 3)), "sum to N=8"),
    "zero_chunk": (lambda: STREAM(chunk_lengths=(8, 0)), "must be positive"),
    "weights": (lambda: STREAM(PARAMS._replace(w_k=WIDE[:7])), r"w_k\.shape\[0\] = 7"),
    "full": (lambda: STORE.put(np.ones((2, 4, 3)), np.ones((2, 4, 3))), "the store is full"),
    "put": (lambda: STORE.put(np.ones((2, 3, 3)), np.ones((2, 4, 3))), "but must be 4"),
    "fetch": (lambda: STORE.fetch(np.array([[0], [1]])), r"indices must be in 0\.\.0"),
    "fetch_shape": (lambda: STORE.fetch(np.array([[0]])), "but must be 2"),
    "cost": (
        lambda: M.retrieval_cost(0, block_size=3, top_k=1, head_dim=4, num_heads=1),
        "context, head_dim, num_heads",
    ),
}

test_landmark_rejects_bad_input = rejects(BAD)
