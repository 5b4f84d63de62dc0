"""Local learning: a transformer in modules, each trained by a loss of its own, none waiting for another.

Source: Pathak, Zhang and Samaras 2023 (WACV, arXiv 2212.14215), no released code: a module keeps what it was
given by reconstructing its input features. The baseline, which reconstructs the image, is InfoPro's
(ref/blocks/auxiliary.py). Our choices, where the paper was silent: mean squared error for features, the
tokens behind the patch embedding as the first target, the weights' schedule, plain gradient descent.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.auxiliary import (
    EPS,
    AuxParams,
    FeatureDecoderParams,
    ImageDecoderParams,
    affine,
    as_grid,
    aux_classifier,
    aux_classifier_loss,
    bce_reconstruction,
    bce_reconstruction_vjp,
    decoder_kind,
    feature_decoder,
    feature_decoder_vjp,
    image_decoder,
    image_decoder_vjp,
    init_aux,
    init_feature_decoder,
    init_image_decoder,
    mse_reconstruction,
    mse_reconstruction_vjp,
    supervised_contrastive,
    supervised_contrastive_vjp,
    upsample_bilinear,
)
from ref.blocks.losses import cross_entropy
from ref.blocks.mlp import linear, linear_vjp, relu
from ref.blocks.norms import layer_norm
from ref.blocks.optim import tree_map
from ref.blocks.transformer import transformer_block, transformer_block_vjp
from ref.checks import one_of
from ref.dims import dims, float64
from ref.example import Example
from ref.models.modules import (
    METHODS,
    ModuleBytes,
    activation_memory,
    check_ends,
    pipeline_times,
    split_blocks,
)
from ref.models.shapes import BlockShape, NetShape, swin_tiny, vit_shape
from ref.models.vit import (
    ViTParams,
    classify,
    embed_patches,
    embed_patches_vjp,
    head_vjp,
    init_vit,
    pool,
    pool_vjp,
)

__all__ = [
    "AuxParams", "BlockShape", "FeatureDecoderParams", "ImageDecoderParams", "LocalAux", "LocalParams",
    "LossParts", "ModuleBytes", "NetShape", "TokenHead", "activation_memory", "aux_classifier",
    "aux_classifier_loss", "bce_reconstruction", "example", "feature_decoder", "feature_decoder_vjp",
    "image_decoder", "init_feature_decoder", "init_local", "lambda_schedule", "local_gradients",
    "local_loss", "local_loss_vjp", "local_train_step", "mse_reconstruction", "pipeline_times",
    "split_blocks", "supervised_contrastive", "swin_tiny", "upsample_bilinear", "vit_shape",
]  # fmt: skip


class TokenHead(NamedTuple):
    """A classifier of the mean token: relu(mean w1 + b1) w2 + b2, w1 [C, h], w2 [h, K]."""

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray


class LocalAux(NamedTuple):
    """What helps one module and is dropped afterwards: a decoder (of features or of the image) and a head."""

    decoder: FeatureDecoderParams | ImageDecoderParams | None
    head: TokenHead


class LocalParams(NamedTuple):
    """The network, without a class token, and one LocalAux for every module but the last."""

    net: ViTParams
    aux: tuple[LocalAux, ...]


class LossParts(NamedTuple):
    """The two losses of a module before their weights; rec is 0 where nothing is reconstructed."""

    rec: float
    cls: float


def lambda_schedule(k_index, modules, *, first, last):
    """first (1 - r) + last r with r = k_index / (modules - 2), k_index in 0..modules - 2; r = 0 for two."""
    if not (modules >= 2 and 0 <= k_index <= modules - 2):
        raise ValueError(f"need modules >= 2 and k_index in 0..modules - 2, got {modules=}, {k_index=}")
    ratio = k_index / max(modules - 2, 1)
    return first * (1 - ratio) + last * ratio


def local_loss(h, target, labels, aux: LocalAux, *, lambda_rec, lambda_cls, rec="mse", cls="cross_entropy"):
    """(lambda_rec rec + lambda_cls cls, LossParts) of a module's output h [B, N, C].

    rec: "mse" against target [B, N, P], the features it was given; "bce" against target [B, S, S, 3], the
    image in [0, 1]. cls: "cross_entropy" of the head's logits, or "contrast" of its outputs. target and
    labels are constants. Without a decoder, or with lambda_rec = 0, nothing is reconstructed and rec is 0.
    Raises: ValueError naming the argument at fault.
    """
    check_local(h, labels, aux, lambda_rec, lambda_cls, rec, cls)
    parts = [0.0, 0.0]
    if aux.decoder is not None and lambda_rec:
        guess = _reconstruct(h, aux.decoder, target, rec)
        parts[0] = (mse_reconstruction if rec == "mse" else bce_reconstruction)(guess, target)
    out = _head(h, aux.head)[-1]
    parts[1] = (
        cross_entropy(out, labels)[0] if cls == "cross_entropy" else supervised_contrastive(out, labels)
    )
    return lambda_rec * parts[0] + lambda_cls * parts[1], LossParts(*parts)


def local_loss_vjp(
    h, target, labels, aux: LocalAux, *, lambda_rec, lambda_cls, rec="mse", cls="cross_entropy"
):
    """(dh, LocalAux of gradients) of `local_loss`; that of a decoder which is not used is None."""
    check_local(h, labels, aux, lambda_rec, lambda_cls, rec, cls)
    dh, ddecoder = np.zeros(h.shape), None
    if aux.decoder is not None and lambda_rec:
        guess = _reconstruct(h, aux.decoder, target, rec)
        if rec == "mse":
            d = lambda_rec * mse_reconstruction_vjp(guess, target)
            dh, ddecoder = feature_decoder_vjp(h, aux.decoder, d, kind=decoder_kind(aux.decoder))
        else:
            d = lambda_rec * bce_reconstruction_vjp(guess, target)
            dgrid, ddecoder = image_decoder_vjp(as_grid(h), aux.decoder, d, image_size=target.shape[1])
            dh = dgrid.reshape(h.shape)
    p, (pooled, hidden, out) = aux.head, _head(h, aux.head)
    dout = (
        cross_entropy(out, labels)[1] if cls == "cross_entropy" else supervised_contrastive_vjp(out, labels)
    )
    d, dw2, db2 = linear_vjp(relu(hidden), p.w2, lambda_cls * dout)
    d, dw1, db1 = linear_vjp(pooled, p.w1, d * (hidden > 0))
    return dh + d[:, None] / h.shape[1], LocalAux(ddecoder, TokenHead(dw1, db1, dw2, db2))


def local_gradients(params: LocalParams, batch, *, boundaries, method="feature", lambda_rec=1.0,
                    lambda_cls=1.0, num_heads=4, first_target="embedding", normalize_target=False,
                    cls="cross_entropy"):  # fmt: skip
    """(LocalParams of gradients, [LossParts] by module) of one batch: (images [B, H, W, C], labels int [B]).

    Every module runs on the output of the one before, held constant, and ends its own gradient there. Args
    and Raises as for `local_train_step`.
    """
    images, labels = batch
    check_split(params, images, labels, boundaries, method, first_target)
    for name, w in (("lambda_rec", lambda_rec), ("lambda_cls", lambda_cls)):
        if np.ndim(w) and len(w) != len(boundaries) - 1:
            need = f"one number, or {len(boundaries) - 1}, one for each module but the last"
            raise ValueError(f"{name} must be {need}, got {w}")
    images, net = float64(images), params.net
    weigh = lambda w, k: float(w[k] if np.ndim(w) else w)
    h = embed_patches(images, net)
    blocks, aux, parts, start, first = [], [], [], 0, None
    ends = (len(net.blocks),) if method == "e2e" else boundaries
    for k, end in enumerate(ends):
        inputs, target = [h], h
        for block in net.blocks[start:end]:
            inputs.append(transformer_block(inputs[-1], block, num_heads=num_heads, eps=EPS))
        h = inputs[-1]
        if k == len(ends) - 1:
            loss, dlogits = cross_entropy(classify(h, net, eps=EPS), labels)
            dpooled, last = head_vjp(pool(h, net), net, dlogits, eps=EPS)
            d, part = pool_vjp(h, net, dpooled), LossParts(0.0, loss)
        else:
            to_image = method == "infopro" or (k == 0 and first_target == "image")
            target = images if to_image else _standard(target) if normalize_target else target
            options = {"lambda_rec": 0.0 if method == "greedy" else weigh(lambda_rec, k),
                       "lambda_cls": weigh(lambda_cls, k), "cls": cls,
                       "rec": "bce" if to_image else "mse"}  # fmt: skip
            part = local_loss(h, target, labels, params.aux[k], **options)[1]
            d, daux = local_loss_vjp(h, target, labels, params.aux[k], **options)
            aux.append(daux)
        grads = []
        for x, block in zip(inputs[-2::-1], net.blocks[start:end][::-1], strict=True):
            d, g = transformer_block_vjp(x, block, d, num_heads=num_heads, eps=EPS)
            grads.insert(0, g)
        if k == 0:
            first = embed_patches_vjp(images, net, d)[1]  # the embedding belongs to the first module
        blocks += grads
        parts.append(part)
        start = end
    aux = tuple(aux) if method != "e2e" else tuple(tree_map(np.zeros_like, a) for a in params.aux)
    return LocalParams(ViTParams(**first, **last, blocks=tuple(blocks)), aux), parts


def local_train_step(params: LocalParams, batch, *, boundaries, method="feature", learning_rate,
                     lambda_rec=1.0, lambda_cls=1.0, **options):  # fmt: skip
    """(params after one step of gradient descent, {"loss": [LossParts] by module}).

    Args: batch: (images [B, H, W, C], in [0, 1] where they are a target; labels int [B]).
      boundaries: ends of the modules in blocks, see `split_blocks`; one alone is end-to-end training.
      method: "feature", "infopro" (every target the image), "greedy" (no reconstruction), "e2e".
      lambda_rec, lambda_cls: one number, or one for each module but the last, see `lambda_schedule`.
      options: num_heads (4); first_target "embedding" or "image"; normalize_target, each target token
        standardised (False); cls, see `local_loss`.
    Raises: ValueError naming the argument at fault.
    """
    weights = {"lambda_rec": lambda_rec, "lambda_cls": lambda_cls}
    grads, parts = local_gradients(params, batch, boundaries=boundaries, method=method, **weights, **options)
    return _descend(params, grads, learning_rate), {"loss": parts}


def init_local(key, *, image_size, patch, dim, depth, num_classes, boundaries, channels=3, method="feature",
               kind="mlp", first_target="embedding", hidden=128, std=0.02):  # fmt: skip
    """LocalParams: a vision transformer without a class token, decoders and heads for all but the last."""
    rng = np.random.default_rng(key)
    net = init_vit(rng, image_size=image_size, patch=patch, dim=dim, depth=depth, num_classes=num_classes,
                   channels=channels, class_token=False, std=std)  # fmt: skip
    aux = []
    for k in range(len(boundaries) - 1):
        to_image = method == "infopro" or (k == 0 and first_target == "image")
        decoder = init_image_decoder(rng, dim) if to_image else init_feature_decoder(rng, dim, dim, kind=kind)
        head = TokenHead(*affine(rng, dim, hidden), *affine(rng, hidden, num_classes))
        aux.append(LocalAux(None if method == "greedy" else decoder, head))
    return LocalParams(net, tuple(aux))


def _reconstruct(h, decoder, target, rec):
    if (rec == "bce") != isinstance(decoder, ImageDecoderParams):
        raise ValueError(
            f'aux.decoder must be an image decoder for rec "bce" and of features for "mse", got {rec=}'
        )
    if rec == "bce":
        return image_decoder(as_grid(h), decoder, image_size=target.shape[1])
    return feature_decoder(h, decoder, kind=decoder_kind(decoder))


def _head(h, p):
    """(mean token, hidden layer before ReLU, output)."""
    pooled = float64(h).mean(axis=1)
    hidden = linear(pooled, p.w1, p.b1)
    return pooled, hidden, linear(relu(hidden), p.w2, p.b2)


def _descend(params, grads, rate):
    """params - rate grads; a part without a gradient stays."""
    if grads is None or params is None:
        return params
    if isinstance(params, tuple):
        new = [_descend(p, g, rate) for p, g in zip(params, grads, strict=True)]
        return type(params)(*new) if hasattr(params, "_fields") else tuple(new)
    return params - rate * grads


def _standard(x):
    """Every token with mean 0 and variance 1."""
    return layer_norm(x, np.ones(x.shape[-1]), np.zeros(x.shape[-1]), eps=EPS)


def check_local(h, labels, aux, lambda_rec, lambda_cls, rec, cls):
    """Raise ValueError for a bad call of the local loss."""
    head = {"aux.head.w1": (aux.head.w1, "C hidden"), "aux.head.w2": (aux.head.w2, "hidden K")}
    dims(h=(h, "B N C"), labels=(labels, "B"), **head)
    if rec not in ("mse", "bce"):
        raise ValueError(f'rec must be "mse" or "bce", got {rec!r}')
    if cls not in ("cross_entropy", "contrast"):
        raise ValueError(f'cls must be "cross_entropy" or "contrast", got {cls!r}')
    if not (lambda_rec >= 0 and lambda_cls >= 0):
        raise ValueError(f"lambda_rec and lambda_cls must not be negative, got {lambda_rec}, {lambda_cls}")


def check_split(params, images, labels, boundaries, method, first_target):
    """Raise ValueError for a bad call of a training step."""
    one_of("method", method, METHODS)
    if first_target not in ("embedding", "image"):
        raise ValueError(f'first_target must be "embedding" or "image", got {first_target!r}')
    if params.net.cls_token is not None:
        raise ValueError("params.net must have no class token: features are a grid of patches")
    if dims(images=(images, "B H W C"), labels=(labels, "B"))["B"] < 1:
        raise ValueError("batch must hold at least one image")
    check_ends(tuple(boundaries), len(params.net.blocks))
    if method != "e2e" and len(params.aux) != len(boundaries) - 1:
        want = f"{len(boundaries) - 1}, one for each module but the last"
        raise ValueError(f"params.aux must have length {want}, got {len(params.aux)}")


def example(seed=0):
    """Digits through a transformer of four blocks, cut in two; InfoPro's parts on its features."""
    from ref.data import digits

    rng = np.random.default_rng(seed)
    images, labels = digits()
    pick = rng.permutation(len(images))[:6]
    x, y = np.repeat(images[pick, :, :, None] / 16, 3, axis=-1), labels[pick].astype(int)
    options = {"image_size": 8, "patch": 2, "dim": 8, "depth": 4, "num_classes": 10, "boundaries": (2, 4)}
    params = init_local(rng, hidden=8, std=0.3, **options)
    h = embed_patches(x, params.net)
    grid, image, aux = h.reshape(6, 4, 4, 8), init_image_decoder(rng, 8), init_aux(rng, 8, 10, hidden=8)
    guess = image_decoder(grid, image, image_size=8)
    weights = {"lambda_rec": 1.0, "lambda_cls": 0.5}
    step = {"boundaries": (2, 4), "learning_rate": 0.1, **weights, "num_heads": 2}
    return [
        Example("upsample_bilinear", (grid,), {"size": 8}, (0,)),
        Example("image_decoder", (grid, image), {"image_size": 8}, (0, 1)),
        Example("feature_decoder", (h, params.aux[0].decoder), {}, (0, 1)),
        Example("bce_reconstruction", (guess, x), {}, (0,)),
        Example("mse_reconstruction", (guess, x), {}, (0,)),
        Example("supervised_contrastive", (h.mean(axis=1), y % 3), {}, (0,)),
        Example("aux_classifier", (grid, aux), {}, (0, 1)),
        Example("aux_classifier_loss", (grid, y, aux), {}, (0, 2)),
        Example("local_loss", (h, h + 0.1, y, params.aux[0]), weights, (0,)),
        Example("local_train_step", (params, (x, y)), step),
    ]
