"""GTrXL: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.blocks.relative import RelativeParams
from ref.memory.gtrxl import GateParams, GTrXLBlockParams, GTrXLParams
from ref.tasks.environments import MemoryLength
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects
from tests.memory import laws_gtrxl

globals().update(law_tests(laws_gtrxl))


def attention_of(raw):
    """The house's tree from columns of keys and values side by side."""
    k, v = np.split(raw["w_kv"], 2, axis=-1)
    b_k, b_v = (None, None) if raw.get("b_kv") is None else np.split(raw["b_kv"], 2)
    same = {n: raw.get(n) for n in ("w_q", "w_r", "w_o", "b_q", "b_r", "b_o")}
    return RelativeParams(w_k=k, w_v=v, b_k=b_k, b_v=b_v, **same)


def block_of(raw):
    gates = {n: None if raw.get(n) is None else GateParams(**raw[n]) for n in ("gate_attn", "gate_mlp")}
    return GTrXLBlockParams(**{**raw, **gates, "attn": attention_of(raw["attn"])})


BUILD = {
    "gate": {},
    "relative_attention": {"params": attention_of},
    "gtrxl_block": {"params": block_of},
    "gtrxl": {
        "params": lambda raw: GTrXLParams(
            **{"w_embed": None, "b_embed": None, **raw, "blocks": tuple(block_of(b) for b in raw["blocks"])}
        )
    },
}


@golden("gtrxl")
def test_gtrxl_golden_ref(case):
    run(case, ref.gtrxl, build=BUILD.get(case.meta["fn"]))


@graded("gtrxl", only=("gate",))
def test_gtrxl_golden_gradients(case):
    run_backward(case, ref.gtrxl)


G = ref.gtrxl
P = G.init_gtrxl(0, inputs=3, width=6, layers=2, heads=2, head_dim=4)
X, M = np.ones((2, 5, 3)), G.init_memory(2, layers=2, length=4, width=6)
E, A, FLAT = np.ones((2, 5, 6)), P.blocks[0].attn, np.zeros((2, 4))
SHARED = {"heads": 2, "u": FLAT, "v_bias": FLAT}
LOGITS, ONES, ACT = np.ones((2, 5, 3)), np.ones((2, 5)), np.zeros((2, 5), int)


def loss(logits=LOGITS, target=LOGITS, values=ONES, actions=ACT, returns=ONES, eta=1.0, alpha=1.0, **options):
    return G.vmpo_loss(logits, target, values, actions, returns, eta, alpha, **options)


def train(**options):
    agent = G.gtrxl_agent(width=4, layers=1, heads=1, head_dim=4)
    return G.train_agent(0, MemoryLength(1), agent, **{"steps": 1, **options})


BAD = {
    "kind": (lambda: G.gate(E, E, None, kind="lstm"), "gate must be one of"),
    "no_gate": (lambda: G.gate(E, E, None), "params must hold the weights"),
    "field": (lambda: G.gate(E, E, G.GateParams(), kind="output"), r"params\.w is None"),
    "field_shape": (lambda: G.gate(E, E, G.init_gate(0, 5)), r"params\.w_r\.shape\[0\] = 5"),
    "stream": (lambda: G.gate(E, X, None, kind=None), r"y\.shape\[2\] = 3"),
    "odd": (
        lambda: G.relative_attention(np.ones((1, 2, 5)), np.ones((1, 0, 5)), A, **SHARED),
        "x must have an even width",
    ),
    "heads": (
        lambda: G.relative_attention(E, E, A, heads=1, u=FLAT, v_bias=FLAT),
        "u must have heads=1 rows",
    ),
    "query": (lambda: G.relative_attention(E, E, A, query=E[:, :4], **SHARED), r"query\.shape\[1\] = 4"),
    "mask": (
        lambda: G.relative_attention(E, E, A, mask=np.ones((2, 5, 10)), **SHARED),
        "mask must be boolean",
    ),
    "mask_rows": (
        lambda: G.relative_attention(E, E, A, mask=np.ones((3, 5, 10), bool), **SHARED),
        r"mask\.shape\[0\] must be 1 or B=2",
    ),
    "mask_keys": (lambda: G.relative_attention(E, E, A, mask=np.ones((2, 5, 5), bool), **SHARED), "mask"),
    "shift": (lambda: G.relative_shift(np.ones((5, 4))), "at least T=5 columns"),
    "norm": (lambda: G.gtrxl(X, M, P, heads=2, norm="batch"), "norm must be one of"),
    "gate": (lambda: G.gtrxl(X, M, P, heads=2, gate="lstm"), "gate must be one of"),
    "layers": (
        lambda: G.gtrxl(X, G.init_memory(2, layers=1, length=4, width=6), P, heads=2),
        "a row for each of 2 layers",
    ),
    "batch": (lambda: G.gtrxl(X[:1], M, P, heads=2), r"slots\.shape\[0\] = 2"),
    "valid": (lambda: G.gtrxl(X, M._replace(valid=np.ones((2, 4))), P, heads=2), "valid must be boolean"),
    "done": (lambda: G.gtrxl(X, M, P, heads=2, done=np.zeros((2, 5))), "done must be boolean"),
    "done_shape": (lambda: G.gtrxl(X, M, P, heads=2, done=np.zeros((2, 4), bool)), r"done\.shape\[1\] = 4"),
    "length": (lambda: G.init_memory(2, layers=1, length=-1, width=6), "length must not be negative"),
    "init_odd": (
        lambda: G.init_gtrxl(0, inputs=3, width=5, layers=1, heads=1, head_dim=4),
        "width must be even",
    ),
    "top": (lambda: loss(top=0.0), r"top must be in \(0, 1\]"),
    "top_high": (lambda: loss(top=1.5), r"top must be in \(0, 1\]"),
    "eta": (lambda: loss(eta=0.0), "eta and alpha must be positive"),
    "actions": (lambda: loss(actions=ACT[:, :4]), r"actions\.shape\[1\] = 4"),
    "action": (lambda: loss(actions=ACT + 3), r"actions must be in 0\.\.2"),
    "target": (lambda: loss(target=LOGITS[..., :2]), r"target_logits\.shape\[2\] = 2"),
    "nothing": (lambda: loss(*(x[:0] for x in (LOGITS, LOGITS, ONES, ACT, ONES))), "at least one step"),
    "loss": (lambda: train(loss="sarsa"), "loss must be one of"),
    "steps": (lambda: train(steps=0), "must be at least 1"),
}

test_gtrxl_rejects_bad_input = rejects(BAD)
