"""What four, three and two bits cost SmolLM2, and how fast it runs: `python -m tests.claims.smollm2`.

Needs `triptych fetch smollm2`, `triptych fetch plays` and scikit-learn. Writes docs/data/smollm2.json; with
--gpu, on one GPU, docs/data/smollm2_h200.json, speed only (and in bfloat16 and kept as bytes too).
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from accel.language import smollm2
from ref.blocks.formats import dequantize, quantize
from ref.language.smollm2 import SmolLM2Config, llama_costs
from ref.language.smollm2 import load_smollm2 as load_in_numpy
from tests.claims.record import store

FILES = (
    "ref/language/smollm2.py",
    "ref/models/llama.py",
    "ref/blocks/formats.py",
    "ref/blocks/bpe.py",
    "accel/models/llama.py",
    "accel/language/smollm2.py",
    "tests/claims/smollm2.py",
)
MATRICES = ("w_q", "w_k", "w_v", "w_o", "w_gate", "w_up", "w_down")
TOKENS = 512
# name -> (format or bits of an asymmetric group, whether the embedding too)
LADDER = {
    "4-bit groups": (4, False),
    "Q8_0": ("Q8_0", True),
    "Q4_0": ("Q4_0", False),
    "Q4_0, head too": ("Q4_0", True),
    "3-bit groups": (3, False),
    "2-bit groups": (2, False),
}


def regrouped(rows, bits, *, group=32):
    """Each group of a row on 2^bits levels from its least to its largest entry, scale and least float32."""
    x = np.asarray(rows, np.float32).reshape(-1, group)
    least = x.min(axis=-1, keepdims=True)
    d = (x.max(axis=-1, keepdims=True) - least) / np.float32(2**bits - 1)
    q = np.rint((x - least) / np.where(d == 0, 1, d))
    return (q * d + least).reshape(rows.shape)


def requantised(weights, how, *, head=False, group=32):
    """The weights with every matrix of the blocks (and the embedding) taken through a coarser format."""

    def through(rows):
        if isinstance(how, str):
            return dequantize(quantize(rows, kind=how), kind=how)
        return regrouped(rows, how, group=group)

    turned = lambda w: np.swapaxes(through(np.ascontiguousarray(np.swapaxes(w, -1, -2))), -1, -2)
    blocks = weights.blocks._replace(**{n: turned(np.asarray(getattr(weights.blocks, n))) for n in MATRICES})
    embed = through(np.asarray(weights.embed)) if head else weights.embed
    return weights._replace(blocks=blocks, embed=embed)


def ladder(ids, runs):
    """[{name, perplexity, kl, top1}] on the text ids; runs: name -> thunk of logits [T, V], the base first.

    kl: mean over positions of KL(base || run), in nats. top1: how often the likeliest token is the same.
    """
    target, base, rows = np.asarray(ids)[1:], None, []
    for name, logits in runs.items():
        lp = np.asarray(logits(), np.float64)
        lp -= lp.max(axis=-1, keepdims=True)
        lp -= np.log(np.exp(lp).sum(axis=-1, keepdims=True))
        base = lp if base is None else base
        rows.append(
            {
                "name": name,
                "perplexity": float(np.exp(-lp[np.arange(len(target)), target].mean())),
                "kl": float((np.exp(base) * (base - lp)).sum(axis=-1).mean()),
                "top1": float((lp.argmax(-1) == base.argmax(-1)).mean()),
            }
        )
    return rows


def texts():
    """{name: token ids}: 512 tokens of a data set's description, and of two plays."""
    from sklearn.datasets import load_breast_cancer

    from ref.fetch import fetch

    plays = fetch("plays")
    found = {
        "breast cancer description": load_breast_cancer().DESCR,
        "Macbeth": (plays / "tragedies" / "macbeth.md").read_text(encoding="utf-8"),
        "The Tempest": (plays / "romances" / "the-tempest.md").read_text(encoding="utf-8"),
    }
    return {name: smollm2.encode(text[: 8 * TOKENS])[:TOKENS] for name, text in found.items()}


def quality(weights):
    """{text: ladder} of the trained model in float32, and as it comes in a bfloat16 forward pass."""
    run = jax.jit(lambda w, ids: smollm2.forward(w, ids)[0])
    rows = {}
    for name, ids in texts().items():
        ids = jnp.asarray(ids, jnp.int32)
        logits = lambda w, dtype=jnp.float32, ids=ids: run(smollm2.to_device(w, dtype), ids)
        variant = lambda how, head, f=logits: f(requantised(weights, how, head=head))
        runs = {"as shipped": lambda f=logits: f(weights)}
        runs |= {n: lambda v=v, f=variant: f(*v) for n, v in LADDER.items()}
        runs["bfloat16 forward"] = lambda f=logits: f(weights, jnp.bfloat16)
        rows[name] = ladder(ids, runs)
        for r in rows[name]:
            print(f"{name:28}{r['name']:18}{r['perplexity']:12.2f}{r['kl']:9.4f}{r['top1']:7.3f}", flush=True)
    return rows


def seconds_each(call, state, n):
    """(median, best) seconds of n calls state -> state, each waited for."""
    took = []
    for _ in range(n):
        start = time.perf_counter()
        state = jax.block_until_ready(call(state))
        took.append(time.perf_counter() - start)
    return float(np.median(took)), min(took)


def bandwidth():
    """Bytes a second that this device reads: the sum of an array larger than any cache, best of five."""
    x = jnp.ones(1 << (30 if jax.default_backend() == "gpu" else 27), jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    return x.nbytes / seconds_each(lambda _: total(x), None, 5)[1]


def speed(forms):
    """Load, 32-token prefill and decode steps of each form, beside the bound bytes / bandwidth."""
    from accel.models.llama import _start, _step

    read = bandwidth()
    out = {"read_bytes_a_second": read, "forms": {}}
    prompt = np.zeros(64, np.int32)
    prompt[:32] = np.arange(100, 132)
    for name, options in forms.items():
        start = time.perf_counter()
        weights = jax.block_until_ready(smollm2.load_smollm2(**options))
        load = time.perf_counter() - start
        nbytes = sum(x.nbytes for n, x in zip(weights._fields, weights, strict=True)
                     if n in ("embed", "norm") for x in jax.tree.leaves(x))  # fmt: skip
        nbytes += sum(x.nbytes for x in jax.tree.leaves(weights.blocks))
        once = lambda _, w=weights: smollm2.prefill(w, prompt[:32])
        jax.block_until_ready(once(None))
        prefill, _ = seconds_each(once, None, 9)
        state = _start(weights, prompt, np.int32(32), length=64)
        step = lambda at, w=weights: (_step(w, np.int32(7), at[0][1], at[1]), at[1] + np.int32(1))
        state = jax.block_until_ready(step((state, np.int32(32))))
        decode, best = seconds_each(step, state, 16)
        row = {
            "weight_bytes": nbytes,
            "load_s": load,
            "prefill_tokens_a_second": 32 / prefill,
            "decode_tokens_a_second": 1 / decode,
            "decode_best_tokens_a_second": 1 / best,
            "bound_tokens_a_second": read / nbytes,
        }
        out["forms"][name] = row
        print(name, {k: round(v, 3) for k, v in row.items()})
    costs = llama_costs(SmolLM2Config(), context=32, n_in=1, kind="Q4_1", head_kind="Q8_0")
    out["file_bytes_a_token"] = costs["bytes"]
    out["file_bound_tokens_a_second"] = read / costs["bytes"]
    return out


def main():
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--gpu", action="store_true", help="speed on one GPU, stored beside the CPU's results"
    )
    if parser.parse_args().gpu:
        if jax.default_backend() != "gpu":
            parser.error("--gpu: JAX sees no GPU")
        forms = {
            "float32": {},
            "bfloat16": {"dtype": "bfloat16"},
            "Q4_1 and Q8_0 bytes": {"keep_quantized": True},
        }
        store("smollm2_h200", {"speed": speed(forms)}, FILES)
        return
    results = {"speed": speed({"float32": {}, "Q4_1 and Q8_0 bytes": {"keep_quantized": True}})}
    weights = load_in_numpy()
    store("smollm2", {**results, "tokens": TOKENS, "quality": quality(weights)}, FILES)


if __name__ == "__main__":
    main()
