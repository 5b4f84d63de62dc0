"""MTM: find the article that checked a claim by its few key sentences, those that quote it or debunk it.

Source: Sheng et al. 2021 (ACL-IJCNLP, pages 5468-5481) and, for all that the paper leaves open, the code
released with it. BM25, ROUGE-2 and the ranking metrics are ref/blocks/retrieval.py, k-means is
ref/blocks/clustering.py, the networks are ref/models/pairs.py.
"""

from dataclasses import dataclass, replace

import numpy as np

from ref.blocks.clustering import kmeans
from ref.blocks.losses import cross_entropy
from ref.blocks.optim import AdamState, adamw_step, cosine_decay, matrix_mask, tree_map
from ref.blocks.retrieval import BM25Index, bm25, bm25_fit, bm25_scores, hit_at, map_at, mrr, rouge2
from ref.blocks.softmax import softmax
from ref.dims import dims, float64
from ref.example import Example
from ref.models.bert import BertParams
from ref.models.pairs import (
    LIMITS,
    TINY,
    Linear,
    MatchParams,
    RotParams,
    Selection,
    encode_pairs,
    init_match,
    init_rot,
    match_forward,
    match_forward_backward,
    match_score,
    match_score_backward,
    pad_pairs,
    rot_forward,
    rot_forward_backward,
    rot_loss,
    rot_loss_backward,
    selected_pairs,
)

__all__ = [
    "BM25Index", "BertParams", "Linear", "MatchParams", "Reranker", "RotParams", "Selection", "bm25",
    "bm25_fit", "bm25_scores", "cosine_decay", "encode_pairs", "example", "hit_at", "init_match",
    "init_rot", "kmeans", "map_at", "match_forward", "match_forward_backward", "match_score",
    "match_score_backward", "mrr", "pattern_bank", "prediction_weight", "rot_forward",
    "rot_forward_backward", "rot_loss", "rot_loss_backward", "rouge2", "sampling_weights",
    "select_key_sentences", "selection_cost", "sentence_vector", "train_epoch", "trainable",
    "unique_targets", "update_memory",
]  # fmt: skip


def unique_targets(targets):
    """Places, ascending, of the first of every distinct row of targets [n, 2]: what ROT is trained on."""
    return np.sort(np.unique(np.asarray(targets), axis=0, return_index=True)[1])


def sentence_vector(ids, word):
    """The mean of the word embeddings of a text: ids [n] of word [V, d] -> [d]; order does not count.

    Raises: ValueError for an empty text.
    """
    ids = np.asarray(ids)
    if not ids.size:
        raise ValueError("ids must hold at least one token: an empty text has no mean")
    return float64(word)[ids].mean(axis=0)


def pattern_bank(claim_emb, sent_emb, *, k=20, quantiles=(0.25, 0.5), seed=0):
    """Memory [k, d]: k-means centres of residuals sent_emb - claim_emb of true pairs [n, d].

    Those count whose length lies strictly between two quantiles of all: about the event, but no mere quote.
    Raises: ValueError for quantiles out of order, or more patterns than residuals.
    """
    dims(claim_emb=(claim_emb, "n d"), sent_emb=(sent_emb, "n d"))
    low, high = quantiles
    if not 0 <= low < high <= 1:
        raise ValueError(f"quantiles must rise within [0, 1], got {quantiles}")
    u = float64(sent_emb) - float64(claim_emb)
    length = np.linalg.norm(u, axis=1)
    least, most = np.quantile(length, quantiles)
    return kmeans(u[(length > least) & (length < most)], k=k, seed=seed)[0]


def select_key_sentences(q, s, memory, *, top=3, lambda_q=0.6, lambda_p=0.4) -> Selection:
    """The sentences s [n, d] that are near the claim q [d], or that less the claim are near a pattern [K, d].

    score = lambda_q scale(|s_i - q|) + lambda_p scale(min_k |s_i - q - M_k|), where scale(d) = 1 - (d - min)
    / (max - min + 1e-8) over the article. Weights are the best `top` scores over their sum. Equal scores: in
    order.
    Raises: ValueError for no sentence, no pattern, top < 1, a negative lambda or what is not finite.
    """
    n = dims(q=(q, "d"), s=(s, "n d"), memory=(memory, "K d"))
    if min(n["n"], n["K"]) < 1 or top < 1:
        raise ValueError(f"need a sentence in s, a pattern in memory and top >= 1: {n['n']}, {n['K']}, {top}")
    if not (lambda_q >= 0 and lambda_p >= 0):
        raise ValueError(f"lambda_q and lambda_p must not be negative, got {lambda_q} and {lambda_p}")
    u, memory = float64(s) - float64(q), float64(memory)
    far = np.sqrt(((u[:, None] - memory) ** 2).sum(axis=-1))  # [n, K]
    if not np.isfinite(far).all():
        raise ValueError("q, s and memory must be finite")
    near = np.sqrt((u**2).sum(axis=-1)), far.min(axis=1)
    score = lambda_q * _scale(near[0]) + lambda_p * _scale(near[1])
    order = np.argsort(-score, kind="stable")
    best = score[order][:top]
    weight = np.ones(1) if len(best) == 1 else best / (best.sum() + TINY)
    return Selection(order, far.argmin(axis=1)[order], score[order], weight)


def prediction_weight(p, label):
    """(weight [n] = |p - 0.5|, positive bool [n]) of training predictions p [n] of the true label [n].

    Positive is p > 0.5, and a draw where the label is 0: what argmax would answer.
    """
    dims(p=(p, "n"), label=(label, "n"))
    p = float64(p)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p must be probabilities, in [0, 1]")
    return np.abs(p - 0.5), (p > 0.5) | ((p == 0.5) & (np.asarray(label) == 0))


def update_memory(memory, residuals, pattern, weight, positive, *, step=0.3):
    """Memory [K, d] after an epoch: towards residuals of right predictions, away from those of wrong ones.

    M_k += step |M_k| g / |g|, g = a (centre+ - M_k) + (1 - a) (M_k - centre-), centres weighted means, a the
    share of the weight that is positive; a missing side is 0.
    Args: one row a selected sentence: residuals [n, d], pattern int [n], weight [n] >= 0, positive bool [n].
    A pattern without weight, or with g = 0, stays. Raises: ValueError for weight < 0 or a pattern outside
    0..K-1.
    """
    n = dims(
        memory=(memory, "K d"), residuals=(residuals, "n d"), pattern=(pattern, "n"), weight=(weight, "n")
    )
    dims(pattern=(pattern, "n"), positive=(positive, "n"))
    memory, u, w, pattern = float64(memory), float64(residuals), float64(weight), np.asarray(pattern)
    if not (w >= 0).all() or (pattern.size and not (0 <= pattern.min() and pattern.max() < n["K"])):
        raise ValueError(f"weight must not be negative, pattern must be in 0..{n['K'] - 1}")
    new, pull = memory.copy(), np.where(np.asarray(positive, bool), w, -w)
    for k in np.unique(pattern):
        at = pattern == k
        g = pull[at] @ (u[at] - memory[k])  # times the weight of all: only its direction counts
        if (size := np.linalg.norm(g)) > 0:
            new[k] += step * np.linalg.norm(memory[k]) * g / size
    return new


def sampling_weights(labels):
    """N / n_class of each label [N], the odds of being drawn: rare classes come as often as common ones."""
    labels = np.asarray(labels)
    return len(labels) / np.bincount(labels)[labels]


def trainable(params: MatchParams):
    """The tree with False at the embeddings and the first block, which stay as ROT left them, else True."""
    frozen = dict.fromkeys(("word", "position", "token_type", "ln_scale", "ln_bias"), False)
    yes, no = (lambda tree, flag=flag: tree_map(lambda _: flag, tree) for flag in (True, False))
    blocks = tuple(no(b) if n == 0 else yes(b) for n, b in enumerate(params.bert.blocks))
    return yes(params)._replace(bert=yes(params.bert)._replace(**frozen, blocks=blocks))


@dataclass(frozen=True)
class Reranker:
    """All stages: BM25 picks `candidates` articles, key sentences stand for each, the network orders them.

    word [V, d]: static embeddings of ROT; num_heads: of the matching network.
    """

    params: MatchParams
    memory: np.ndarray
    word: np.ndarray
    num_heads: int
    top: int = 3
    lambda_q: float = 0.6
    lambda_p: float = 0.4
    max_len: int = 256
    claim_max: int = 180
    candidates: int = 50
    cls_id: int = 101
    sep_id: int = 102
    pad_id: int = 103

    @property
    def limits(self):
        """The keywords of `encode_pairs`."""
        return {n: getattr(self, n) for n in LIMITS}

    def select(self, claim, sentences) -> Selection:
        """Key sentences of an article for a claim, lists of ids. Raises: ValueError for an empty text."""
        if not len(sentences):
            raise ValueError("an article must hold at least one sentence")
        s = np.stack([sentence_vector(ids, self.word) for ids in sentences])
        options = {"top": self.top, "lambda_q": self.lambda_q, "lambda_p": self.lambda_p}
        return select_key_sentences(sentence_vector(claim, self.word), s, self.memory, **options)

    def score(self, claim, sentences):
        """Logit 1 of the article."""
        return match_score(
            claim, sentences, self.select(claim, sentences), self.memory, self.params,
            num_heads=self.num_heads, top=self.top, **self.limits,
        )[1]  # fmt: skip

    def rank(self, claim, articles, *, index: BM25Index | None = None, seed=0):
        """Places in `articles` (lists of sentences of ids), best first, of the candidates that BM25 finds.

        Equal scores are in an order drawn by the seed: the order in which candidates are stored may give the
        answer away. index: `bm25_fit` of the articles' terms, if it is at hand.
        """
        index = index or bm25_fit([[t for s in sentences for t in s] for sentences in articles])
        found = np.argsort(-bm25_scores(index, claim), kind="stable")[: self.candidates]
        found = np.random.default_rng(seed).permutation(found)
        scores = np.array([self.score(claim, articles[i]) for i in found])
        return found[np.argsort(-scores, kind="stable")]


def train_epoch(reranker: Reranker, claims, articles, labels, state: AdamState, *, rng, lr=5e-6,
                weight_decay=0.01, batch=16):  # fmt: skip
    """(Reranker, state, mean loss) after an epoch over pairs of a claim and an article, labels [n] 0 or 1.

    Pairs are drawn so that both labels come equally often. Cross-entropy, AdamW on what is `trainable`; then
    the memory learns from the predictions that were made on the way. Args: claims: lists of ids; articles:
    lists of sentences; state: `adam_init(reranker.params)` at first; lr: of this epoch, see `cosine_decay`.
    Raises: ValueError unless there is a label a pair.
    """
    r, labels, free = reranker, np.asarray(labels), trainable(reranker.params)
    if not len(claims) == len(articles) == len(labels) or not len(labels):
        raise ValueError(f"need a label a pair, got {len(claims)}, {len(articles)} and {len(labels)}")
    decay = tree_map(lambda m, f: m and f, matrix_mask(r.params), free)
    odds, params, losses, seen = sampling_weights(labels), r.params, [], []
    order = rng.choice(len(labels), len(labels), p=odds / odds.sum())
    for at in (order[i : i + batch] for i in range(0, len(order), batch)):
        chosen = [r.select(claims[j], articles[j]) for j in at]
        inputs = [
            selected_pairs(claims[j], articles[j], c, r.top, r.limits)
            for j, c in zip(at, chosen, strict=True)
        ]
        inputs = [np.concatenate(x) for x in zip(*(pad_pairs(a, r.top) for a in inputs), strict=True)]
        logits = match_forward(*inputs, r.memory, params, num_heads=r.num_heads)
        loss, d = cross_entropy(logits, labels[at])
        grads = match_forward_backward(*inputs, r.memory, params, d, num_heads=r.num_heads)
        grads = tree_map(lambda g, f: g * f, grads, free)
        params, state, _ = adamw_step(
            params, grads, state, lr=lr, weight_decay=weight_decay, decay_mask=decay, clip=np.inf
        )
        losses.append(loss)
        weight, positive = prediction_weight(softmax(logits)[np.arange(len(at)), labels[at]], labels[at])
        for j, c, w, yes in zip(at, chosen, weight, positive, strict=True):
            q = sentence_vector(claims[j], r.word)
            for i, k in zip(c.order[: r.top], c.pattern, strict=False):
                seen.append((sentence_vector(articles[j][i], r.word) - q, k, w, yes))
    memory = update_memory(r.memory, *(np.array(x) for x in zip(*seen, strict=True)))
    return replace(r, params=params, memory=memory), state, float(np.mean(losses))


def selection_cost(n_sentences, *, dim, patterns, top, articles):
    """{"passes", "passes_all", "saved", "macs"} of a claim: encoder passes with and without selection.

    macs is what selection costs: one multiply-accumulate a coordinate for each distance, to the claim and to
    every pattern.
    """
    if min(n_sentences, dim, patterns, top, articles) < 1:
        raise ValueError("n_sentences, dim, patterns, top and articles must be at least 1")
    some, every = articles * min(top, n_sentences), articles * n_sentences
    return {"passes": some, "passes_all": every, "saved": every - some, "macs": every * dim * (patterns + 1)}


def _scale(d):
    return 1 - (d - d.min()) / (d.max() - d.min() + TINY)


def example(seed=0):
    """Sentences of Hamlet as words by their place in a small vocabulary, networks of one and two blocks."""
    from ref.data import text
    from ref.tasks.quotes import quote_corpus, split_sentences

    rng = np.random.default_rng(seed)
    corpus = quote_corpus(rng, split_sentences(text())[:60], claims=4, extra=4)
    code = lambda words: [sum(map(ord, w)) % 60 for w in words]
    claim, article = code(corpus.claims[0]), [code(s) for s in corpus.articles[0]]
    limits = {"max_len": 24, "claim_max": 8, "cls_id": 61, "sep_id": 62, "pad_id": 63}
    ids, mask, types = encode_pairs([claim] * 5, article, **limits)
    sizes = {"vocab": 64, "context": 24, "hidden": 16, "std": 0.3}
    rot = init_rot(rng, dim=8, **sizes)
    match, memory = init_match(rng, dim=8, depth=2, **sizes), rng.standard_normal((4, 8))
    q, s = (
        sentence_vector(claim, rot.bert.word),
        np.stack([sentence_vector(t, rot.bert.word) for t in article]),
    )
    selection = select_key_sentences(q, s, memory)
    batch = selected_pairs(claim, article, selection, 3, limits)
    weight, positive = prediction_weight(np.array([0.9, 0.2, 0.6]), np.array([1, 1, 0]))
    heads = {"num_heads": 2}
    return [
        Example("rot_forward", (ids, mask, types, rot), heads, (3,)),
        Example("rot_loss", (ids, mask, types, rouge2(article, claim), rot), heads, (4,)),
        Example("kmeans", (s,), {"k": 2, "iters": 5}),
        Example("select_key_sentences", (q, s, memory)),
        Example("match_forward", (*batch, memory, match), heads, (6,)),
        Example("match_score", (claim, article, selection, memory, match), {**heads, **limits}, (4,)),
        Example("update_memory", (memory, (s - q)[:3], selection.pattern[:3], weight, positive)),
    ]
