"""RUM against GRU and LSTM at equal parameters: `python -m tests.claims.rum`, --gpu for the longer form.

Copying, recall, stories and characters of a play; every model from the same seeds, all seeds at once. RMSprop
with 1e-3 as in the released code, no clipping. Stored in docs/data.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from accel.blocks.optim import rmsprop, rmsprop_init
from accel.memory.rum import rum
from accel.models.rnn import gru, lstm
from ref.data import text
from ref.memory.rum import init_rum, rum_params
from ref.models.rnn import gru_params, init_gru, init_lstm, lstm_params
from ref.tasks.sequences import (
    STORY_KINDS,
    STORY_WORDS,
    copying_baseline,
    copying_task,
    recall_task,
    story_task,
)
from tests.claims.record import store

FILES = (
    "accel/memory/rum.py",
    "accel/models/rnn.py",
    "accel/blocks/optim.py",
    "ref/tasks/sequences.py",
    "tests/claims/rum.py",
)
MODELS = ("rum lambda=0", "rum lambda=1", "gru", "lstm")
CHUNK = 50  # steps whose data is drawn at once


def characters(rng, batch, length, *, held=False):
    """(tokens, targets, weight): windows of Hamlet, its last tenth held out."""
    play = np.frombuffer(text().encode("ascii", "replace"), np.uint8).astype(np.int32) - 10
    cut = len(play) * 9 // 10
    play = play[cut:] if held else play[:cut]
    at = rng.integers(0, len(play) - length - 1, batch)
    windows = play[at[:, None] + np.arange(length + 1)]
    return windows[:, :-1], windows[:, 1:], np.ones((batch, length))


def stories(rng, batch, kind, n_facts):
    """(tokens, targets, weight) of a story task: the answer at the last step."""
    tokens, answer = story_task(rng, batch, kind=kind, n_facts=n_facts)
    targets, weight = np.zeros_like(tokens), np.zeros(tokens.shape)
    targets[:, -1], weight[:, -1] = answer, 1.0
    return tokens, targets, weight


def task(name, **o):
    """(draw(rng, batch, held), vocabulary, classes) of a task by name and its options."""
    if name == "copying":
        return lambda rng, n, held: copying_task(rng, n, o["delay"]), 10, 10
    if name == "recall":
        return lambda rng, n, held: recall_task(rng, n, o["length"]), o["length"] // 2 + 11, 10
    if name == "characters":
        return lambda rng, n, held: characters(rng, n, o["length"], held=held), 118, 118
    words = len(STORY_WORDS)
    return lambda rng, n, held: stories(rng, n, o["kind"], o["n_facts"]), words, words


def equal_size(model, vocab, hidden):
    """The width at which a model has the parameters of a RUM of width `hidden`, or a few less."""
    if model.startswith("rum"):
        return hidden
    count = {"gru": gru_params, "lstm": lstm_params}[model]
    most = rum_params(vocab, hidden)
    return max(n for n in range(1, 4 * hidden) if count(vocab, n) <= most)


def init(model, vocab, classes, width, seed):
    """Parameters of the cell and of the map to classes."""
    make = {"gru": init_gru, "lstm": init_lstm}.get(model, init_rum)
    rng = np.random.default_rng(seed)
    out = rng.uniform(-1, 1, (width, classes)) / np.sqrt(width)
    return jax.tree.map(jnp.float32, (make(rng, vocab, width), out, np.zeros(classes)))


def forward(model, params, tokens):
    """Logits [B, T, classes]."""
    cell, w, b = params
    x = jax.nn.one_hot(tokens, jax.tree.leaves(cell)[0].shape[0] - w.shape[0])
    if model == "lstm":
        hidden = lstm(x, cell)[0]
    elif model == "gru":
        hidden = gru(x, cell)[0]
    else:
        hidden = rum(x, cell, lambda_=int(model[-1]))[0]
    return hidden @ w + b[None, None, :]


def loss(model, params, batch):
    """(mean cross-entropy over what counts, share right)."""
    tokens, targets, weight = batch
    logits = forward(model, params, tokens)
    log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    right = jnp.where(logits.argmax(axis=-1) == targets, weight, 0)
    return -jnp.sum(picked * weight) / jnp.sum(weight), jnp.sum(right) / jnp.sum(weight)


def train(model, name, *, hidden, steps, batch, seeds, lr=1e-3, tested=512, **options):
    """{width, parameters, losses [seeds][points], loss, accuracy [seeds], seconds}; fresh data each step."""
    draw, vocab, classes = task(name, **options)
    width = equal_size(model, vocab, hidden)
    params = [init(model, vocab, classes, width, s) for s in range(seeds)]
    params = jax.tree.map(lambda *x: jnp.stack(x), *params)
    state = jax.vmap(rmsprop_init)(params)

    def step(carry, data):
        params, state = carry
        (value, _), grads = jax.value_and_grad(lambda p: loss(model, p, data), has_aux=True)(params)
        return rmsprop(params, grads, state, lr=lr), value

    run = jax.jit(jax.vmap(lambda p, s, data: jax.lax.scan(step, (p, s), data)))
    rngs, losses = [np.random.default_rng(1000 + s) for s in range(seeds)], []

    def data(n, size, held=False):
        """Arrays [seeds, n, size, T]."""
        parts = [draw(r, n * size, held) for r in rngs]
        stacked = [np.stack(x).reshape(seeds, n, size, -1) for x in zip(*parts, strict=True)]
        return tuple(jnp.asarray(x, {"i": jnp.int32, "f": jnp.float32}[x.dtype.kind]) for x in stacked)

    start, left = time.perf_counter(), steps
    while left:
        n = min(CHUNK, left)
        (params, state), values = run(params, state, data(n, batch))
        losses.append(np.asarray(values))
        left -= n
    final = right = np.zeros(0)
    if tested:
        test = data(1, tested, held=True)
        final, right = jax.jit(jax.vmap(lambda p, d: loss(model, p, jax.tree.map(lambda x: x[0], d))))(
            params, test
        )
    curve = np.concatenate(losses, axis=1)
    points = curve[:, :: max(1, steps // 40)] if steps > 100 else curve
    return {
        "width": width,
        "parameters": int(sum(x.size for x in jax.tree.leaves(params)) // seeds),
        "losses": np.round(points, 5).tolist(),
        "loss": np.asarray(final, float).tolist(),
        "accuracy": np.asarray(right, float).tolist(),
        "seconds": time.perf_counter() - start,
    }


def experiment(title, name, **options):
    """All models on one task, with a line of progress each."""
    rows = {}
    for model in MODELS:
        rows[model] = r = train(model, name, **options)
        print(f"{title}, {model}: loss {np.round(r['loss'], 4)}, accuracy {np.round(r['accuracy'], 3)}, "
              f"{r['seconds']:.0f} s", flush=True)  # fmt: skip
    return {"task": name, "options": options, "models": rows}


def solved(record):
    """{model: share of the seeds below a tenth of the loss of one who remembers nothing} in copying."""
    limit = copying_baseline(record["options"]["delay"]) / 10
    return {m: float(np.mean(np.array(r["loss"]) < limit)) for m, r in record["models"].items()}


def main():
    """Train and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="delays of 50, recall of 20, stories; one GPU")
    if parser.parse_args().gpu:
        if jax.default_backend() != "gpu":
            parser.error("--gpu: JAX sees no GPU")
        common = {"hidden": 64, "seeds": 5, "batch": 64}
        found = {
            "copying": experiment("copying 50", "copying", delay=50, steps=2500, **common),
            "recall": experiment("recall 20", "recall", length=20, steps=2500, **common),
            "characters": experiment("characters", "characters", length=64, steps=2000, **common),
            **{f"story {k}": experiment(k, "story", kind=k, n_facts=6, steps=1000, **common)
               for k in STORY_KINDS},
        }  # fmt: skip
        print(store("rum_gpu", found, FILES))
        return
    common = {"hidden": 32, "seeds": 3, "batch": 16}
    found = {
        "copying": experiment("copying 10", "copying", delay=10, steps=2500, **common),
        "recall": experiment("recall 6", "recall", length=6, steps=3000, **common),
    }
    print(store("rum", found, FILES))


if __name__ == "__main__":
    main()
