"""One classifier for many problems: trained on all their classes, asked with the others masked.

Source: arXiv 2111.03963 (2021), of which only the abstract was at hand: one BERT for five problems of a
chatbot server, 154 classes. Ours, and so marked below: training with the mask, the mixture, rejection,
balanced batches. Problem p owns the contiguous classes offset[p] .. offset[p] + sizes[p] - 1; the encoder is
ref/models/classifier.py.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ref.blocks.losses import cross_entropy, macro_f1
from ref.blocks.softmax import logsumexp, softmax
from ref.checks import check_ids, check_share, one_of
from ref.dims import dims, float64
from ref.example import Example
from ref.models.bert_cost import BertConfig, encoder_parameters
from ref.models.classifier import (
    ClassifierParams,
    bert_classifier_forward,
    bert_classifier_forward_backward,
    init_classifier,
)

__all__ = [
    "BertConfig", "ClassifierParams", "ProblemSpec", "Report", "Requests", "RiskCoverage",
    "bert_classifier_forward", "bert_classifier_forward_backward", "classifier_loss",
    "classifier_loss_backward", "draw_batch", "encoder_parameters", "evaluate", "example", "full_loss",
    "full_loss_backward", "init_classifier", "masked_logits", "masked_loss", "masked_loss_backward",
    "masked_softmax", "mixed_loss", "mixed_loss_backward", "predict", "reject", "report", "risk_coverage",
    "server_memory",
]  # fmt: skip

MODES = ("single", "separate", "multi_head")
UNKNOWN = -1  # the answer to a request that is rejected


@dataclass(frozen=True)
class ProblemSpec:
    """Names and class counts of the problems, in the order of their ranges."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self):
        """One name a problem, no name twice, no problem without a class."""
        if len(self.names) != len(self.sizes) or len(set(self.names)) != len(self.names):
            raise ValueError(f"names must be {len(self.sizes)}, one a size, all different: {self.names}")
        _check_sizes(self.sizes)

    @property
    def offsets(self):
        """First class of every problem, and the number of classes: int [P + 1]."""
        return np.cumsum((0, *self.sizes))

    @property
    def mask(self):
        """bool [P, C], True where a class belongs to the problem."""
        problem, _ = self.to_local(np.arange(self.offsets[-1]))
        return problem == np.arange(len(self.sizes))[:, None]

    def to_global(self, problem, local):
        """Class among all, of a problem's own class. Raises: ValueError for one that the problem has not."""
        problem, local = check_ids("problem", problem, len(self.sizes)), np.asarray(local)
        if (bad := (local < 0) | (local >= np.asarray(self.sizes)[problem])).any():
            local = np.broadcast_to(local, bad.shape)
            raise ValueError(f"local must be a class of its problem, got {local[bad]}")
        return self.offsets[problem] + local

    def to_local(self, global_class):
        """(problem, local class). Raises: ValueError for a class outside 0..C-1."""
        y = check_ids("global_class", global_class, self.offsets[-1])
        problem = np.searchsorted(self.offsets, y, side="right") - 1
        return problem, y - self.offsets[problem]

    def add(self, name, size):
        """The problems with one more at the end; the earlier ranges stay."""
        return replace(self, names=(*self.names, name), sizes=(*self.sizes, size))


class Requests(NamedTuple):
    """ids [n, T], mask [n, T] bool, y [n] global classes, problem [n]."""

    ids: np.ndarray
    mask: np.ndarray
    y: np.ndarray
    problem: np.ndarray


class Report(NamedTuple):
    """By problem [P], NaN without requests: accuracy, macro-F1; without the mask: accuracy, wrong domains."""

    accuracy: np.ndarray
    macro_f1: np.ndarray
    unmasked_accuracy: np.ndarray
    wrong_domain_rate: np.ndarray


class RiskCoverage(NamedTuple):
    """threshold, coverage, risk [n], thresholds falling: what is answered if the mass must reach each."""

    threshold: np.ndarray
    coverage: np.ndarray
    risk: np.ndarray


def masked_logits(z, problem, *, sizes):
    """z [B, C] where the class belongs to problem [B], -inf elsewhere.

    Raises: ValueError for NaN or +inf in z, a width other than sum(sizes), a size below 1, or a problem
    outside 0..P-1.
    """
    return np.where(_own(z, problem, sizes), float64(z), -np.inf)


def masked_softmax(z, problem, *, sizes):
    """Probabilities [B, C] over the problem's classes, 0 elsewhere: the full softmax renormalised."""
    return softmax(masked_logits(z, problem, sizes=sizes))


def predict(z, problem, *, sizes):
    """(local_class int [B], prob [B], routing_mass [B]): the best class of the problem, and how sure.

    prob is the class's share within the problem. routing_mass is the sum of the full softmax over the
    problem: how much the network, not told, believes the request belongs there. Of equal logits the first
    class wins.
    """
    own = _own(z, problem, sizes)
    z = float64(z)
    inside = np.where(own, z, -np.inf)
    best = np.argmax(np.where(own, np.maximum(z, np.finfo(np.float64).min), -np.inf), axis=1)
    prob = np.take_along_axis(softmax(inside), best[:, None], axis=1)[:, 0]
    return best - np.cumsum((0, *sizes))[np.asarray(problem)], prob, np.exp(_log_mass(z, inside))


def reject(local_class, routing_mass, *, threshold):
    """The local class, or -1 (unknown) where the routing mass is below the threshold (ours)."""
    dims(local_class=(local_class, "B"), routing_mass=(routing_mass, "B"))
    check_share("threshold", threshold)
    return np.where(np.asarray(routing_mass) < threshold, UNKNOWN, local_class)


def full_loss(z, y):
    """Mean over the batch of -log softmax(z)[y]: z [B, C], y global classes [B]; the problem is not told."""
    return cross_entropy(_check_logits(z), y)[0]


def full_loss_backward(z, y, dloss=1.0):
    """Gradient [B, C] of `full_loss` times dloss: (softmax(z) - e_y) / B."""
    return dloss * cross_entropy(_check_logits(z), y)[1]


def masked_loss(z, y, problem, *, sizes):
    """Mean of logsumexp over the problem's classes - z_y (ours): which class inside, the problem given.

    The full loss is this plus -log(routing mass). Raises: ValueError for a label outside its problem.
    """
    return _masked(z, y, problem, sizes)[0]


def masked_loss_backward(z, y, problem, dloss=1.0, *, sizes):
    """Gradient [B, C] of `masked_loss` times dloss, exactly 0 outside the problem."""
    return dloss * _masked(z, y, problem, sizes)[1]


def mixed_loss(z, y, problem, *, sizes, alpha):
    """alpha full + (1 - alpha) masked (ours). Raises: ValueError for alpha outside [0, 1]."""
    check_share("alpha", alpha)
    return alpha * full_loss(z, y) + (1 - alpha) * masked_loss(z, y, problem, sizes=sizes)


def mixed_loss_backward(z, y, problem, dloss=1.0, *, sizes, alpha):
    """Gradient [B, C] of `mixed_loss` times dloss."""
    check_share("alpha", alpha)
    inside = masked_loss_backward(z, y, problem, dloss, sizes=sizes)
    return alpha * full_loss_backward(z, y, dloss) + (1 - alpha) * inside


def classifier_loss(
    ids, mask, y, problem, params: ClassifierParams, *, num_heads, sizes, alpha=1.0, eps=1e-12
):
    """`mixed_loss` of the encoder's logits: ids, mask [B, T], y, problem [B]; alpha = 1 as in the paper."""
    z = bert_classifier_forward(ids, mask, params, num_heads=num_heads, eps=eps)
    return mixed_loss(z, y, problem, sizes=sizes, alpha=alpha)


def classifier_loss_backward(
    ids, mask, y, problem, params: ClassifierParams, dloss=1.0, *, num_heads, sizes, alpha=1.0, eps=1e-12
) -> ClassifierParams:
    """Gradients of the parameters of `classifier_loss`, times dloss."""
    options = {"num_heads": num_heads, "eps": eps}
    z = bert_classifier_forward(ids, mask, params, **options)
    dz = mixed_loss_backward(z, y, problem, dloss, sizes=sizes, alpha=alpha)
    return bert_classifier_forward_backward(ids, mask, params, dz, **options)


def draw_batch(rng, problem, *, batch, balance="problem"):
    """Indices [batch] of training examples, with replacement, problem [n] telling whose they are (ours).

    balance: "problem" draws a problem first, so that a large one does not drown the others; "none" draws
    examples.
    """
    problem = np.asarray(problem)
    if dims(problem=(problem, "n"))["n"] < 1 or batch < 1:
        raise ValueError(f"need at least one example and batch >= 1, got {len(problem)} and {batch}")
    if balance == "none":
        return rng.integers(0, len(problem), batch)
    if balance != "problem":
        raise ValueError(f'balance must be "problem" or "none", got {balance!r}')
    rows = [np.flatnonzero(problem == p) for p in np.unique(problem)]
    return np.array([rng.choice(rows[p]) for p in rng.integers(0, len(rows), batch)])


def report(z, y, problem, spec: ProblemSpec) -> Report:
    """What the mask does to the same logits z [n, C], problem by problem."""
    local, _, _ = predict(z, problem, sizes=spec.sizes)
    true, problem = _check_labels(y, problem, spec.sizes), np.asarray(problem)
    free = np.argmax(float64(z), axis=1)
    table = np.full((4, len(spec.sizes)), np.nan)
    for p, size in enumerate(spec.sizes):
        at = problem == p
        if at.any():
            own = true[at] - spec.offsets[p]
            strayed = spec.to_local(free[at])[0] != p
            f1 = macro_f1(own, local[at], num_classes=size)
            table[:, p] = (local[at] == own).mean(), f1, (free[at] == true[at]).mean(), strayed.mean()
    return Report(*table)


def evaluate(params: ClassifierParams, data: Requests, spec: ProblemSpec, *, num_heads, batch=64) -> Report:
    """`report` of the encoder's logits for all requests, taken `batch` at a time."""
    if not len(data.ids):
        raise ValueError("data must hold at least one request")
    parts = [
        bert_classifier_forward(
            data.ids[i : i + batch], data.mask[i : i + batch], params, num_heads=num_heads
        )
        for i in range(0, len(data.ids), batch)
    ]
    return report(np.concatenate(parts), data.y, data.problem, spec)


def risk_coverage(routing_mass, correct) -> RiskCoverage:
    """Share answered and share of errors among it, for every mass [n] as the threshold; correct: bool [n].

    Requests of equal mass are answered together, so that the curve does not depend on their order.
    """
    if dims(routing_mass=(routing_mass, "n"), correct=(correct, "n"))["n"] < 1:
        raise ValueError("routing_mass must hold at least one request")
    mass, wrong = float64(routing_mass), ~np.asarray(correct, bool)
    if np.isnan(mass).any():
        raise ValueError("routing_mass must not hold NaN")
    order = np.argsort(-mass, kind="stable")
    last = np.flatnonzero(np.diff(mass[order], append=-np.inf))  # the last of each run of equals
    answered = last + 1
    return RiskCoverage(mass[order][last], answered / len(mass), np.cumsum(wrong[order])[last] / answered)


def server_memory(config: BertConfig, spec: ProblemSpec, *, mode="single", dtype_bytes=4, batch=1, length=64):
    """{"weights", "activations", "total"} in bytes of a server that answers all problems.

    mode: "single" is one encoder and one head of all classes; "multi_head" one encoder and a head a problem,
    as large; "separate" an encoder a problem. activations: the larger of what attention (input, q, k, v,
    weights, output) and the MLP (input, hidden layer, output) of a block hold at once; one model runs at a
    time (training keeps every block's: `encoder_cost` of long_text_hack).
    """
    one_of("mode", mode, MODES)
    if min(dtype_bytes, batch, length) < 1 or length > config.positions:
        raise ValueError(
            f"dtype_bytes and batch must be at least 1, length in 1..{config.positions}, got "
            f"{dtype_bytes}, {batch} and {length}"
        )
    c, copies = config, len(spec.sizes) if mode == "separate" else 1
    weights = copies * encoder_parameters(c) + (c.dim + 1) * sum(spec.sizes)
    attention = 5 * length * c.dim + c.num_heads * length**2
    activations = batch * max(attention, length * (2 * c.dim + c.hidden))
    total = weights + activations
    return {
        k: v * dtype_bytes for k, v in dict(weights=weights, activations=activations, total=total).items()
    }


def _own(z, problem, sizes):
    """bool [B, C]: the classes of each row's problem."""
    _check_sizes(sizes)
    dims(z=(z, f"B {sum(sizes)}"), problem=(problem, "B"))
    _check_logits(z)
    problem = check_ids("problem", problem, len(sizes))
    return np.repeat(np.arange(len(sizes)), sizes) == problem[:, None]


def _masked(z, y, problem, sizes):
    y = _check_labels(y, problem, sizes)
    return cross_entropy(masked_logits(z, problem, sizes=sizes), y)


def _log_mass(z, inside):
    """log of the full softmax's sum over the problem; -inf where the problem's logits all are."""
    part, whole = logsumexp(inside), logsumexp(z)
    return part - np.where(np.isneginf(whole), 0.0, whole)


def _check_logits(z):
    z = float64(z)
    if np.isnan(z).any() or np.isposinf(z).any():
        raise ValueError("z must hold neither NaN nor +inf")
    return z


def _check_sizes(sizes):
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes must be counts of at least 1, got {tuple(sizes)}")


def _check_labels(y, problem, sizes):
    dims(y=(y, "B"), problem=(problem, "B"))
    y, problem, start = np.asarray(y), check_ids("problem", problem, len(sizes)), np.cumsum((0, *sizes))
    if y.dtype.kind not in "iu" or ((y < start[problem]) | (y >= start[problem + 1])).any():
        raise ValueError(f"y must be global classes of their problems, got {y} for problem {problem}")
    return y


def example(seed=0):
    """A two-block encoder on words of Hamlet, told by first letter; problems of 3, 4 and 2 classes."""
    from ref.data import text

    rng, sizes = np.random.default_rng(seed), (3, 4, 2)
    words = [w for w in text().lower().split() if w[0].isalpha()]
    ids = np.array([ord(w[0]) - ord("a") for w in words[:48]]).reshape(6, 8)
    mask = np.arange(8) < rng.integers(3, 9, (6, 1))
    params = init_classifier(rng, classes=9, vocab=26, context=8, dim=12, depth=2, hidden=24, std=0.3)
    problem = np.array([0, 1, 2, 0, 1, 2])
    y = np.cumsum((0, *sizes))[problem] + rng.integers(0, 2, 6)
    z = bert_classifier_forward(ids, mask, params, num_heads=3)
    options = {"sizes": sizes}
    return [
        Example("masked_logits", (z, problem), options, (0,)),
        Example("masked_softmax", (z, problem), options, (0,)),
        Example("predict", (z, problem), options),
        Example("full_loss", (z, y), {}, (0,)),
        Example("masked_loss", (z, y, problem), options, (0,)),
        Example("mixed_loss", (z, y, problem), {**options, "alpha": 0.5}, (0,)),
        Example("bert_classifier_forward", (ids, mask, params), {"num_heads": 3}, (2,)),
        Example(
            "classifier_loss",
            (ids, mask, y, problem, params),
            {**options, "num_heads": 3, "alpha": 0.5},
            (4,),
        ),
    ]
