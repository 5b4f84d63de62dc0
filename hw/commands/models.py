"""Models that `triptych price` knows by name: shapes alone, no weights are fetched."""

import difflib

from hw.commands.shared import Refusal

PHASES = ("prefill", "decode")


def model_programs(name, phase, context, dtype):
    """{label: op program} of a model's phase, or of both for "": the prompt of `context` tokens, or one token
    after a cache of that length. Weights and cache lie in the memory of the device.
    """
    import hw

    if phase and phase not in PHASES:
        near = difflib.get_close_matches(phase, PHASES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {' and '.join(PHASES)}"
        raise Refusal(f"{name} has no {phase!r}; {hint}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise Refusal(f"--dtype must be f32, bf16 or f16 for {name}, got {dtype!r}")
    make = MODELS[name](context, dtype)
    return {
        f"{p} of {context}" if p == "prefill" else f"decode after {context}": hw.trace(*call, weights=weights)
        for p, (call, weights) in make.items()
        if phase in ("", p)
    }


def _smollm2(context, dtype):
    import jax
    import jax.numpy as jnp

    from accel.models.llama import decode_step, prefill
    from ref.language.smollm2 import SmolLM2Config
    from ref.models.llama import LlamaBlock, LlamaWeights

    c = SmolLM2Config()
    if not 1 <= context <= c.context:
        raise Refusal(f"--context must be in 1..{c.context} for smollm2, got {context}")
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    integer = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    n, d, q, kv, h = c.depth, c.dim, c.heads * c.head_dim, c.kv_heads * c.head_dim, c.hidden
    blocks = LlamaBlock(
        attn_norm=array(n, d), ffn_norm=array(n, d), w_q=array(n, d, q), w_k=array(n, d, kv),
        w_v=array(n, d, kv), w_o=array(n, q, d), w_gate=array(n, d, h), w_up=array(n, d, h),
        w_down=array(n, h, d),
    )  # fmt: skip
    weights = LlamaWeights(array(c.vocab, d), blocks, array(d), array(c.context, c.head_dim // 2), array())
    cache = array(n, 2, c.kv_heads, context, c.head_dim)
    first = lambda weights, ids: prefill(weights, ids)
    step = lambda weights, id, cache, position: decode_step(weights, id, cache, position)
    return {
        "prefill": ((first, weights, integer(context)), ("weights",)),
        "decode": ((step, weights, integer(), cache, integer()), ("weights", "cache")),
    }


MODELS = {"smollm2": _smollm2}
