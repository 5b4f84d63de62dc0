"""User-aware prefix-tuning: an image and a user's own words become a prefix that steers a frozen GPT-2.

Source: Wang et al. 2023 (arXiv 2312.04793), abstract and published summaries: its body was not to be had and
no code is public. The structure is the paper's; where it is silent we follow the closest open designs: the
mapping network is BLIP-2's query transformer (Li et al. 2023), the fusion ClipCap's transformer (Mokady et
al. 2021) with the user's words added to its sequence, and beam search ClipCap's.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.beam import beam_search
from ref.blocks.captions import bleu, cider, meteor, rouge_l
from ref.blocks.losses import cross_entropy
from ref.blocks.optim import adam, adam_init
from ref.blocks.tfidf import user_tfidf, user_words
from ref.blocks.transformer import (
    BlockParams,
    block_parameters,
    init_block,
    transformer_block,
    transformer_block_vjp,
)
from ref.checks import check_ids, check_num_heads
from ref.dims import dims, float64
from ref.example import Example
from ref.models.gpt import GPTParams, gpt_blocks, gpt_blocks_vjp, gpt_head, gpt_head_vjp, init_gpt
from ref.models.query_transformer import (
    MappingBlock,
    MappingParams,
    init_mapping,
    mapping_network,
    mapping_network_backward,
)

__all__ = [
    "CaptionModel", "CaptionSize", "FusionParams", "MappingBlock", "MappingParams", "beam_search",
    "bleu", "cider", "example", "fusion", "fusion_backward", "generate_caption", "init_fusion",
    "init_mapping", "mapping_network", "mapping_network_backward", "meteor", "personalized_caption",
    "prefix_lm_logits", "prefix_lm_logits_backward", "prefix_lm_loss", "prefix_lm_loss_backward",
    "rouge_l", "train_captioner", "trainable_count", "user_context", "user_tfidf", "user_words",
]  # fmt: skip


class FusionParams(NamedTuple):
    """Learned constants [n_p, d], whose outputs are the prefix; blocks without biases of q, k and v."""

    constants: np.ndarray
    blocks: tuple[BlockParams, ...]


@dataclass(frozen=True)
class CaptionModel:
    """What captioning needs: the trained parts, the frozen language model, the users' words.

    users: {user: (words [n_u, d], mask [n_u])}, as `user_context` makes them; heads of mapping, fusion and
    language model; stop_id ends a caption.
    """

    mapping: MappingParams
    fusion: FusionParams
    lm: GPTParams
    users: dict
    heads: tuple[int, int, int] = (4, 8, 4)
    stop_id: int | None = None


def fusion(visual_prefix, user, params: FusionParams, *, num_heads=8, user_mask=None, eps=1e-5):
    """The prefix [B, n_p, d]: pre-norm ReLU blocks over [visual_prefix; user; constants], the last part read.

    visual_prefix [B, n_q, d], user [B, n_u, d] (n_u may be 0: ClipCap), user_mask bool [B, n_u], True = word.
    Raises: ValueError naming the argument at fault.
    """
    hidden, _ = _fusion_states(visual_prefix, user, params, num_heads, user_mask, eps)
    return hidden[-1][:, -len(params.constants) :]


def fusion_backward(visual_prefix, user, params: FusionParams, dprefix, *, num_heads=8, user_mask=None,
                    eps=1e-5):  # fmt: skip
    """(dvisual_prefix, duser, FusionParams of gradients) of `fusion` for dprefix [B, n_p, d]."""
    hidden, mask = _fusion_states(visual_prefix, user, params, num_heads, user_mask, eps)
    dx, blocks = np.zeros_like(hidden[-1]), []
    dx[:, -len(params.constants) :] = dprefix
    for x, p in zip(hidden[-2::-1], params.blocks[::-1], strict=True):
        dx, grads = transformer_block_vjp(
            x, p, dx, num_heads=num_heads, mask=mask, eps=eps, activation="relu"
        )
        blocks.append(grads)
    n_q, n_u = visual_prefix.shape[1], user.shape[1]
    dconstants = dx[:, n_q + n_u :].sum(axis=0)
    return dx[:, :n_q], dx[:, n_q : n_q + n_u], FusionParams(dconstants, tuple(blocks[::-1]))


def prefix_lm_logits(prefix, tokens, mask, lm_params: GPTParams, *, num_heads, eps=1e-5):
    """Logits [B, n, V] of the caption's tokens, each after the prefix and the tokens before it.

    prefix [B, n_p, d], n_p >= 1; tokens int [B, n]; mask bool [B, n], True = caption: padding is not seen.
    Positions run over prefix and caption. Raises: ValueError naming the argument at fault.
    """
    hidden, _ = _lm_states(prefix, tokens, mask, lm_params, num_heads, eps)
    n_p = prefix.shape[1]
    return gpt_head(hidden[-1][:, n_p - 1 : -1], lm_params, eps=eps)


def prefix_lm_logits_backward(prefix, tokens, mask, lm_params: GPTParams, dlogits, *, num_heads, eps=1e-5):
    """(dprefix, None) of `prefix_lm_logits`: the gradient passes through the frozen language model."""
    hidden, seen = _lm_states(prefix, tokens, mask, lm_params, num_heads, eps)
    n_p, dx = prefix.shape[1], np.zeros_like(hidden[-1])
    dx[:, n_p - 1 : -1] = gpt_head_vjp(hidden[-1][:, n_p - 1 : -1], lm_params, float64(dlogits), eps=eps)[0]
    return gpt_blocks_vjp(hidden, lm_params, dx, num_heads=num_heads, mask=seen, eps=eps)[0][:, :n_p], None


def prefix_lm_loss(prefix, tokens, mask, lm_params: GPTParams, *, num_heads, eps=1e-5):
    """Mean over the caption's tokens of -log p(token | prefix, tokens before it), in nats.

    Raises: ValueError for a mask without a token, and as `prefix_lm_logits`.
    """
    logits = prefix_lm_logits(prefix, tokens, mask, lm_params, num_heads=num_heads, eps=eps)
    return cross_entropy(logits, _labels(tokens, mask), ignore=-1)[0]


def prefix_lm_loss_backward(prefix, tokens, mask, lm_params: GPTParams, dloss, *, num_heads, eps=1e-5):
    """(dprefix, None) of `prefix_lm_loss` for the cotangent dloss []."""
    logits = prefix_lm_logits(prefix, tokens, mask, lm_params, num_heads=num_heads, eps=eps)
    dlogits = dloss * cross_entropy(logits, _labels(tokens, mask), ignore=-1)[1]
    return prefix_lm_logits_backward(prefix, tokens, mask, lm_params, dlogits, num_heads=num_heads, eps=eps)


def generate_caption(prefix, lm_params: GPTParams, *, num_heads, beam=5, max_len=20, stop_id=None):
    """Lists of token ids, best first, for one prefix [n_p, d]; beam 1 is greedy. See `beam_search`."""
    n = dims(prefix=(prefix, "n_p d"), wte=(lm_params.wte, "V d"), wpe=(lm_params.wpe, "P d"))
    if n["n_p"] + max_len - 1 > n["P"]:
        raise ValueError(
            f"prefix of {n['n_p']} and max_len={max_len} exceed the {n['P']} positions of lm_params"
        )
    if not np.isfinite(prefix).all():
        raise ValueError("prefix must be finite")

    def step(prefix, tokens):
        many, mask = np.broadcast_to(prefix, (len(tokens), *prefix.shape)), np.ones(tokens.shape, bool)
        hidden, _ = _lm_states(many, tokens, mask, lm_params, num_heads, 1e-5)
        return gpt_head(hidden[-1][:, -1], lm_params)

    return beam_search(step, float64(prefix), beam=beam, max_len=max_len, stop_id=stop_id)


def personalized_caption(image_tokens, user_id, model: CaptionModel, *, beam=5, max_len=20, unknown="error",
                         require_user=False):  # fmt: skip
    """Captions (lists of ids, best first) of one image [n_v, d_v] in the manner of a user.

    unknown: "error", or "mean" to give a stranger the mean of all users. require_user: refuse a user without
    a word. Raises: ValueError naming the argument at fault, also for an image that is not finite.
    """
    if not np.isfinite(image_tokens).all():
        raise ValueError("image_tokens must be finite")
    if user_id in model.users:
        words, mask = model.users[user_id]
    elif unknown == "mean" and model.users:
        words, mask = (np.stack(x) for x in zip(*model.users.values(), strict=True))
        count = mask.sum(axis=0)
        words = (words * mask[..., None]).sum(axis=0) / np.maximum(count, 1)[:, None]
        mask = count > 0
    else:
        raise ValueError(
            f'user_id {user_id!r} is none of the {len(model.users)} users (unknown="mean" takes their mean)'
        )
    if require_user and not mask.any():
        raise ValueError(f"user_id {user_id!r} has no word")
    visual = mapping_network(image_tokens[None], model.mapping, num_heads=model.heads[0])
    prefix = fusion(visual, words[None], model.fusion, num_heads=model.heads[1], user_mask=mask[None])[0]
    return generate_caption(
        prefix, model.lm, num_heads=model.heads[2], beam=beam, max_len=max_len, stop_id=model.stop_id
    )


def user_context(words, encode, wte, k):
    """(embeddings [k, d], mask [k]) of a user's words: the mean of the frozen embeddings of each word's ids.

    encode: word -> ids of the language model, at least one. Missing words are zeros and masked.
    """
    if k < 0 or any(len(encode(word)) < 1 for word in words[:k]):
        raise ValueError(
            f"k must not be negative, and encode give every word an id, got {k=} and {words[:k]}"
        )
    rows, mask = np.zeros((k, wte.shape[1])), np.zeros(k, bool)
    for i, word in enumerate(words[:k]):
        rows[i], mask[i] = float64(wte)[np.asarray(encode(word))].mean(axis=0), True
    return rows, mask


def train_captioner(model: CaptionModel, data, *, steps, seed, batch=32, lr=1e-3, warmup=10):
    """(model, history [steps]): Adam on mapping and fusion; language model and words stay as they are.

    data: (visual [N, n_v, d_v], users [N], tokens [N, n], mask [N, n]). The rate rises over `warmup` steps
    and falls along a line to 0.
    """
    visual, users, tokens, mask = data
    if steps < 1 or batch < 1 or not len(visual) == len(users) == len(tokens) == len(mask) > 0:
        raise ValueError(f"need steps and batch >= 1 and data of equal length, got {steps=}, {batch=}")
    if unknown := set(users) - set(model.users):
        raise ValueError(
            f"users must be among the model's {len(model.users)}, got {sorted(unknown, key=str)}"
        )
    rng, trained = np.random.default_rng(seed), (model.mapping, model.fusion)
    state, history = adam_init(trained), []
    h_map, h_fuse, h_lm = model.heads
    for step in range(steps):
        at = rng.integers(0, len(visual), batch)
        words, known = (np.stack(x) for x in zip(*(model.users[users[i]] for i in at), strict=True))
        options = {"num_heads": h_fuse, "user_mask": known}
        v = mapping_network(visual[at], trained[0], num_heads=h_map)
        prefix = fusion(v, words, trained[1], **options)
        caption = tokens[at], mask[at], model.lm
        history.append(prefix_lm_loss(prefix, *caption, num_heads=h_lm))
        dprefix, _ = prefix_lm_loss_backward(prefix, *caption, 1.0, num_heads=h_lm)
        dv, _, dfusion = fusion_backward(v, words, trained[1], dprefix, **options)
        _, dmapping = mapping_network_backward(visual[at], trained[0], dv, num_heads=h_map)
        rate = lr * min((step + 1) / (warmup + 1), (steps - step) / max(steps - warmup, 1))
        trained, state = adam(trained, (dmapping, dfusion), state, lr=rate)
    return CaptionModel(*trained, model.lm, model.users, model.heads, model.stop_id), np.array(history)


def init_fusion(rng, *, prefix, dim, depth, std=0.02) -> FusionParams:
    """Constants and weights normal (std), MLP ratio 2."""
    none = {"b_q": None, "b_k": None, "b_v": None}
    blocks = tuple(init_block(rng, dim, 2 * dim, std=std)._replace(**none) for _ in range(depth))
    return FusionParams(std * rng.standard_normal((prefix, dim)), blocks)


@dataclass(frozen=True)
class CaptionSize:
    """Sizes at the paper's scale: CLIP ViT-B/32 and GPT-2 small, frozen; queries and prefix are ours."""

    visual_dim: int = 768
    dim: int = 768
    queries: int = 32
    mapping_depth: int = 2
    fusion_depth: int = 8
    prefix: int = 10
    lm_dim: int = 768
    lm_depth: int = 12
    vocab: int = 50257
    context: int = 1024
    encoder: int = 151_277_313


def trainable_count(config: CaptionSize):
    """{part: numbers}: mapping and fusion train, the other two do not; "share" is what trains."""
    c, d, v, e = config, config.dim, config.visual_dim, config.lm_dim
    block = 4 * d * d + 4 * d + 2 * d * d + 2 * v * d + 4 * d + 6 * d + 8 * d * d + 5 * d
    parts = {
        "mapping": c.queries * d + 2 * d + c.mapping_depth * block + d * e + e,
        "fusion": c.prefix * e + c.fusion_depth * (8 * e * e + 8 * e),
        "language model": (c.vocab + c.context) * e + c.lm_depth * block_parameters(e, 4 * e) + 2 * e,
        "encoder": c.encoder,
    }
    trained = parts["mapping"] + parts["fusion"]
    return {**parts, "trained": trained, "share": trained / sum(parts.values())}


def _fusion_states(visual_prefix, user, params, num_heads, user_mask, eps):
    """([sequence before each block, and after the last], mask of keys or None)."""
    n = dims(visual_prefix=(visual_prefix, "B n_q d"), user=(user, "B n_u d"),
             constants=(params.constants, "n_p d"))  # fmt: skip
    if n["n_p"] < 1:
        raise ValueError("params.constants must hold at least one, at whose place the prefix is read")
    check_num_heads(n["d"], num_heads)
    constants, mask = np.broadcast_to(params.constants, (n["B"], n["n_p"], n["d"])), None
    if user_mask is not None:
        dims(user=(user, "B n_u d"), user_mask=(user_mask, "B n_u"))
        mask = np.ones((n["B"], 1, 1, n["n_q"] + n["n_u"] + n["n_p"]), bool)
        mask[:, 0, 0, n["n_q"] : n["n_q"] + n["n_u"]] = user_mask
        user = np.where(np.asarray(user_mask)[..., None], user, 0.0)  # padding may hold anything
    hidden = [np.concatenate([float64(visual_prefix), float64(user), constants], axis=1)]
    for p in params.blocks:
        hidden.append(
            transformer_block(hidden[-1], p, num_heads=num_heads, mask=mask, eps=eps, activation="relu")
        )
    return hidden, mask


def _lm_states(prefix, tokens, mask, lm, num_heads, eps):
    """([hidden states of prefix and caption before each block, and after the last], mask of keys)."""
    n = dims(prefix=(prefix, "B n_p d"), tokens=(tokens, "B n"), mask=(mask, "B n"), wte=(lm.wte, "V d"))
    total = n["n_p"] + n["n"]
    if n["n_p"] < 1:
        raise ValueError("prefix must hold at least one position, from which the first token is told")
    if total > len(lm.wpe):
        raise ValueError(
            f"prefix and tokens have {total} positions, more than the {len(lm.wpe)} of lm_params"
        )
    tokens = check_ids("tokens", tokens, n["V"])
    x = np.concatenate([float64(prefix), lm.wte[tokens]], axis=1) + lm.wpe[:total]
    seen = np.concatenate([np.ones((n["B"], n["n_p"]), bool), np.asarray(mask, bool)], axis=1)[:, None, None]
    return gpt_blocks(x, lm, num_heads=num_heads, mask=seen, eps=eps), seen


def _labels(tokens, mask):
    if not np.any(mask):
        raise ValueError("mask must hold at least one caption token")
    return np.where(mask, tokens, -1)


def example(seed=0):
    """Two digits as patches, two users of three words, a caption of four tokens in a vocabulary of twelve."""
    from ref.data import digits
    from ref.models.vit import patchify

    rng = np.random.default_rng(seed)
    visual = patchify(digits()[0][:2, ..., None] / 8 - 1, 4)
    mapping = init_mapping(rng, queries=3, dim=8, visual_dim=16, depth=1, out=16, std=0.3)
    fuse = init_fusion(rng, prefix=2, dim=16, depth=1, std=0.3)
    lm = init_gpt(rng, vocab=12, context=8, dim=16, depth=1, std=0.3)
    user, user_mask = lm.wte[rng.integers(0, 12, (2, 3))], np.array([[True] * 3, [True, True, False]])
    tokens, mask = rng.integers(0, 12, (2, 4)), np.array([[True] * 4, [True] * 3 + [False]])
    seen = mapping_network(visual, mapping, num_heads=2)
    prefix = fusion(seen, user, fuse, num_heads=2, user_mask=user_mask)
    return [
        Example("mapping_network", (visual, mapping), {"num_heads": 2}, (0, 1)),
        Example("fusion", (seen, user, fuse), {"num_heads": 2, "user_mask": user_mask}, (0, 1, 2)),
        Example("prefix_lm_logits", (prefix, tokens, mask, lm), {"num_heads": 2}, (0,)),
        Example("prefix_lm_loss", (prefix, tokens, mask, lm), {"num_heads": 2}, (0,)),
    ]
