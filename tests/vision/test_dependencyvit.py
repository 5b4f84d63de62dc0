"""DependencyViT: laws on ref, golden vectors, bad inputs."""

from dataclasses import replace

import numpy as np

import ref
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects
from tests.vision import laws_dependencyvit

globals().update(law_tests(laws_dependencyvit))

S = ref.dependencyvit


def attention_params(raw):
    """The golden files store linear weights [out, in], and q, k, v in one."""
    q, k, v = np.split(raw["w_qkv"], 3)
    biases = {n: raw.get(n) for n in ("b_gate1", "b_gate2")}
    if raw.get("b_qkv") is not None:
        biases |= dict(zip(("b_q", "b_k", "b_v"), np.split(raw["b_qkv"], 3), strict=True))
    gates = raw["w_select"].T, raw["w_gate1"].T, raw["w_gate2"].T
    return S.DependencyAttentionParams(q.T, k.T, v.T, raw["w_proj"].T, raw["b_proj"], *gates, **biases)


def block_params(raw):
    norms = {
        f"ln{i}_{new}": raw[f"ln{i}_{old}"] for i in (1, 2) for new, old in (("scale", "w"), ("bias", "b"))
    }
    maps = {"w_fc1": raw["w_fc1"].T, "b_fc1": raw["b_fc1"], "w_fc2": raw["w_fc2"].T, "b_fc2": raw["b_fc2"]}
    scales = {n: raw.get(n) for n in ("ls1", "ls2")}
    return S.DependencyBlockParams(attn=attention_params(raw["attn"]), **norms, **maps, **scales)


def stored(d):
    """DependencyAttentionParams in the golden's layout, by its names."""
    qkv = np.concatenate([d.w_q.T, d.w_k.T, d.w_v.T])
    b_qkv = None if d.b_q is None else np.concatenate([d.b_q, d.b_k, d.b_v])
    gates = {n: getattr(d, n).T for n in ("w_select", "w_gate1", "w_gate2")}
    biases = {"b_qkv": b_qkv, "b_proj": d.b_o, "b_gate1": d.b_gate1, "b_gate2": d.b_gate2}
    return {"w_qkv": qkv, "w_proj": d.w_o.T, **gates, **biases}


BUILD = {"params": lambda raw: block_params(raw) if "attn" in raw else attention_params(raw)}
BUILD |= {name: lambda w: w.T for name in ("w", "w1", "w2")}


def shown(case, result):
    """A list of counts is one output; gradients of parameters in the golden's layout."""
    if case.meta["fn"] == "dependencyvit_token_schedule":
        return (result,)
    return (*result[:2], stored(result[2])) if case.meta["fn"].endswith("_backward") else result


@golden("dependencyvit")
def test_dependencyvit_golden_ref(case):
    run(case, S, build=BUILD, outs=shown)


@graded("dependencyvit", always=("reversed_attention_layer",))
def test_dependencyvit_golden_gradients_ref(case):
    run_backward(case, S, build=BUILD, outs={"params": stored})


Q, K, V, P, M = laws_dependencyvit.heads(0)
X, ONES, LAYER = np.ones((2, 5, 12)), np.ones((2, 5)), laws_dependencyvit.layer(0)
CFG = S.DependencyViTConfig(8, 2, 12, 2, 3, 4)
NET, IMG = S.init_dependencyvit(np.random.default_rng(0), CFG), np.ones((1, 8, 8, 3))
RUN = lambda x=X, m=ONES, **o: S.reversed_attention_layer(x, m, LAYER, **{"num_heads": 3, **o})
BLOCK = lambda **o: S.dependency_block(X, ONES, NET.blocks[0], num_heads=3, **o)
MASK = np.ones((4, 4))
BAD = {
    "heads": (lambda: RUN(num_heads=5), "num_heads must divide the width 12"),
    "no_heads": (lambda: RUN(num_heads=0), "num_heads must divide"),
    "selector": (lambda: RUN(num_heads=4), r"w_select\.shape\[1\] = 3, but must be 4"),
    "cold": (lambda: RUN(temperature=0), "temperature must be positive, got 0"),
    "loud": (lambda: RUN(m=ONES * 1.5), r"message must be in \[0, 1\]"),
    "negative": (lambda: RUN(m=-ONES), r"message must be in \[0, 1\]"),
    "nan_message": (lambda: RUN(m=ONES * np.nan), r"message must be in \[0, 1\]"),
    "nan": (lambda: RUN(x=X * np.nan), "x must be finite"),
    "message_shape": (lambda: RUN(m=ONES[:, :4]), r"message_in\.shape\[1\] = 4, but axis N is 5"),
    "values": (lambda: S.reversed_attention(Q, K, V[:, :, :4]), r"v\.shape\[2\] = 4"),
    "head_weights": (
        lambda: S.reversed_attention(Q, K, V, head_weights=P[..., :2]),
        r"head_weights\.shape\[2\]",
    ),
    "message": (lambda: S.reversed_attention(Q, K, V, message=M + 1), r"message must be in \[0, 1\]"),
    "controller": (lambda: S.message_controller(X, np.ones((12, 6)), np.ones((6, 2))), "must be 1"),
    "prune": (lambda: BLOCK(prune_to=6), r"prune_to must be in 1\.\.5, got 6"),
    "prune_all": (lambda: BLOCK(prune_to=0), r"prune_to must be in 1\.\.5"),
    "score": (lambda: BLOCK(score="mass"), "score must be one of message, sent, received, got 'mass'"),
    "ratio": (lambda: S.dependencyvit_token_schedule(196, ratio=0.25), "ratio must be at least 0 and below"),
    "ratio_low": (lambda: S.dependencyvit_token_schedule(196, ratio=-0.1), "ratio must be at least 0"),
    "image": (lambda: S.dependencyvit_forward(IMG[:, :7], NET, CFG), "cannot be cut into patches"),
    "lite": (
        lambda: S.dependencyvit_forward(IMG, NET, replace(CFG, prune_layers=(1,), prune_ratio=0.99)),
        r"prune_to must be in 1\.\.16, got 0",
    ),
    "sizes": (lambda: S.init_dependencyvit(np.random.default_rng(0), replace(CFG, dim=10)), "2 num_heads"),
    "one_token": (lambda: S.dependency_tree(np.ones((1, 1))), "at least 2 nodes"),
    "no_token": (lambda: S.dependency_tree(np.ones((0, 0))), "at least 2 nodes"),
    "mask": (lambda: S.dependency_tree(np.ones((2, 3))), r"mask\.shape\[1\] = 3"),
    "mask_nan": (lambda: S.dependency_tree(MASK * np.nan), "score must be finite"),
    "root": (lambda: S.dependency_tree(MASK, root=4), r"root must be in 0\.\.3, got 4"),
    "method": (lambda: S.dependency_tree(MASK, method="prim"), "method must be"),
    "parts": (lambda: S.cut_tree(np.array([-1, 0]), 3), r"n_parts must be in 1\.\.2, got 3"),
    "loop": (lambda: S.tree_depth(np.array([-1, 2, 1])), "hold a cycle"),
    "two_roots": (lambda: S.subtree_sizes(np.array([-1, -1])), "with one -1, the root"),
    "parent": (lambda: S.tree_depth(np.array([-1, 5])), r"indices in 0\.\.1"),
}

test_dependencyvit_rejects_bad_input = rejects(BAD)


def test_dependencyvit_edges():
    """A single token, an empty batch, huge logits, everybody silent."""
    out, mask = S.reversed_attention(Q[:, :, :1], K[:, :, :1], V[:, :, :1], return_mask=True)
    np.testing.assert_allclose(out, V[:, :, :1], rtol=1e-15)
    np.testing.assert_allclose(mask, 3, rtol=1e-15)  # three heads without a selector: three messages
    assert RUN(x=X[:0], m=ONES[:0])[0].shape == (0, 5, 12)
    out, mask = S.reversed_attention(1e6 * Q, 1e6 * K, V, return_mask=True)
    np.testing.assert_array_equal(mask.sum(axis=-2), 3)  # each head to one receiver
    assert np.isfinite(out).all()
    out, message, mask = RUN(m=0 * ONES)
    np.testing.assert_array_equal(out, np.broadcast_to(LAYER.b_o, out.shape))
    assert not message.any()
    assert not mask.any()
