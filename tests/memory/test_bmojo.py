"""B'MOJO: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects
from tests.memory import laws_bmojo

globals().update(law_tests(laws_bmojo))


@golden("bmojo")
def test_bmojo_golden_ref(case):
    run(case, ref.bmojo)


@graded("bmojo")
def test_bmojo_golden_gradients_ref(case):
    run_backward(case, ref.bmojo)


M = ref.bmojo
Q, K = np.ones((1, 4, 6, 4)), np.ones((1, 2, 6, 4))
SIX = (Q, K, K, Q, K, K)
X, PARAMS = np.ones((1, 6, 8)), M.init_bmojo(0, 8, heads=4, kv_heads=2, state=3)
MEMBERS = np.zeros((1, 6, 2), int)
CACHE = M.init_bmojo_cache(PARAMS, lead=(1,))
ARCHIVE = M.archive_add(None, 3, np.ones((2, 4)), np.ones((2, 4)))
attend = lambda **changes: M.bmojo_attention(**{
    "q": Q, "k": K, "v": K, "k_fading": K, "v_fading": K, "members": MEMBERS, "window": 2, **changes
})  # fmt: skip
BAD = {
    "window": (lambda: M.bmojo_fading_attention(*SIX, window=0), "window must be at least 1, got 0"),
    "heads": (lambda: attend(q=Q[:, :3]), "not a multiple of the Hkv=2"),
    "lengths": (lambda: attend(k=K[:, :, :5], v=K[:, :, :5]), r"k.shape\[2\] = 5, but axis T is 6"),
    "no_heads": (lambda: attend(q=Q[0, 0]), "q must have shape"),
    "fading_length": (lambda: attend(k_fading=K[:, :, :5]), r"k_fading.shape\[2\] = 5"),
    "fading_values": (lambda: attend(v_fading=K[:, :1]), r"v_fading.shape\[1\] = 1"),
    "fading_alone": (lambda: attend(v_fading=None), "must come together"),
    "fading_query": (lambda: attend(q_fading=Q[:, :2]), r"q_fading.shape\[1\] = 2"),
    "members": (lambda: attend(members=MEMBERS[:, :5]), r"members.shape\[1\] = 5, but axis T is 6"),
    "float_members": (lambda: attend(members=MEMBERS + 0.5), "members must be integers"),
    "extra_alone": (lambda: attend(extra_k=K), "extra_k and extra_v must come together"),
    "extra_mask": (
        lambda: attend(extra_k=K, extra_v=K, extra_mask=np.ones((6, 5), bool)),
        "does not broadcast",
    ),
    "extra_float": (lambda: attend(extra_k=K, extra_v=K, extra_mask=np.ones((6, 6))), "must be boolean"),
    "fading": (lambda: attend(fading="wide"), 'fading must be "window" or "strided"'),
    "stride": (lambda: attend(fading="strided", stride=0), "stride must be at least 1"),
    "scores": (lambda: M.innovation_scores(X, X[:, :5], np.eye(8)), r"y.shape\[1\] = 5"),
    "predictor": (lambda: M.innovation_scores(X, X, np.eye(7)), r"w_pred.shape\[0\] = 7"),
    "capacity": (
        lambda: M.eidetic_members(X[..., 0], window=2, capacity=-1),
        "capacity must not be negative",
    ),
    "select": (
        lambda: M.bmojo_layer(X, PARAMS, window=2, select="lru"),
        "select must be one of topk, threshold",
    ),
    "threshold": (lambda: M.bmojo_layer(X, PARAMS, window=2, select="threshold"), "needs a threshold"),
    "width": (lambda: M.bmojo_layer(X[..., :7], PARAMS, window=2), r"w_q.shape\[1\] = 8, but axis C is 7"),
    "untied": (lambda: M.bmojo_layer(X, PARAMS, window=2, tied=False), "tied=False needs"),
    "grouped": (
        lambda: M.bmojo_layer(X, PARAMS._replace(w_k=np.ones((3, 8, 2)), w_v=np.ones((3, 8, 2))), window=2),
        "not a multiple of the Hkv=3",
    ),
    "cache": (lambda: M.bmojo_step(np.ones((2, 8)), CACHE, PARAMS, window=2), "conv.shape"),
    "store": (
        lambda: M.bmojo_step(X[:, 0], CACHE, PARAMS, window=2, capacity=1),
        "but the cache has a store of 0",
    ),
    "n_r": (lambda: M.archive_lookup(ARCHIVE, np.ones((4, 4)), n_r=0), "n_r >= 1"),
    "query": (lambda: M.archive_lookup(ARCHIVE, np.ones((4, 3)), n_r=1), r"query.shape\[1\] = 3"),
    "init": (lambda: M.init_bmojo(0, 8, heads=3, kv_heads=1), "heads must divide the width"),
    "keys": (lambda: M.bmojo_keys(3, window=0, capacity=1), "window must be at least 1"),
}

test_bmojo_rejects_bad_input = rejects(BAD)
