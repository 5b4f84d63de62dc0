"""SmolLM2-135M in bfloat16, priced in the banks: `python -m tests.claims.hw_pim`. Shapes alone, no weights.

Writes docs/data/hw_pim.json: decode steps at two context lengths and a prefill on every PIM preset and on
the rooflines, with the shares that the banks take. Nothing is measured; the record keeps the book's build
free of JAX.
"""

import time

import jax
import jax.numpy as jnp

import hw
from accel.models.llama import decode_step, prefill
from hw.targets import preset
from ref.language.smollm2 import SmolLM2Config
from ref.models.llama import LlamaBlock, LlamaWeights
from tests.claims.record import store

FILES = (
    "hw/cpu.py",
    "hw/fusion.py",
    "hw/gpu.py",
    "hw/parts.py",
    "hw/pim.py",
    "hw/pim_cost.py",
    "hw/pim_cycles.py",
    "hw/pim_schedule.py",
    "hw/pim_parts.py",
    "hw/pim_place.py",
    "tests/claims/hw_pim.py",
)
TARGETS = ("gddr6_aim", "hbm2_pim", "hbm3_attacc", "pim_gpt", "h200", "a100", "xeon_8480")
CONTEXTS = (512, 2048)


def shapes(config):
    """The weights of the model as shapes."""
    f = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    n, d, q, kv, h = (
        config.depth, config.dim, config.heads * config.head_dim, config.kv_heads * config.head_dim,
        config.hidden,
    )  # fmt: skip
    sizes = {
        "attn_norm": (d,), "ffn_norm": (d,), "w_q": (d, q), "w_k": (d, kv), "w_v": (d, kv), "w_o": (q, d),
        "w_gate": (d, h), "w_up": (d, h), "w_down": (h, d),
    }  # fmt: skip
    blocks = LlamaBlock(**{name: f(n, *s) for name, s in sizes.items()})
    return LlamaWeights(f(config.vocab, d), blocks, f(d), f(config.context, config.head_dim // 2), f())


def programs(config):
    """{what runs: program}, weights and cache in the banks."""
    w = shapes(config)
    token, at = (jax.ShapeDtypeStruct((), jnp.int32) for _ in range(2))
    found = {}
    for n in CONTEXTS:
        cache = jax.ShapeDtypeStruct((config.depth, 2, config.kv_heads, n, config.head_dim), jnp.bfloat16)
        step = lambda weights, id, cache, position: decode_step(weights, id, cache, position)
        found[f"decode, context {n}"] = hw.trace(step, w, token, cache, at, weights=("weights", "cache"))
    ids = jax.ShapeDtypeStruct((CONTEXTS[0],), jnp.int32)
    found[f"prefill of {CONTEXTS[0]}"] = hw.trace(
        lambda weights, ids: prefill(weights, ids), w, ids, weights=("weights",)
    )
    return found


def price(program, target):
    """Figures of one program on one target, or why there are none."""
    start = time.perf_counter()
    try:
        r = hw.estimate(program, target)
    except (hw.UnsupportedPrimitive, hw.DoesNotFit) as why:
        return {"why_not": str(why)}
    levels = r.bytes_by_level
    banks = [c for c in r.by_op if c.busy_s.get("banks")]
    return {
        "us": r.seconds * 1e6,
        "mj": r.energy_j * 1e3,
        "bound_by": r.bound_by,
        "banks_mb": levels.get("banks", 0) / 1e6,
        "pins_mb": max((v for k, v in levels.items() if k not in ("banks", "sram")), default=0) / 1e6,
        "mac_share": sum(c.macs for c in banks) / r.macs,
        "priced_s": time.perf_counter() - start,
    }


def main():
    """Price everything and store it."""
    config = SmolLM2Config()
    rows = {what: {name: price(p, preset(name)) for name in TARGETS} for what, p in programs(config).items()}
    print(store("hw_pim", {"rows": rows}, FILES))


if __name__ == "__main__":
    main()
