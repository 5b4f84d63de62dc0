"""BigBird: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.blocks.transformer import QKVParams
from ref.models.bert import init_bert
from tests.attention import laws_bigbird
from tests.attention.house import to_house
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_bigbird))


@golden("bigbird")
def test_bigbird_golden_ref(case):
    run(case, ref.bigbird, build={"params": lambda tree: QKVParams(**to_house(tree))})


B = ref.bigbird
Q, X = np.ones((1, 2, 16, 3)), np.ones((1, 16, 4))
P = QKVParams(*(np.ones(s) for s in ((4, 4), 4) * 3))
RAND = B.bigbird_rand_blocks(np.random.default_rng(0).random((2, 6, 8)), num_rand=2)
MODEL = init_bert(np.random.default_rng(0), vocab=5, context=16, dim=4, depth=1)
attend = lambda **o: B.bigbird_attention(Q, Q, Q, **{"block_size": 2, **o})
with_block = lambda value: np.r_["-1", RAND[..., :1], np.full((2, 6, 1), value, np.int32)]
BAD = {
    "divide": (lambda: attend(block_size=3), "block_size must divide the 16 tokens .* `pad_to_blocks` pads"),
    "block": (lambda: attend(block_size=0), "block_size must divide"),
    "short": (lambda: attend(num_global_tokens=16), "block_size must divide the 0 tokens"),
    "method": (lambda: attend(method="roll"), 'method must be "blocked" or "dense"'),
    "mask": (lambda: attend(token_mask=np.ones(16, bool)), r"token_mask must be bool \[1, 16\]"),
    "mask_dtype": (lambda: attend(token_mask=np.ones((1, 16))), "got .* of float64"),
    "end": (lambda: attend(rand_blocks=with_block(0)), r"must be distinct, in 1\.\.6 and not i - 1, i or i"),
    "last": (lambda: attend(rand_blocks=with_block(7)), r"must be distinct, in 1\.\.6"),
    "window": (lambda: attend(rand_blocks=with_block(3)), "those are seen already"),
    "twice": (lambda: attend(rand_blocks=np.concatenate([RAND, RAND], axis=-1)), "must be distinct"),
    "rows": (lambda: attend(rand_blocks=RAND[:, 1:]), "integers .* nb - 2=6"),
    "floats": (lambda: attend(rand_blocks=RAND * 1.0), "rand_blocks must be integers"),
    "heads": (lambda: attend(rand_blocks=RAND[:1]), "rand_blocks must be .*H=2"),
    "batch": (lambda: attend(rand_blocks=np.stack([RAND, RAND])), r"broadcast\s+to \[1\]"),
    "cotangent": (lambda: B.bigbird_attention_bwd(Q[..., :2], Q, Q, Q, block_size=2), "axis D is 2 in do"),
    "keys": (lambda: B.bigbird_attention(Q, Q[..., :8, :], Q, block_size=2), r"k\.shape\[2\] = 8"),
    "few": (
        lambda: B.bigbird_rand_blocks(np.ones((1, 4, 6)), num_rand=2),
        "num_rand=2 needs that many .* 6 blocks are too few",
    ),
    "few_hf": (lambda: B.bigbird_rand_blocks(np.ones((1, 4, 6)), num_rand=2, plan="hf"), "too few"),
    "plan": (lambda: B.bigbird_rand_blocks(np.ones((1, 4, 6)), num_rand=1, plan="all"), "plan must be"),
    "uniforms": (lambda: B.bigbird_rand_blocks(np.ones((1, 5, 6)), num_rand=1), "= 5, but must be 4"),
    "layer_heads": (
        lambda: B.bigbird_self_attention(X, P, num_heads=3, block_size=2),
        "must divide the width 4",
    ),
    "layer_width": (lambda: B.bigbird_self_attention(X[..., :3], P, num_heads=2), "axis C is 3 in x"),
    "layer_mask": (
        lambda: B.bigbird_self_attention(X, P, num_heads=2, block_size=2, token_mask=np.ones((1, 15), bool)),
        r"token_mask must be bool \[1, 16\], got \[1, 15\]",
    ),
    "blocks": (lambda: B.bigbird_block_mask(0), "num_blocks >= 1"),
    "stats": (lambda: B.graph_stats(np.ones((2, 3))), r"block_mask\.shape\[1\] = 3, but axis nb is 2"),
    "cost": (lambda: B.bigbird_cost(16, 4, num_heads=3, block_size=2, num_rand=1), "num_heads to divide dim"),
    "pad": (lambda: B.pad_to_blocks(X, block_size=0), "block_size must be at least 1"),
    "encoder_mask": (
        lambda: B.bigbird_encoder(
            MODEL, np.zeros((1, 16), int), config=B.BigBirdConfig(2, 2), token_mask=np.ones((1, 16))
        ),
        r"token_mask must be bool \[1, 16\], got .* of float64",
    ),
    "pad_mask": (
        lambda: B.pad_to_blocks(X, block_size=3, axis=-2, token_mask=np.ones((1, 15), bool)),
        r"token_mask must be bool \[1, 16\]",
    ),
    "encoder": (
        lambda: B.bigbird_encoder(
            MODEL, np.zeros((1, 15), int), config=B.BigBirdConfig(2, block_size=2, num_rand=0)
        ),
        "block_size must divide the 15 tokens",
    ),
}

test_bigbird_rejects_bad_input = rejects(BAD)
