"""Laws of SmolLM2's architecture on ref alone: the tiny network, the costs, the tokenizer, the sampler."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.formats import dequantize
from ref.blocks.rope import rope, rope_angles
from ref.counting import Tally, count
from ref.language.smollm2 import (
    LlamaBlock,
    LlamaWeights,
    SmolLM2Config,
    candidate_logits,
    chat,
    decode,
    decode_step,
    encode,
    forward,
    generate,
    half_split,
    init_cache,
    llama_costs,
    prefill,
    sample,
    tiny_smollm2,
)

WEIGHTS, TOKENIZER = tiny_smollm2()
VOCAB, HEADS, KV, D = len(WEIGHTS.embed), 3, 1, 16
# Logits are sums over 48 products of numbers near 1 after two blocks: 1e-9 is a million roundings.
ATOL = 1e-9

seeds = st.integers(0, 2**32 - 1)


@st.composite
def texts(draw, least=1, most=10):
    """Token ids of the tiny network."""
    return np.array(draw(st.lists(st.integers(0, VOCAB - 1), min_size=least, max_size=most)))


def definition(w, ids):
    """Logits, one token and one head at a time, with rotated halves; shares no line with ref."""
    b, T = w.blocks, len(ids)
    order = np.concatenate([np.arange(0, D, 2), np.arange(1, D, 2)])  # adjacent pairs -> halves
    x = [w.embed[i] for i in ids]
    norm = lambda v, g: v / np.sqrt(np.dot(v, v) / len(v) + 1e-5) * g

    def turned(v, t):
        out = v[order].copy()
        for i in range(D // 2):
            angle = t * 10000.0 ** (-2 * i / D)
            a, c = v[order[i]], v[order[i + D // 2]]
            out[i], out[i + D // 2] = (
                a * np.cos(angle) - c * np.sin(angle),
                a * np.sin(angle) + c * np.cos(angle),
            )
        return out

    for l in range(2):
        h = [norm(v, b.attn_norm[l]) for v in x]
        keys = [turned(h[t] @ b.w_k[l], t) for t in range(T)]
        values = [v @ b.w_v[l] for v in h]
        for t in range(T):
            parts = []
            for head in range(HEADS):
                q = turned((h[t] @ b.w_q[l])[head * D : head * D + D], t)
                e = np.exp([q @ keys[s] / 4.0 for s in range(t + 1)])
                parts.append(sum(p * values[s] for s, p in enumerate(e / e.sum())))
            x[t] = x[t] + np.concatenate(parts) @ b.w_o[l]
            g = norm(x[t], b.ffn_norm[l])
            gate = g @ b.w_gate[l]
            x[t] = x[t] + (gate / (1 + np.exp(-gate)) * (g @ b.w_up[l])) @ b.w_down[l]
    return np.array([[norm(v, w.norm) @ e for e in w.embed] for v in x])


@given(texts(most=6))
def law_smollm2_equals_the_definition(ids):
    """Which rotates halves of reordered channels: the two layouts of rotary pairs give the same logits."""
    logits, _ = forward(WEIGHTS, ids)
    np.testing.assert_allclose(logits, definition(WEIGHTS, ids), rtol=0, atol=ATOL)


def law_smollm2_mixed_rotary_layouts_disagree():
    """Weights for halves under rotation of adjacent pairs: every logit is finite, and wrong."""
    ids = np.arange(8)
    right, wrong = forward(WEIGHTS, ids)[0], forward(half_split(WEIGHTS), ids)[0]
    np.testing.assert_allclose(wrong[0], right[0], rtol=0, atol=ATOL)  # position 0 does not turn
    assert np.abs(wrong[1:] - right[1:]).max() > 0.1


@given(texts(least=2), st.data())
def law_smollm2_prefill_equals_decode_steps(ids, data):
    """However the text is cut, the cache carries what the rest needs."""
    want, cache_of_all = forward(WEIGHTS, ids)
    cut = data.draw(st.integers(1, len(ids)))
    last, cache = prefill(WEIGHTS, ids[:cut])
    np.testing.assert_allclose(last, want[cut - 1], rtol=0, atol=ATOL)
    for t in range(cut, len(ids)):
        logits, cache = decode_step(WEIGHTS, ids[t], cache, t)
        np.testing.assert_allclose(logits, want[t], rtol=0, atol=ATOL)
    np.testing.assert_allclose(cache, cache_of_all, rtol=0, atol=ATOL)
    roomy = init_cache(WEIGHTS, 20)
    both, filled = forward(WEIGHTS, ids, cache=roomy)
    np.testing.assert_allclose(both, want, rtol=0, atol=ATOL)
    assert filled.shape[-2] == 20
    assert not roomy.any()  # the given cache is not touched


@given(texts(least=2), st.data())
def law_smollm2_is_causal(ids, data):
    """Another token at t leaves every logit before t the same, bit for bit."""
    t = data.draw(st.integers(1, len(ids) - 1))
    other = ids.copy()
    other[t] = (other[t] + 1) % VOCAB
    (a, _), (b, _) = forward(WEIGHTS, ids), forward(WEIGHTS, other)
    np.testing.assert_array_equal(a[:t], b[:t])
    assert (a[t] != b[t]).any()


@given(seeds, st.integers(0, 8000), st.integers(0, 180))
def law_smollm2_rotation_keeps_norms_and_sees_only_distance(seed, s, far):
    """|R_t q| = |q|, and <R_s q, R_t k> depends on t - s alone."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 64))
    turn = lambda v, t: rope(v[None], rope_angles([t], 64, base=100000.0))[0]
    np.testing.assert_allclose(np.linalg.norm(turn(q, s)), np.linalg.norm(q), rtol=1e-12)
    # An angle of up to 8192 radians is known to 1e-12, and the product has 64 terms of size near 1.
    np.testing.assert_allclose(turn(q, s) @ turn(k, s + far), q @ turn(k, far), rtol=0, atol=1e-9)


@given(texts(), seeds)
def law_smollm2_grouped_keys_equal_repeated_keys(ids, seed):
    """One key head serving three query heads is three equal key heads."""
    b = WEIGHTS.blocks
    repeated = WEIGHTS._replace(blocks=b._replace(w_k=np.tile(b.w_k, 3), w_v=np.tile(b.w_v, 3)))
    np.testing.assert_allclose(forward(WEIGHTS, ids)[0], forward(repeated, ids)[0], rtol=0, atol=ATOL)


@given(texts(most=6), st.integers(0, VOCAB - 1), seeds)
def law_smollm2_head_is_the_embedding(ids, i, seed):
    """Moving row i of the embedding moves logit i at every position and, with i not in the text, no other."""
    ids = np.where(ids == i, (i + 1) % VOCAB, ids)
    embed = WEIGHTS.embed.copy()
    step = np.random.default_rng(seed).standard_normal(embed.shape[1])
    embed[i] += step
    a, _, hidden = forward(WEIGHTS, ids, return_hidden=True)
    b, _ = forward(WEIGHTS._replace(embed=embed), ids)
    np.testing.assert_allclose(b[:, i] - a[:, i], hidden[-1] @ step, rtol=0, atol=ATOL)
    others = np.arange(VOCAB) != i
    np.testing.assert_array_equal(a[:, others], b[:, others])


@given(texts(), st.integers(1, 5), seeds)
def law_smollm2_candidates_are_entries_of_the_logits(ids, k, seed):
    """And their logsumexp is that of all."""
    logits, _ = forward(WEIGHTS, ids)
    candidates = np.random.default_rng(seed).integers(0, VOCAB, (len(ids), k))
    some, lse = candidate_logits(WEIGHTS, ids, candidates)
    np.testing.assert_allclose(some, np.take_along_axis(logits, candidates, axis=1), rtol=0, atol=ATOL)
    np.testing.assert_allclose(lse, np.log(np.exp(logits).sum(axis=1)), rtol=0, atol=ATOL)


@given(texts())
def law_smollm2_hidden_states_are_the_residual_stream(ids):
    """hidden[0] is the embedding, the last the final norm, which the head turns into logits."""
    logits, _, hidden = forward(WEIGHTS, ids, return_hidden=True)
    assert hidden.shape == (4, len(ids), 48)
    np.testing.assert_array_equal(hidden[0], WEIGHTS.embed[ids])
    np.testing.assert_allclose(hidden[-1] @ WEIGHTS.embed.T, logits, rtol=0, atol=ATOL)
    last = prefill(WEIGHTS, ids, return_hidden=True)[2]
    np.testing.assert_allclose(last, hidden[:, -1], rtol=0, atol=ATOL)


@given(seeds)
def law_smollm2_q4_1_has_sixteen_values_a_block(seed):
    """All between m and m + 15 d, up to one rounding of float32."""
    raw = np.random.default_rng(seed).integers(0, 256, (5, 20), dtype=np.uint8)
    raw[:, 1::20] &= 0x3F  # a finite positive scale
    raw[:, 3::20] &= 0xBF  # a finite minimum
    values = dequantize(raw, kind="Q4_1")
    d, m = (np.ascontiguousarray(raw[:, i : i + 2]).view("<f2").astype(np.float64)[:, 0] for i in (0, 2))
    slack = np.finfo(np.float32).eps * (np.abs(m) + 15 * d)
    for row, least, most in zip(values, m - slack, m + 15 * d + slack, strict=True):
        assert len(np.unique(row)) <= 16
        assert least <= row.min()
        assert row.max() <= most


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.booleans())
def law_smollm2_decode_inverts_encode(text, special):
    """On every text without lone surrogates, special tokens included."""
    for s in (text, f"<|im_start|>{text}<|im_end|>"):
        assert decode(encode(s, special=special, tokenizer=TOKENIZER), tokenizer=TOKENIZER) == s


@given(st.text("0123456789", max_size=20))
def law_smollm2_every_digit_is_a_token(digits):
    """A number of n digits is n tokens, so that arithmetic sees places."""
    assert len(encode(digits, tokenizer=TOKENIZER)) == len(digits)


@given(st.lists(st.text("ab \n<|>", max_size=6), max_size=4), st.booleans())
def law_smollm2_chat_joins_turns(contents, prompt):
    """Each message between its marks, a system message in front unless the first is one."""
    messages = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, contents, strict=False)]
    own = {"role": "system", "content": "Be brief."}
    turn = lambda m: "<|im_start|>" + m["role"] + "\n" + m["content"] + "<|im_end|>\n"
    end = "<|im_start|>assistant\n" if prompt else ""
    want = "".join(map(turn, [own, *messages])) + end
    assert chat([own, *messages], add_generation_prompt=prompt) == want
    given_by_us = chat(messages, add_generation_prompt=prompt)
    assert given_by_us.endswith("".join(map(turn, messages)) + end)
    assert given_by_us.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM") == bool(
        messages
    )


@given(seeds, st.floats(0.1, 3.0), st.integers(0, 12), st.floats(0.05, 1.0))
def law_smollm2_sampling_inverts_the_distribution(seed, temperature, top_k, top_p):
    """Uniform numbers spread over [0, 1) come out with the probabilities that the cuts leave."""
    rng = np.random.default_rng(seed)
    logits = rng.permutation(12) / 3.0  # no ties
    p = np.exp(logits / temperature)
    p[np.argsort(-logits)[top_k or 12 :]] = 0
    order = np.argsort(-p)
    share = p[order] / p.sum()
    keep = 1 + int(np.searchsorted(np.cumsum(share), top_p * (1 - 1e-12)))  # fewest that hold top_p
    p[order[keep:]] = 0
    n = 400
    drawn = [
        sample(logits, (i + 0.5) / n, temperature=temperature, top_k=top_k, top_p=top_p) for i in range(n)
    ]
    # A grid of n points meets each interval's length to within one point.
    np.testing.assert_allclose(np.bincount(drawn, minlength=12) / n, p / p.sum(), rtol=0, atol=1.01 / n)


@given(texts(most=5), seeds, st.integers(0, 8))
def law_smollm2_generation_is_greedy_seeded_and_stops(ids, seed, n):
    """Greedy ignores the seed, equals arg max step by step, and stops after a stop token."""
    seen = []
    tokens = generate(WEIGHTS, ids, max_new_tokens=n, seed=seed, stop=(), on_token=seen.append)
    assert seen == tokens.tolist()
    text = list(ids)
    for t in tokens:
        assert t == forward(WEIGHTS, np.array(text))[0][-1].argmax()
        text.append(t)
    warm = [generate(WEIGHTS, ids, max_new_tokens=n, temperature=0.9, seed=seed, stop=()) for _ in range(2)]
    assert warm[0].tolist() == warm[1].tolist()
    if n:
        first = generate(WEIGHTS, ids, max_new_tokens=n, stop=(tokens[0],))
        assert first.tolist() == [tokens[0]]


def law_smollm2_costs_are_those_of_the_file():
    """134,515,008 parameters in 96,576,768 bytes: 5.74 bits each; 46,080 bytes of cache a token."""
    costs = llama_costs(SmolLM2Config(), context=0, n_in=1, kind="Q4_1", head_kind="Q8_0")
    assert costs["parameters"] == 134_515_008
    assert costs["weight_bytes"] == 96_576_768
    assert costs["head_bytes"] == 30_081_024
    assert costs["block_bytes"] == 2_211_840
    assert costs["cache_bytes_per_token"] == 46_080
    assert round(8 * costs["weight_bytes"] / costs["parameters"], 2) == 5.74
    assert round(costs["flops"] / 1e9, 3) == 0.269


@given(st.integers(0, 6))
def law_smollm2_costs_equal_counted_work(context):
    """The multiply-accumulates of a decode step, counted by the array itself, are the closed form's."""
    tally = Tally()
    b = LlamaBlock(*(count(tally, w) for w in WEIGHTS.blocks))
    w = LlamaWeights(count(tally, WEIGHTS.embed), b, *(count(tally, x) for x in WEIGHTS[2:]))
    cache = init_cache(WEIGHTS, context)
    tally.macs = 0
    forward(w, np.array([5]), cache=cache, position=context)
    config = SmolLM2Config(
        vocab=VOCAB, dim=48, depth=2, heads=3, kv_heads=1, head_dim=16, hidden=96, context=64
    )
    assert tally.macs == llama_costs(config, context=context, n_in=1, kind="F32")["macs"]


@given(st.integers(0, 100), st.integers(1, 50), st.integers(1, 50))
def law_smollm2_costs_add_up(context, a, b):
    """Two calls do the work of one; head, weights and the cache so far are taken again by the second."""
    c = SmolLM2Config()
    one = llama_costs(c, context=context, n_in=a + b)
    first, second = llama_costs(c, context=context, n_in=a), llama_costs(c, context=context + a, n_in=b)
    assert first["macs"] + second["macs"] == one["macs"] + c.vocab * c.dim
    assert first["attention_macs"] + second["attention_macs"] == one["attention_macs"]
    again = one["weight_bytes"] + (context + a) * one["cache_bytes_per_token"]
    assert first["bytes"] + second["bytes"] == one["bytes"] + again


def law_smollm2_answers_of_the_exercises():
    """50 GB/s give 517 tokens a second from the file, 93 from float32; the cache wins from 2,096 tokens."""
    file, whole = (
        llama_costs(SmolLM2Config(), context=0, n_in=1, kind=kind, head_kind=head)
        for kind, head in (("Q4_1", "Q8_0"), ("F32", "F32"))
    )
    assert [round(50e9 / k["bytes"]) for k in (file, whole)] == [517, 93]
    assert -(-file["weight_bytes"] // file["cache_bytes_per_token"]) == 2096
