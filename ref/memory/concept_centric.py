"""Concept-centric transformer: slots of the image at hand become concepts, and concepts alone make the class.

Source: Hong et al. 2024 (arXiv 2305.15775) and the code released with it; Rigotti et al. 2022 for the
decision and the losses. Left out: the backbone, whose features come in, and dropout. Ours: the
slots may read the patches (the released code gives them the class token only), and the unsupervised stream
has its own attention. The slot modules are in ref/blocks/slots.py.
"""

import numpy as np

from ref.blocks.attention import join_heads, split_heads
from ref.blocks.losses import cross_entropy
from ref.blocks.mlp import linear, linear_vjp
from ref.blocks.slots import (
    SlotParams,
    concept_bo_qsa,
    concept_bo_qsa_vjp,
    concept_isa,
    concept_isa_vjp,
    concept_slot_attention,
    concept_slot_attention_vjp,
    init_slots,
    slot_macs,
)
from ref.blocks.softmax import softmax, softmax_vjp
from ref.checks import check_num_heads
from ref.dims import dims, float64
from ref.example import Example
from ref.models.cct import (
    ITERATIONS,
    CctParams,
    ConceptStream,
    CrossParams,
    cct_params,
    check_variant,
    init_cct,
)
from ref.tasks.concepts import shapes_concepts

__all__ = [
    "CctParams", "ConceptStream", "CrossParams", "SlotParams", "cct_classify", "cct_classify_vjp", "cct_loss",
    "cct_loss_vjp", "cct_params", "concept_bo_qsa", "concept_bo_qsa_vjp", "concept_consistency",
    "concept_contributions", "concept_cross_attention", "concept_cross_attention_vjp", "concept_isa",
    "concept_isa_vjp", "concept_slot_attention", "concept_slot_attention_vjp", "example", "explanation_loss",
    "explanation_loss_vjp", "init_cct", "shapes_concepts", "slot_macs", "sparsity_loss", "sparsity_loss_vjp",
]  # fmt: skip

SLOTS = {
    "sa": (concept_slot_attention, concept_slot_attention_vjp),
    "isa": (concept_isa, concept_isa_vjp),
    "qsa": (concept_bo_qsa, concept_bo_qsa_vjp),
}


def concept_cross_attention(tokens, concepts, params: CrossParams, *, heads):
    """(logits [B, N, classes], attn [B, H, N, C]): each token's mean of what the concepts say of the class.

    Args: tokens [B, N, d], concepts [B, C, d]. The values end in logits; nothing follows them.
    Raises: ValueError unless heads divides d and the shapes agree.
    """
    _, _, v, attn = _attend(tokens, concepts, params, heads)
    return linear(join_heads(attn @ v), params.w_proj, params.b_proj), attn


def concept_cross_attention_vjp(tokens, concepts, params: CrossParams, dlogits, dattn=None, *, heads):
    """(dtokens, dconcepts, dparams) for dlogits [B, N, classes] and, unless None, dattn [B, H, N, C]."""
    p, (q, k, v, attn) = params, _attend(tokens, concepts, params, heads)
    do, dw_proj, db_proj = linear_vjp(join_heads(attn @ v), p.w_proj, float64(dlogits))
    do = split_heads(do, heads)
    da = do @ np.swapaxes(v, -1, -2)
    ds = q.shape[-1] ** -0.5 * softmax_vjp(attn, da if dattn is None else da + dattn)
    dtokens, dw_q, _ = linear_vjp(float64(tokens), p.w_q, join_heads(ds @ k))
    dkv = np.concatenate([join_heads(ds.mT @ q), join_heads(attn.mT @ do)], axis=-1)
    dconcepts, dw_kv, _ = linear_vjp(float64(concepts), p.w_kv, dkv)
    return dtokens, dconcepts, CrossParams(dw_q, dw_kv, dw_proj, db_proj)


def concept_contributions(tokens, concepts, params: CrossParams, *, heads):
    """[B, N, C, classes]: what each concept adds to each logit; with b_proj their sum is the logits."""
    _, _, v, attn = _attend(tokens, concepts, params, heads)
    spoken = v @ float64(params.w_proj).reshape(heads, v.shape[-1], -1)  # [B, H, C, classes]
    return (attn[..., None] * spoken[:, :, None]).sum(axis=1)


def explanation_loss(attn, target):
    """C times the mean of (attn - target / its row's sum)^2, over the rows of target that hold no NaN.

    Args: attn [B, N, C]; target [B, N, C] >= 0, known concepts of the token; a row with NaN is not known.
    Returns: 0 if no row is known. Raises: ValueError for a known row that sums to 0.
    """
    known, want = _targets(attn, target)
    n = known.sum() * attn.shape[-1]
    error = np.where(known[..., None], float64(attn) - want, 0.0)
    return attn.shape[-1] * (error**2).sum() / max(n, 1)


def explanation_loss_vjp(attn, target, dloss=1.0):
    """dattn [B, N, C] of `explanation_loss`; 0 in rows that are not known."""
    known, want = _targets(attn, target)
    return 2 * dloss * np.where(known[..., None], float64(attn) - want, 0.0) / max(known.sum(), 1)


def sparsity_loss(attn, *, eps=1e-8):
    """mean(-a log(a + eps)): attn [B, N, C] in [0, 1] -> a number in about [0, log(C) / C]."""
    a = float64(attn)
    return np.mean(-a * np.log(a + eps))


def sparsity_loss_vjp(attn, dloss=1.0, *, eps=1e-8):
    """dattn [B, N, C] of `sparsity_loss`."""
    a = float64(attn)
    return -dloss * (np.log(a + eps) + a / (a + eps)) / a.size


def cct_loss(
    logits, labels, concept_attn, concept_target, *, spatial_attn=None, spatial_target=None, lambda_e=1.0,
    lambda_s=0.5,
):  # fmt: skip
    """(cross-entropy + lambda_e explanation + lambda_s sparsity, dict of the three).

    Args: logits [B, classes], labels int [B]; concept_attn [B, 1, C] and spatial_attn [B, P, S], means over
      heads; their targets, or None where nothing is annotated. Each stream adds its explanation and sparsity.
    Raises: ValueError for a negative lambda and as its parts.
    """
    for name, value in (("lambda_e", lambda_e), ("lambda_s", lambda_s)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    streams = _annotated(concept_attn, concept_target, spatial_attn, spatial_target)
    parts = {
        "classification": cross_entropy(logits, labels)[0],
        "explanation": sum(explanation_loss(a, t) for a, t in streams if t is not None),
        "sparsity": sum(sparsity_loss(a) for a, _ in streams),
    }
    return parts["classification"] + lambda_e * parts["explanation"] + lambda_s * parts["sparsity"], parts


def cct_loss_vjp(
    logits, labels, concept_attn, concept_target, *, spatial_attn=None, spatial_target=None, lambda_e=1.0,
    lambda_s=0.5,
):  # fmt: skip
    """(dlogits, dconcept_attn, dspatial_attn) of the loss; None for a stream that there is not."""

    def of_stream(attn, target):
        if attn is None:
            return None
        d = sparsity_loss_vjp(attn, lambda_s)
        return d if target is None else d + explanation_loss_vjp(attn, target, lambda_e)

    dlogits = cross_entropy(logits, labels)[1]
    return dlogits, of_stream(concept_attn, concept_target), of_stream(spatial_attn, spatial_target)


def cct_classify(
    features_cls, features_patch, params: CctParams, *, heads, variant="sa", slot_inputs="patches",
    slot_spatial=False, iterations=None, noise=None,
):  # fmt: skip
    """dict of logits [B, classes], concept_attn [B, 1, C] and spatial_attn [B, P, S] (or None).

    Global concepts answer the class token, concepts of patches the patches, and the patches' logits are
    averaged; streams add their logits. Attentions are means over heads.
    Args: features_cls [B, 1, d], features_patch [B, P, d]. variant: "sa", "isa", "qsa" or "ct".
      slot_inputs: what global slots read, "patches" or "cls". slot_spatial: "sa" makes slots of the patches'
      concepts too; "isa" and "qsa" always do. iterations: None is 1, 3, 2. noise: dict of arrays [B, C, d] by
      stream for "sa"; None, or a stream without one, starts at the mean.
    Raises: ValueError naming the argument at fault.
    """
    options = _options(features_cls, features_patch, params, variant, slot_inputs, iterations)
    out = {"logits": 0.0, "concept_attn": None, "spatial_attn": None}
    for name, stream, tokens, x in _streams(params, features_cls, features_patch, slot_inputs):
        fixed = variant == "ct" or (name == "spatial" and variant == "sa" and not slot_spatial)
        concepts, _ = _concepts(name, stream, x, variant, fixed, options, noise)
        logits, attn = concept_cross_attention(tokens, concepts, stream.cross, heads=heads)
        out["logits"] = out["logits"] + logits.mean(axis=1)
        if name != "unsupervised":
            out["concept_attn" if name == "concepts" else "spatial_attn"] = attn.mean(axis=1)
    return out


def cct_classify_vjp(
    features_cls, features_patch, params: CctParams, dlogits, dconcept_attn=None, dspatial_attn=None, *,
    heads, variant="sa", slot_inputs="patches", slot_spatial=False, iterations=None, noise=None,
):  # fmt: skip
    """(dfeatures_cls, dfeatures_patch, dparams) of `cct_classify`; None for an attention without one."""
    options = _options(features_cls, features_patch, params, variant, slot_inputs, iterations)
    given = {"concepts": dconcept_attn, "spatial": dspatial_attn, "unsupervised": None}
    d = {"cls": np.zeros(features_cls.shape), "patches": np.zeros(features_patch.shape)}
    grads = dict.fromkeys(CctParams._fields)
    for name, stream, tokens, x in _streams(params, features_cls, features_patch, slot_inputs):
        fixed = variant == "ct" or (name == "spatial" and variant == "sa" and not slot_spatial)
        concepts, start = _concepts(name, stream, x, variant, fixed, options, noise)
        n, dattn = tokens.shape[1], given[name]
        every = np.broadcast_to(float64(dlogits)[:, None] / n, (len(dlogits), n, dlogits.shape[-1]))
        dattn = None if dattn is None else dattn[:, None] / heads
        dtokens, dconcepts, dcross = concept_cross_attention_vjp(
            tokens, concepts, stream.cross, every, dattn, heads=heads
        )
        d["patches" if name == "spatial" else "cls"] += dtokens
        if fixed:
            grads[name] = ConceptStream(dconcepts.sum(axis=0), None, None, dcross)
            continue
        dx, dstart, dslots = SLOTS[variant][1](x, start, stream.slots, dconcepts, **options)
        d["patches" if name == "spatial" else slot_inputs] += dx
        dstart = None if variant == "sa" else dstart.sum(axis=0)
        grads[name] = ConceptStream(dstart, dslots, dconcepts.sum(axis=0, keepdims=True), dcross)
    return d["cls"], d["patches"], CctParams(**grads)


def concept_consistency(attn, labels, attn_augmented):
    """dict of within, between, consistency and flip_rate of explanations attn [n, C], labels int [n].

    within, between: mean cosine of two images of one class, of two classes; consistency: their difference.
    flip_rate: share of images whose largest concept is another in attn_augmented [n, C].
    Raises: ValueError unless some class occurs twice and there are two classes.
    """
    dims(attn=(attn, "n C"), labels=(labels, "n"), attn_augmented=(attn_augmented, "n C"))
    a, labels = float64(attn), np.asarray(labels)
    unit = a / np.linalg.norm(a, axis=-1, keepdims=True)
    cosine, same = unit @ unit.T, labels[:, None] == labels
    pairs = ~np.eye(len(a), dtype=bool)
    if not (same & pairs).any() or same.all():
        raise ValueError("labels must hold a class twice, and two classes")
    within, between = cosine[same & pairs].mean(), cosine[~same].mean()
    flipped = a.argmax(axis=-1) != float64(attn_augmented).argmax(axis=-1)
    gap = within - between
    return {"within": within, "between": between, "consistency": gap, "flip_rate": flipped.mean()}


def _attend(tokens, concepts, params, heads):
    """q, k, v in heads, and the attention over concepts [B, H, N, C]."""
    d = dims(
        tokens=(tokens, "B N d"), concepts=(concepts, "B C d"), w_q=(params.w_q, "d d"),
        w_proj=(params.w_proj, "d classes"),
    )["d"]  # fmt: skip
    dims(w_kv=(params.w_kv, f"{d} {2 * d}"))
    check_num_heads(d, heads, name="heads")
    q = split_heads(linear(tokens, params.w_q), heads)
    k, v = (split_heads(y, heads) for y in np.split(linear(concepts, params.w_kv), 2, axis=-1))
    return q, k, v, softmax(q @ np.swapaxes(k, -1, -2) * q.shape[-1] ** -0.5)


def _targets(attn, target):
    """(which rows are known [B, N], the targets, each known row summing to 1)."""
    dims(attn=(attn, "B N C"), target=(target, "B N C"))
    target = float64(target)
    known = ~np.isnan(target).any(axis=-1)
    total = target.sum(axis=-1)
    if not (total[known] > 0).all():
        raise ValueError("target must have a positive sum in every row that holds no NaN")
    return known, target / np.where(known, total, 1.0)[..., None]


def _annotated(concept_attn, concept_target, spatial_attn, spatial_target):
    if spatial_attn is None and spatial_target is not None:
        raise ValueError("spatial_target needs spatial_attn")
    if concept_attn is None and concept_target is not None:
        raise ValueError("concept_target needs concept_attn")
    both = (concept_attn, concept_target), (spatial_attn, spatial_target)
    return [(attn, target) for attn, target in both if attn is not None]


def _options(features_cls, features_patch, params, variant, slot_inputs, iterations):
    dims(features_cls=(features_cls, "B 1 d"), features_patch=(features_patch, "B P d"))
    check_variant(variant)
    if slot_inputs not in ("patches", "cls"):
        raise ValueError(f'slot_inputs must be "patches" or "cls", got {slot_inputs!r}')
    if all(stream is None for stream in params):
        raise ValueError("params must hold at least one stream of concepts")
    return {"iterations": ITERATIONS[variant] if iterations is None else iterations}


def _streams(params, features_cls, features_patch, slot_inputs):
    """(name, stream, the tokens that ask, what the slots read) of every stream there is."""
    x = features_cls if slot_inputs == "cls" else features_patch
    asks = (features_cls, x), (features_patch, features_patch), (features_cls, x)
    each = zip(params._fields, params, asks, strict=True)
    return [(name, stream, *ask) for name, stream, ask in each if stream is not None]


def _concepts(name, stream, x, variant, fixed, options, noise):
    """(concepts [B, C, d], what the slots started from: noise or first slots)."""
    if fixed:
        if stream.start is None:
            raise ValueError(f"params.{name} must have start, the vectors of its concepts")
        return np.broadcast_to(stream.start, (len(x), *stream.start.shape)), None
    if stream.slots is None:
        raise ValueError(f"params.{name} must have slots for variant {variant!r}: see init_cct")
    start = (noise or {}).get(name) if variant == "sa" else stream.start
    start = np.zeros(stream.pos.shape[1:]) if start is None else start
    start = np.broadcast_to(start, (len(x), *stream.pos.shape[1:]))
    slots, _ = SLOTS[variant][0](x, start, stream.slots, **options)
    return slots + stream.pos, start


def example(seed=0):
    """Four pictures of coloured shapes, their patches mapped to 12 channels; six attributes as concepts."""
    from ref.models.vit import patchify
    from ref.tasks.concepts import patch_targets

    rng = np.random.default_rng(seed)
    data = shapes_concepts(seed, 4)
    x = linear(patchify(data["image"], 4), rng.standard_normal((48, 12)) / 4)
    cls = x.mean(axis=1, keepdims=True)
    params = init_cct(seed, 12, concepts=6, spatial_concepts=6, classes=9, variant="qsa")
    with_noise = init_slots(rng, 12, 12)
    stream, noise = params.concepts, rng.standard_normal((4, 6, 12))
    start = np.broadcast_to(stream.start, noise.shape)
    slots, _ = concept_bo_qsa(x, start, stream.slots)
    _, attn = concept_cross_attention(x, slots, stream.cross, heads=3)
    attn, target = attn.mean(axis=1), patch_targets(data["masks"], 4)
    whole = data["concepts"][:, None] * 1.0
    logits = rng.standard_normal((4, 9))
    # The implicit variants stop gradients on purpose, so they are not compared with the exact ones.
    return [
        Example("concept_slot_attention", (x, noise, with_noise), {"iterations": 2}, (0, 1, 2)),
        Example("concept_isa", (x, start, stream.slots)),
        Example("concept_bo_qsa", (x, start, stream.slots)),
        Example("concept_cross_attention", (x, slots, stream.cross), {"heads": 3}, (0, 1, 2)),
        Example("concept_contributions", (cls, slots, stream.cross), {"heads": 3}, (0, 1, 2)),
        Example("explanation_loss", (attn, target), {}, (0,)),
        Example("sparsity_loss", (attn,), {}, (0,)),
        Example("cct_loss", (logits, data["label"], attn[:, :1], whole), {}, (0, 2)),
        Example("cct_classify", (cls, x, params), {"heads": 3, "variant": "qsa"}),
    ]
