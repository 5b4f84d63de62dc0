"""What int8 costs two trained networks, with and without planted outliers: `python -m tests.claims.llm_int8`.

Needs `triptych fetch` of smollm2, plays, minilm, minilm_int8, lee and wordsim. About ten minutes on two
cores; writes docs/data/llm_int8.json. The race on a GPU is in llm_int8_gpu.py.
"""

import argparse
from dataclasses import dataclass, field

import numpy as np

from ref.blocks.norms import rms_norm
from ref.blocks.transformer import BlockParams
from ref.compression.llm_int8 import (
    convert_linear,
    int8_linear_bytes,
    llm_int8_linear,
    outlier_feature_stats,
    quantization_ladder,
    quantize_rowwise,
)
from ref.dims import float64
from ref.metrics import pearson, spearman
from tests.claims.record import store
from tests.claims.smollm2 import MATRICES, ladder

FILES = (
    "ref/compression/llm_int8.py",
    "ref/blocks/quantize.py",
    "ref/models/minilm.py",
    "ref/metrics.py",
    "tests/claims/llm_int8.py",
)
TOKENS = 256
PLANTED, FACTOR = 6, 50.0  # features of each norm, and what they are multiplied by
SCHEMES = {"absmax": "absmax", "zeropoint": "zeropoint", "row-wise": "row", "vector-wise": "vector"}
MAIN = "LLM.int8()"
ONLY = "LLM.int8(), int8 weights alone"
WHOLE = "LLM.int8(), whole columns apart"  # the same float columns, but none of their elements sets a scale
THRESHOLDS = (1.0, 2.0, 4.0, 6.0, 10.0, 20.0, 60.0)


@dataclass
class Share:
    """Multiply-adds in float and in all, added up over every product made."""

    floats: int = 0
    all: int = 0


@dataclass
class Rung:
    """A matrix [in, out], or a stack [n, in, out] of them, that multiplies as a rung of the ladder does.

    Where a network of `ref` computes x @ w, w may be a Rung. converted holds the int8 layers by index.
    """

    w: np.ndarray
    name: str
    threshold: float
    converted: dict
    share: Share = field(default_factory=Share)
    index: int = 0
    __array_ufunc__ = None  # NumPy leaves x @ Rung to the Rung

    @property
    def shape(self):
        return self.w.shape

    @property
    def dtype(self):
        return self.w.dtype

    def __getitem__(self, l):
        return Rung(self.w[l], self.name, self.threshold, self.converted, self.share, l)

    def __rmatmul__(self, x):
        if self.name in SCHEMES:
            return quantization_ladder(x, self.w.T, scheme=SCHEMES[self.name])
        if self.index not in self.converted:
            self.converted[self.index] = convert_linear(self.w.T, keep_float=True)
        layer = self.converted[self.index]
        if self.name == ONLY:
            layer = layer._replace(float_weight=None)
        mask = quantize_rowwise(x, threshold=self.threshold)[2]
        self.share.floats += int(mask.sum()) * x.size // x.shape[-1]
        self.share.all += x.size
        if self.name == WHOLE:
            return llm_int8_linear(np.where(mask, 0.0, x), layer, threshold=0.0) + x[..., mask] @ self.w[mask]
        return llm_int8_linear(x, layer, threshold=self.threshold)


def rungs(sweep=()):
    """{name: (what a Rung is called, threshold)} of the ladder, then LLM.int8() at thresholds of sweep."""
    found = {name: (name, 0.0) for name in SCHEMES}
    found |= {MAIN: (MAIN, 6.0), ONLY: (ONLY, 6.0), WHOLE: (WHOLE, 6.0)}
    return found | {f"{MAIN} at {t:g}": (MAIN, t) for t in sweep}


# The language model.


def plant_llama(weights, *, count=PLANTED, factor=FACTOR, seed=0):
    """The same function with outliers: gains of `count` features up, the rows of the next matrices down."""
    rng, b = np.random.default_rng(seed), weights.blocks
    depth, d = b.attn_norm.shape
    scale = np.ones((depth, d))
    for row in scale:
        row[rng.choice(d, count, replace=False)] = factor
    down = lambda w: float64(w) / scale[..., None]
    blocks = b._replace(
        attn_norm=b.attn_norm * scale,
        ffn_norm=b.ffn_norm * scale,
        **{n: down(getattr(b, n)) for n in ("w_q", "w_k", "w_v", "w_gate", "w_up")},
    )
    return weights._replace(blocks=blocks)


def llama_runs(weights, forward, sweep=()):
    """{name: thunk of logits}, the float network first, and {name: Share} that fills as they run."""
    converted = {n: {} for n in MATRICES}
    runs, shares = {"float": lambda: forward(weights)}, {}
    for name, (kind, threshold) in rungs(sweep).items():
        shares[name] = Share()
        turned = {
            n: Rung(
                float64(getattr(weights.blocks, n)),
                kind,
                threshold,
                converted[n],
                shares[name],
            )
            for n in MATRICES
        }
        quantised = weights._replace(blocks=weights.blocks._replace(**turned))
        runs[name] = lambda w=quantised: forward(w)
    return runs, shares


def language(tokens=TOKENS):
    """The ladder on SmolLM2: as it is, with the sweep of thresholds, and with planted outliers."""
    from ref.fetch import fetch
    from ref.language import smollm2

    text = (fetch("plays") / "tragedies" / "macbeth.md").read_text(encoding="utf-8")
    ids = smollm2.encode(text[: 8 * tokens])[:tokens]
    weights = smollm2.load_smollm2()
    out = {"tokens": tokens}
    networks = ("as it is", weights, THRESHOLDS), ("planted", plant_llama(weights), (1.0, 2.0, 4.0))
    for name, network, sweep in networks:
        runs, shares = llama_runs(network, lambda w: smollm2.forward(w, ids)[0], sweep)
        rows = ladder(ids, shown(runs))
        for r in rows:
            s = shares.get(r["name"], Share())
            r["float_share"] = s.floats / s.all if s.all else None
        out[name] = rows
    # the paper looks at what the attention matrices read, after the norm
    hidden = smollm2.forward(weights, ids, return_hidden=True)[2]
    layers = zip(
        hidden, weights.blocks.attn_norm, strict=False
    )  # hidden also holds what the last block gives
    read = np.stack([rms_norm(h, gain, eps=weights.eps) for h, gain in layers])
    stats = outlier_feature_stats(read)
    out["outlier_features"] = {
        "dims": stats.dims.tolist(),
        "layer_share": stats.layer_share[stats.dims].tolist(),
        "token_share": stats.token_share[stats.dims].tolist(),
        "width": read.shape[-1],
        "largest": float(np.abs(read).max()),
        "median": float(np.median(np.abs(read))),
    }
    return out


def shown(runs):
    """The same runs, each telling that it is done."""

    def tell(name, run):
        result = run()
        print(name, flush=True)
        return result

    return {name: lambda n=name, r=run: tell(n, r) for name, run in runs.items()}


# The sentence encoder.


def plant_bert(params, *, count=PLANTED, factor=FACTOR, seed=0):
    """The same encoder with outliers in what its norms hand on.

    In a post-norm block the norm's output is read by the next matrices and by the residual stream, so an
    exact rescale is possible only inside: features of the values go up in w_v and down in w_o.
    """
    rng = np.random.default_rng(seed)

    def block(p):
        scale = np.ones(p.w_v.shape[1])
        scale[rng.choice(len(scale), count, replace=False)] = factor
        return p._replace(w_v=p.w_v * scale, b_v=p.b_v * scale, w_o=p.w_o / scale[:, None])

    return params._replace(blocks=tuple(block(p) for p in params.blocks))


def bert_rung(params, kind, threshold):
    """The encoder with every matrix of its blocks a Rung."""
    matrices = [n for n in BlockParams._fields if n.startswith("w_")]
    blocks = [
        p._replace(**{n: Rung(float64(getattr(p, n)), kind, threshold, {}) for n in matrices})
        for p in params.blocks
    ]
    return params._replace(blocks=tuple(blocks))


def sentences():
    """Agreement of the encoder's similarities with people's, on every rung and in other people's int8."""
    from ref.fetch import fetch
    from ref.models.minilm import load_minilm, load_minilm_int8, load_tokenizer, sentence_vector
    from ref.tasks.similarity import load_lee, load_wordsim

    tokenizer = load_tokenizer(fetch("minilm") / "tokenizer.json")
    documents, human = load_lee(fetch("lee"))
    pairs, scores = load_wordsim(fetch("wordsim"))
    words = sorted({w for pair in pairs for w in pair})
    at, docs = np.triu_indices(len(documents), 1), [tokenizer(d) for d in documents]
    ids = {w: tokenizer(w) for w in words}
    lengths = sorted({len(i) for i in ids.values()})

    def measure(params, base=None):
        v = np.stack([sentence_vector(d, params) for d in docs])
        vectors = {}
        for n in lengths:  # words of equal length in one batch
            group = [w for w in words if len(ids[w]) == n]
            vectors |= dict(
                zip(group, sentence_vector(np.stack([ids[w] for w in group]), params), strict=True)
            )
        likeness = [vectors[a] @ vectors[b] for a, b in pairs]
        row = {"pearson": pearson((v @ v.T)[at], human[at]), "spearman": spearman(likeness, scores)}
        if base is not None:
            row["cosine"] = float((v * base).sum(axis=-1).mean())
        return v, row

    float_params = load_minilm(fetch("minilm") / "model.safetensors")
    base, first = measure(float_params)
    out = {"as it is": [{"name": "float", **first, "cosine": 1.0}], "planted": []}
    _, theirs = measure(load_minilm_int8(fetch("minilm_int8")), base)
    out["as it is"].append({"name": "other people's int8 weights", **theirs})
    for name, params in (("as it is", float_params), ("planted", plant_bert(float_params))):
        if name == "planted":
            out[name].append({"name": "float", **measure(params, base)[1]})
        for rung, (kind, threshold) in rungs().items():
            out[name].append({"name": rung, **measure(bert_rung(params, kind, threshold), base)[1]})
            print(name, out[name][-1], flush=True)
    return out


# Drawn layers, bytes.


def drawn(seeds=5, counts=(0, 1, 2, 4, 8), *, T=64, K=512, N=128):
    """Relative error of every rung on normal layers with `count` columns of size 20 to 60, over seeds."""
    rows = []
    for count in counts:
        errors = {}
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            x, w = rng.standard_normal((T, K)), rng.standard_normal((N, K)) / np.sqrt(K)
            calm = x @ w.T
            columns = rng.choice(K, count, replace=False)
            x[:, columns] = rng.choice((-1, 1), (T, count)) * rng.uniform(20, 60, (T, count))
            exact = x @ w.T
            got = {n: quantization_ladder(x, w, scheme=s) for n, s in SCHEMES.items()}
            got[MAIN] = quantization_ladder(x, w, scheme="vector", decompose=True)
            got[ONLY] = llm_int8_linear(x, convert_linear(w))
            for name, y in got.items():  # in units of a layer without outliers
                errors.setdefault(name, []).append(np.sqrt(np.mean((y - exact) ** 2) / np.mean(calm**2)))
        rows.append({"outliers": count, **{n: float(np.mean(e)) for n, e in errors.items()}})
    return rows


def network_bytes(depth, dim, *, vocab, context, hidden=None):
    """(bytes with 16-bit weights, bytes with int8 matrices in the blocks) of a GPT: the rest stays 16-bit."""
    hidden = hidden or 4 * dim
    matrices = [(dim, dim)] * 4 + [(hidden, dim), (dim, hidden)]
    rest = 2 * (vocab * dim + context * dim + depth * 4 * dim + 2 * dim)
    whole = depth * sum(2 * n * k + 2 * n for n, k in matrices) + rest
    return whole, depth * sum(int8_linear_bytes(n, k) for n, k in matrices) + rest


def halves():
    """Bytes of GPT-2 (124 M) and OPT-175B by their published sizes."""
    sizes = {
        "GPT-2, 124 M": network_bytes(12, 768, vocab=50257, context=1024),
        "OPT-175B": network_bytes(96, 12288, vocab=50272, context=2048),
    }
    return [{"name": n, "half": a, "int8": b, "ratio": a / b} for n, (a, b) in sizes.items()]


def main():
    """Measure and store."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    results = {"bytes": halves(), "drawn": drawn(), "language": language(), "sentences": sentences()}
    print(store("llm_int8", results, FILES))


if __name__ == "__main__":
    main()
