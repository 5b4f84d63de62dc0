"""The llama family: accel against ref on a tiny network, gradients, and small files of the family."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import accel.models.llama as accel_llama
from accel.language.smollm2 import load_smollm2 as load_on_device
from ref.blocks.bpe import Tokenizer
from ref.language.smollm2 import load_smollm2, tiny_smollm2
from ref.models import llama
from ref.models.gguf import load_gguf
from tests.models.gguf_bytes import gguf_bytes, llama_file
from tests.slopes import slope_of

WEIGHTS, _ = tiny_smollm2()
IDS = np.array([5, 17, 260, 3, 3, 40, 271, 99, 0, 12], np.int32)
# Float32 through two blocks: sums of at most 96 products, logits of size 20: 1e-4 is 80 ulps of the largest.
ATOL32 = 1e-4


@cache
def both():
    """The tiny network on the device, the same numbers in float64, and ref's answers on the whole text."""
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float32).astype(np.float64), WEIGHTS)
    return accel_llama.to_device(WEIGHTS), rounded, llama.forward(rounded, IDS, return_hidden=True)


def near(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=ATOL32)


def test_models_llama_decodes_as_ref_and_never_clamps():
    """Steps through a cache with room equal ref's logits; one without room grows; a position that does not
    fit gives NaN instead of a number from the wrong place.
    """
    device, _, (want, want_cache, _) = both()
    held = accel_llama.init_cache(device, 64)
    for t in range(3):
        logits, held = accel_llama.decode_step(device, IDS[t], held, t)
        near(logits, want[t])
    near(held[..., :3, :], want_cache[..., :3, :])
    logits, grown = accel_llama.decode_step(device, IDS[3], held[..., :3, :], 3)
    near(logits, want[3])
    assert grown.shape[-2] == 64
    beyond, _, _ = accel_llama._forward(device, IDS[3:4], grown, jnp.int32(64), return_hidden=False)
    assert np.isnan(beyond).all()


def test_models_llama_is_exact_under_x64():
    """With float64 weights a decode step is ref's, whatever integers ids and positions come in."""
    _, rounded, (want, want_cache, _) = both()
    with jax.enable_x64(True):
        device = accel_llama.to_device(rounded, jnp.float64)
        held = accel_llama.init_cache(device, 12).at[..., :9, :].set(want_cache[..., :9, :])
        logits, _ = accel_llama.decode_step(device, np.int64(IDS[9]), held, np.int32(9))
        assert logits.dtype == jnp.float64
        np.testing.assert_allclose(logits, want[9], rtol=0, atol=1e-9)


def test_models_llama_prefills_scores_and_generates_as_ref():
    device, rounded, (want, want_cache, want_hidden) = both()
    logits, held, hidden = accel_llama.prefill(device, IDS, return_hidden=True)
    near(logits, want[-1])
    near(held, want_cache)
    near(hidden, want_hidden[:, -1])
    np.testing.assert_array_equal(accel_llama.prefill(device, IDS.tolist(), return_hidden=True)[0], logits)
    np.testing.assert_array_equal(llama.forward(rounded, IDS.tolist())[0], want)
    candidates = np.arange(30).reshape(10, 3)
    for got, expected in zip(
        accel_llama.candidate_logits(device, IDS, candidates),
        llama.candidate_logits(rounded, IDS, candidates),
        strict=True,
    ):
        near(got, expected)
    for options in ({}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3}):
        seen, options = [], {"max_new_tokens": 6, "stop": (), **options}
        got = accel_llama.generate(device, IDS, on_token=seen.append, **options)
        assert seen == got.tolist()
        np.testing.assert_array_equal(got, llama.generate(rounded, IDS, **options))


def test_models_llama_gradient_is_the_slope_of_ref():
    """<gradient, direction> over all weights against the central difference of ref in float64."""
    device, rounded, _ = both()
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: rng.standard_normal(x.shape) * np.abs(x).max(), rounded)
    direction = direction._replace(angles=0 * rounded.angles, eps=0 * rounded.eps)
    pull = rng.standard_normal((10, len(WEIGHTS.embed)))
    at = lambda h: np.sum(
        pull * llama.forward(jax.tree.map(lambda w, d: w + h * d, rounded, direction), IDS)[0]
    )
    slope, change = slope_of(at)
    loss = lambda w: jnp.sum(jnp.asarray(pull, jnp.float32) * accel_llama.forward(w, IDS)[0])
    terms = jax.tree.map(
        lambda g, d: np.asarray(g, np.float64) * d, jax.jit(jax.grad(loss))(device), direction
    )
    got, size = (sum(np.sum(f(t)) for t in jax.tree.leaves(terms)) for f in (lambda t: t, np.abs))
    # 64 ulps of the terms added up, and what doubling the step changes
    atol = 64 * np.finfo(np.float32).eps * size + 2 * change
    np.testing.assert_allclose(got, slope, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "small.gguf"
    path.write_bytes(gguf_bytes(*llama_file(np.random.default_rng(0))))
    return path


def test_models_llama_loads_a_file_as_matrices_or_as_bytes(small_file):
    """The same logits either way, in ref and accel."""
    plain, kept = load_smollm2(small_file), load_smollm2(small_file, keep_quantized=True)
    assert plain.blocks.w_q.dtype == np.float32
    assert plain.blocks.w_down.shape == kept.blocks.w_down.shape == (2, 96, 64)
    assert kept.blocks.w_down.raw.nbytes * 32 == plain.blocks.w_down.size * 20
    ids, candidates = np.arange(4), np.arange(8).reshape(4, 2)
    want = llama.forward(plain, ids)[0]
    np.testing.assert_allclose(llama.forward(kept, ids)[0], want, rtol=0, atol=1e-10)
    for a, b in zip(*(llama.candidate_logits(w, ids, candidates) for w in (plain, kept)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
    assert load_smollm2(small_file, dtype="float64").blocks.w_q.dtype == np.float64
    near(accel_llama.prefill(load_on_device(small_file, keep_quantized=True), ids)[0], want[-1])
    narrow = load_on_device(small_file, dtype="bfloat16")
    assert narrow.blocks.w_q.dtype == jnp.bfloat16
    assert narrow.blocks.attn_norm.dtype == narrow.angles.dtype == jnp.float32


def test_models_llama_names_what_is_wrong_with_a_file(tmp_path):
    def load(change, **options):
        metadata, tensors = llama_file(np.random.default_rng(0), depth=1)
        change(metadata, tensors)
        path = tmp_path / "file.gguf"
        path.write_bytes(gguf_bytes(metadata, tensors))
        return load_smollm2(path, **options)

    def swap(metadata, tensors):
        tensors["blk.0.attn_q.weight"] = tensors["blk.0.attn_k.weight"]

    for change, words in (
        (lambda m, t: m.update({"general.architecture": "gpt2"}), "architecture 'gpt2', not 'llama'"),
        (lambda m, t: m.pop("llama.block_count"), "no 'llama.block_count'"),
        (lambda m, t: t.pop("blk.0.ffn_up.weight"), "no tensor 'blk.0.ffn_up.weight'"),
        (swap, r"attn_q.weight has shape \[32, 64\], but the configuration says \[64, 64\]"),
        (lambda m, t: t.update({"output.weight": t["token_embd.weight"]}), "head of its own"),
        (
            lambda m, t: m.update({"llama.context_length": 2**31}),
            r"context must be an integer in 1\.\.1048576",
        ),
        (lambda m, t: m.update({"llama.block_count": "two"}), "depth must be an integer"),
        (lambda m, t: m.update({"llama.rope.freq_base": 0.0}), "rope_base must be a positive number"),
        (lambda m, t: m.update({"llama.attention.head_count_kv": 3}), "multiple of kv_heads"),
    ):
        with pytest.raises(ValueError, match=words):
            load(change)
    with pytest.raises(ValueError, match='dtype must be "float32" or "float64"'):
        load(lambda m, t: None, dtype="bfloat16")
    with pytest.raises(ValueError, match='dtype must be "float32", "bfloat16" or "float64"'):
        load_on_device(tmp_path / "file.gguf", dtype="float16")


TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.unknown_token_id": 0,
}
METADATA, TENSORS = llama_file(
    np.random.default_rng(0), depth=1, dim=32, heads=2, kv_heads=1, hidden=32, vocab=8
)
GOOD = gguf_bytes(METADATA | TOKENIZER, TENSORS)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
@example(0, 0)
def test_models_llama_survives_corrupted_files(tmp_path_factory, seed, n):
    """Random bytes in the head of a file: weights and tokenizer load, or a ValueError says why not."""
    rng = np.random.default_rng(seed)
    content = bytearray(GOOD)
    for at in rng.integers(0, GOOD.index(b"token_embd") + 300, n):
        content[at] = rng.choice([0, 1, 2, 8, 9, 255, rng.integers(256)])
    path = tmp_path_factory.mktemp("llama") / "file"
    path.write_bytes(content)
    load_tokenizer = lambda path: Tokenizer.from_gguf(load_gguf(path)).encode("abab<e>").tolist()
    for load in (load_smollm2, load_tokenizer):
        try:
            got = load(path)
        except ValueError:
            assert n
        else:
            assert n or got == [2, 2, 3] or got.embed.shape == (8, 32)
