"""A headless benchmark of language models: the same conversations, the same sampling, any backend.

Source: the MELT benchmark 2024 (arXiv 2403.12844) and its released harness (brave-experiments/MELT-public).
Time is told by a clock that is handed in, so that a test can tell it exactly.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ref.models.llama import forward, sample

NOT_MEASURED = "not measured"


class Backend(Protocol):
    """A runtime with a model and a cache. Text prompts need encode(text) too, stop strings text(ids)."""

    def load(self):
        """Make the model ready."""

    def prefill(self, ids):
        """Logits [V] after the tokens ids, which are read behind those in the cache."""

    def decode(self, id):
        """Logits [V] after one more token."""

    def reset(self):
        """Empty the cache."""

    def nbytes(self):
        """{"model", "cache", "scratch"}: bytes held."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; temperature 0 is greedy. The last penalty_window tokens are made less likely."""

    temperature: float = 0.9
    top_k: int = 40
    top_p: float = 0.95
    repeat_penalty: float = 1.1
    penalty_window: int = 64


@dataclass(frozen=True)
class BenchConfig:
    """All that a run depends on. stop: ids that end a reply; prompt_batch: tokens read at a time."""

    model: str
    quant: str
    context: int = 2048
    max_gen_len: int = 256
    repetitions: int = 3
    sampling: Sampling = field(default_factory=Sampling)
    threads: int = 1
    seed: int = 0
    prompt_batch: int = 128
    stop: tuple[int, ...] = (2,)
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadRecord:
    """Seconds to load, the largest resident memory so far (None if unknown), bytes by use."""

    seconds: float
    peak_rss: int | None
    nbytes: dict


@dataclass(frozen=True)
class PromptRecord:
    """One prompt: n_in tokens read by prefill behind n_ctx others, then n_out decode steps, one by one.

    The first token of a reply comes of prefill's logits, so a reply has n_out + 1 tokens. From the second
    prompt on, n_in counts the last token said, which no step had read. Times in s; start is the clock's.
    """

    repetition: int
    conversation: int
    prompt: int
    start: float
    n_in: int
    n_ctx: int
    t_encode: float
    t_prefill: float
    t_decode: float
    steps: tuple[float, ...]
    tokens: tuple[int, ...]
    ended: str  # "stop", "length" or "context"
    reset: bool
    mwh: float | None = None
    mah: float | None = None

    @property
    def n_out(self):
        """Decode steps that were run."""
        return len(self.steps)

    @property
    def prefill_tps(self):
        """Tokens a second while reading the prompt."""
        return self.n_in / self.t_prefill

    @property
    def decode_tps(self):
        """Tokens a second while replying; NaN if there was no step."""
        return self.n_out / self.t_decode if self.n_out else float("nan")


@dataclass(frozen=True)
class BenchReport:
    """A run: its configuration, loads, prompts, and who measured the power."""

    config: BenchConfig
    loads: tuple[LoadRecord, ...]
    prompts: tuple[PromptRecord, ...]
    power: str = NOT_MEASURED

    @property
    def resets(self):
        """How often a prompt did not fit behind the others and the context was emptied."""
        return sum(p.reset for p in self.prompts)


def run_benchmark(backend, conversations, config, *, power=None, clock=time.perf_counter) -> BenchReport:
    """Hold every conversation with the backend, `repetitions` times, each from a load and the same seed.

    Args: conversations: lists of prompts, each a list of token ids, or text if the backend has encode. A
      prompt sees all earlier turns; where it does not fit, the context is emptied first. power: a
      `PowerSource` or None.
    Raises: ValueError for repetitions, lengths or batches below 1, no prompt, or one beyond the context.
    """
    check_bench(conversations, config)
    note, loads, prompts = (power.sample if power else lambda t: None), [], []

    def now():
        note(t := clock())
        return t

    for repetition in range(config.repetitions):
        start = now()
        backend.load()
        loads.append(LoadRecord(now() - start, peak_rss(), dict(backend.nbytes())))
        rng = np.random.default_rng(config.seed)
        for c, conversation in enumerate(conversations):
            backend.reset()
            said, used = [], 0  # the tokens of the conversation, and how many of them are in the cache
            for i, prompt in enumerate(conversation):
                record, said, used = _turn(backend, prompt, config, rng, said, used, clock, now)
                spent = power.energy(record["begun"], record["ended_at"]) if power else (None, None)
                keep = {k: v for k, v in record.items() if k not in ("begun", "ended_at")}
                prompts.append(PromptRecord(repetition, c, i, mwh=spent[0], mah=spent[1], **keep))
    return BenchReport(config, tuple(loads), tuple(prompts), power.name if power else NOT_MEASURED)


def _turn(backend, prompt, config, rng, said, used, clock, now):
    """(fields of a PromptRecord, tokens of the conversation, how many are in the cache)."""
    start = now()
    ids = list(backend.encode(prompt) if isinstance(prompt, str) else prompt)
    new = said[used:] + ids
    if reset := used + len(new) > config.context:
        backend.reset()
        said, used, new = [], 0, ids
    if not ids or len(new) > config.context:
        raise ValueError(f"a prompt has {len(ids)} tokens, but the context holds 1..{config.context}")
    said, before, tokens, marks = said + ids, used, [], []
    begun = now()
    for j in range(0, len(new), config.prompt_batch):
        logits = backend.prefill(new[j : j + config.prompt_batch])
    read = now()
    used += len(new)
    while True:
        token = pick(logits, rng.random(), said, config.sampling)
        tokens.append(token)
        said.append(token)
        if ended := _ending(backend, tokens, used, config):
            break
        logits = backend.decode(token)
        used += 1
        marks.append(clock())
    ended_at = now()
    last = marks[-1] if marks else read
    fields = {
        "start": start, "n_in": len(new), "n_ctx": before, "t_encode": begun - start,
        "t_prefill": read - begun, "t_decode": last - read,
        "steps": tuple(np.diff([read, *marks]).tolist()), "tokens": tuple(tokens), "ended": ended,
        "reset": reset, "begun": begun, "ended_at": ended_at,
    }  # fmt: skip
    return fields, said, used


def _ending(backend, tokens, used, config):
    """Why the reply ends here, or an empty string."""
    if tokens[-1] in config.stop:
        return "stop"
    if config.stop_strings and backend.text(tokens).endswith(config.stop_strings):
        return "stop"
    if len(tokens) == config.max_gen_len:
        return "length"
    return "context" if used == config.context else ""


def pick(logits, u, said, sampling):
    """The token that u in [0, 1) draws. The penalty divides a recent token's logit, or times it below 0."""
    logits = np.array(logits, np.float64)
    recent = np.unique(said[-sampling.penalty_window :]).astype(int) if sampling.penalty_window else []
    for token in recent:
        logits[token] *= sampling.repeat_penalty ** (-1 if logits[token] > 0 else 1)
    s = sampling
    return sample(logits, u, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)


def summarize(report: BenchReport):
    """Rows {metric, unit, mean, std, p50, p95} over the repetitions; values None where nothing was measured.

    A repetition's tokens a second are its tokens by its seconds, over all prompts; energy is without loading.
    """
    runs = [[p for p in report.prompts if p.repetition == r] for r in range(report.config.repetitions)]
    ratio = lambda run, top, bottom: (
        sum(map(top, run)) / total if (total := sum(map(bottom, run))) else np.nan
    )
    steps = lambda run: [s for p in run for s in p.steps] or [np.nan]
    n_out = lambda p: p.n_out
    known = report.prompts and all(p.mwh is not None for p in report.prompts)
    found = {
        ("load", "s"): [load.seconds for load in report.loads],
        ("prefill", "tokens/s"): [ratio(run, lambda p: p.n_in, lambda p: p.t_prefill) for run in runs],
        ("decode", "tokens/s"): [ratio(run, n_out, lambda p: p.t_decode) for run in runs],
        ("token time, median", "s"): [np.percentile(steps(run), 50) for run in runs],
        ("token time, 95 %", "s"): [np.percentile(steps(run), 95) for run in runs],
        ("energy", "mWh/token"): [ratio(run, lambda p: p.mwh, n_out) for run in runs] if known else None,
        ("memory", "bytes"): [sum(load.nbytes.values()) for load in report.loads],
    }
    stats = {"mean": np.mean, "std": np.std, "p50": np.median, "p95": lambda v: np.percentile(v, 95)}
    number = lambda f, values: None if values is None else float(f(values))
    return [
        {"metric": metric, "unit": unit, **{name: number(f, values) for name, f in stats.items()}}
        for (metric, unit), values in found.items()
    ]


def open_run(root, config, *, device, framework, run):
    """The path of a new folder for a run, with its configuration in it before anything else is done."""
    path = Path(root) / device / framework / config.model / config.quant / str(run)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    return path


def write_events(path, report):
    """events.jsonl in a run's folder: a line a load and prompt, to be merged with power samples later."""
    lines = [{"event": "load", **asdict(load)} for load in report.loads]
    lines += [{"event": "prompt", **asdict(p)} for p in report.prompts]
    (Path(path) / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class LlamaBackend:
    """The network of ref/models/llama.py; make() -> LlamaWeights is called by load."""

    def __init__(self, make, *, encode=None, text=None):
        """encode: text -> ids, text: ids -> text, where there is a tokenizer."""
        self.make, self.encode, self.text = make, encode, text
        self.weights, self.cache, self.position = None, None, 0

    def load(self):
        """Make the weights."""
        self.weights = self.make()
        self.reset()

    def reset(self):
        """Forget what was read."""
        self.cache, self.position = None, 0

    def prefill(self, ids):
        """Logits [V] after ids."""
        logits, self.cache = forward(self.weights, np.asarray(ids), cache=self.cache, position=self.position)
        self.position += len(ids)
        return logits[-1]

    def decode(self, id):
        """Logits [V] after one token."""
        return self.prefill([id])

    def nbytes(self):
        """Bytes of all arrays of the weights, and of the cache."""
        return {
            "model": _nbytes(self.weights),
            "cache": 0 if self.cache is None else self.cache.nbytes,
            "scratch": 0,
        }


def _nbytes(tree):
    return sum(map(_nbytes, tree)) if isinstance(tree, tuple) else tree.nbytes


def peak_rss():
    """The largest resident memory of this process in bytes, None where the system does not say."""
    try:
        import resource
        import sys
    except ImportError:  # no such module on Windows and in a browser
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


def check_bench(conversations, config):
    """Raise ValueError for a run that cannot be."""
    for name in ("repetitions", "context", "max_gen_len", "prompt_batch"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not conversations or not all(len(c) for c in conversations):
        raise ValueError("conversations must hold at least one, and each at least one prompt")
