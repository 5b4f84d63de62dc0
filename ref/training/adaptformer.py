"""AdaptFormer: a frozen vision transformer learns a new task through a thin branch beside every MLP.

Source: Chen et al. 2022 (arXiv 2205.13535), section 3.2, and the code released with it, whose branch reads
the residual stream before the norm of the MLP (the paper's equation, as recalled, writes LN(x); here
layernorm="in"). There is no `merge_adapter`: the ReLU in the middle cannot be folded into the frozen weights.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.adapters import (
    AdapterParams,
    adapted_block,
    adapted_block_backward,
    adapter,
    adapter_backward,
    adapter_init,
    block_vjp,
    run_block,
)
from ref.blocks.conv import BN, batch_norm, batch_norm_vjp
from ref.blocks.initial import truncated_normal
from ref.blocks.losses import cross_entropy
from ref.blocks.mlp import linear, linear_vjp
from ref.blocks.norms import layer_norm
from ref.blocks.optim import cosine_decay, sgd, sgd_init, tree_leaves, tree_map
from ref.blocks.transformer import BlockParams, block_parameters
from ref.checks import one_of
from ref.dims import float64
from ref.example import Example
from ref.models import vit

__all__ = [
    "AdaptedViTParams", "AdapterParams", "Plugged", "ViTSize", "adapted_block", "adapted_block_backward",
    "adapted_blocks", "adapter", "adapter_backward", "adapter_init", "count_trainable", "example",
    "fine_tune", "init_vit", "multi_task_storage", "plug_in", "trainable_mask", "vit_forward",
    "vit_forward_backward",
]  # fmt: skip
HEAD = ("w_head", "b_head")
STATISTICS = ("bn_mean", "bn_var")  # moved by the data, not by gradients
HEAD_EPS = 1e-6


class AdaptedViTParams(NamedTuple):
    """`ref.models.vit.ViTParams` and what the tuning adds; what is present is used.

    w_patch [p, p, C, d], or [t, p, p, C, d] for clips; bn_mean, bn_var [d]: running statistics of a batch
    norm without weights before the head; adapters: one a block; prompts: [n_p, d] a block.
    """

    w_patch: np.ndarray
    b_patch: np.ndarray
    cls_token: np.ndarray | None
    pos_embed: np.ndarray
    blocks: tuple[BlockParams, ...]
    norm_scale: np.ndarray
    norm_bias: np.ndarray
    w_head: np.ndarray | None = None
    b_head: np.ndarray | None = None
    bn_mean: np.ndarray | None = None
    bn_var: np.ndarray | None = None
    adapters: tuple[AdapterParams, ...] | None = None
    prompts: tuple[np.ndarray, ...] | None = None


class Plugged(NamedTuple):
    """Any transformer with a field `blocks`, and one AdapterParams for each: see `adapted_blocks`."""

    backbone: tuple
    adapters: tuple[AdapterParams, ...]


def adapted_blocks(x, plugged: Plugged, *, num_heads, scale=0.1, layernorm="none", eps=1e-5, **block):
    """All blocks of a plugged transformer: embeddings [..., L, d] -> last hidden states [..., L, d].

    block: norm "pre" or "post" (there the branch is added before the block's second norm), activation,
    causal, mask, as in `transformer_block`: GPT-2 is causal=True, activation="gelu_tanh"; BERT norm="post".
    """
    branch = {"scale": scale, "layernorm": layernorm}
    for p, a in zip(plugged.backbone.blocks, plugged.adapters, strict=True):
        x = run_block(x, p, a, branch, "parallel", num_heads=num_heads, eps=eps, **block)
    return x


def vit_forward(images, params: AdaptedViTParams, *, num_heads, global_pool=False, option="parallel",
                scale=0.1, layernorm="none", eps=1e-6):  # fmt: skip
    """Logits [B, K] of images [B, H, W, C] or clips [B, T, H, W, C].

    Block i reads [prompts_i, tokens], and the outputs at the prompts are dropped. What is classified is the
    class token, or with global_pool the mean of the others; the head's batch norm uses running statistics.
    Raises: ValueError naming the argument at fault.
    """
    branch = {"scale": scale, "layernorm": layernorm}
    hidden = _tokens(images, params, num_heads, option, branch, eps)
    return _head(hidden[-1], params, global_pool, eps)[0]


def vit_forward_backward(images, params: AdaptedViTParams, dlogits, *, num_heads, global_pool=False,
                         option="parallel", scale=0.1, layernorm="none", eps=1e-6):  # fmt: skip
    """(dimages, AdaptedViTParams of gradients) of `vit_forward` for dlogits [B, K]; None for statistics."""
    branch = {"scale": scale, "layernorm": layernorm}
    hidden = _tokens(images, params, num_heads, option, branch, eps)
    return _vit_vjp(images, params, hidden, dlogits, num_heads, global_pool, option, branch, eps)


def init_vit(rng, *, image_size, patch, dim, depth, num_classes, channels=3, hidden=None, frames=None,
             tubelet=1, num_prompts=0, bottleneck=None, head_norm=False) -> AdaptedViTParams:  # fmt: skip
    """`ref.models.vit.init_vit`, with a head of std 0.01 cut at two, and what the tuning needs.

    frames: None for images; else clips of that many, `tubelet` frames a token. num_prompts: rows a block,
    uniform in +-sqrt(6 / (n_p + d)). bottleneck: width of the branches, None for none. head_norm: the batch
    norm before the head.
    Raises: ValueError if the tubelets do not divide the frames or the patches the image.
    """
    if frames is not None and (tubelet < 1 or frames % tubelet):
        raise ValueError(f"frames must be a multiple of tubelet, got {frames=} with {tubelet=}")
    base = vit.init_vit(
        rng, image_size=image_size, patch=patch, dim=dim, depth=depth, channels=channels, hidden=hidden
    )
    params = AdaptedViTParams(*base)._replace(**_new_head(rng, dim, num_classes))
    if frames is not None:
        n = frames // tubelet * (image_size // patch) ** 2
        params = params._replace(
            w_patch=0.02 * rng.standard_normal((tubelet, patch, patch, channels, dim)),
            pos_embed=0.02 * rng.standard_normal((1 + n, dim)),
        )
    if head_norm:
        params = params._replace(bn_mean=np.zeros(dim), bn_var=np.ones(dim))
    if num_prompts:
        bound = np.sqrt(6 / (num_prompts + dim))
        params = params._replace(
            prompts=tuple(rng.uniform(-bound, bound, (num_prompts, dim)) for _ in range(depth))
        )
    return params if bottleneck is None else plug_in(params, rng, bottleneck)


def plug_in(params, rng, bottleneck, *, where="mlp", layernorm="none", learnable_scale=False):
    """New branches for every block of any tree with a field `blocks`.

    A ViT comes back as AdaptedViTParams, for `vit_forward`; another network as `Plugged`, for
    `adapted_blocks`. where: "mlp" is the paper's only place.
    """
    if where != "mlp":
        raise ValueError(f'where must be "mlp", got {where!r}')
    if not getattr(params, "blocks", None):
        raise ValueError("params must have a field blocks with at least one block")
    options = {"layernorm": layernorm, "learnable_scale": learnable_scale}
    adapters = tuple(adapter_init(rng, len(p.w_q), bottleneck, **options) for p in params.blocks)
    if isinstance(params, vit.ViTParams | AdaptedViTParams):
        return AdaptedViTParams(*params)._replace(adapters=adapters)
    return Plugged(params, adapters)


def trainable_mask(params: AdaptedViTParams, tuning):
    """The tree of params with True where training writes.

    tuning: "adapter" and "vpt" train the branches or prompts and the head, "linear" the head alone, "full"
    everything but running statistics.
    Raises: ValueError for another tuning, or one whose parameters are absent.
    """
    names = _trained(params, tuning)
    return type(params)(**{n: tree_map(lambda _, n=n: n in names, x) for n, x in params._asdict().items()})


def fine_tune(params: AdaptedViTParams, data, *, tuning, lr, epochs, seed, num_heads, batch=32, warmup=0,
              momentum=0.9, dropout=0.0, new_head=None, global_pool=False, option="parallel", scale=0.1,
              layernorm="none", eps=1e-6):  # fmt: skip
    """(params, history): SGD with momentum on the cross-entropy; frozen leaves are the very same arrays.

    data: (images [n, ...], labels int [n]). lr: the peak; it rises linearly over `warmup` epochs from 0 and
    falls as half a cosine to 0 (the paper: 0.1 batch / 256, 20 of 100 epochs, batch 1024). dropout: on the
    branches' hidden layers (the paper: 0.1 for images). new_head: None, or the number of classes of a fresh
    head. The head's batch norm uses the batch's statistics and moves the running ones by a tenth.
    history: [epochs] mean loss of each epoch. Raises: ValueError naming the argument at fault.
    """
    images, labels = data
    if epochs < 1 or batch < 1 or not lr > 0 or not 0 <= dropout < 1 or not 0 <= warmup <= epochs:
        need = "need epochs >= 1, batch >= 1, lr > 0, dropout in [0, 1) and warmup in 0..epochs"
        raise ValueError(f"{need}, got {epochs=}, {batch=}, {lr=}, {dropout=}, {warmup=}")
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"data must pair at least one image and label, got {len(images)} and {len(labels)}")
    rng, branch = np.random.default_rng(seed), {"scale": scale, "layernorm": layernorm}
    if new_head is not None:
        params = params._replace(**_new_head(rng, len(params.norm_scale), new_head))
    names = _trained(params, tuning)
    velocity = sgd_init({n: getattr(params, n) for n in names})
    steps, history = -(-len(labels) // batch), []
    for epoch in range(epochs):
        losses, order = [], rng.permutation(len(labels))
        for step in range(steps):
            part = order[step * batch : (step + 1) * batch]
            masks = _dropout_masks(rng, params, len(part), dropout)
            hidden = _tokens(images[part], params, num_heads, option, branch, eps, masks)
            logits, moved = _head(hidden[-1], params, global_pool, eps, train=True)
            loss, dlogits = cross_entropy(logits, labels[part])
            _, grads = _vit_vjp(
                images[part], params, hidden, dlogits, num_heads, global_pool, option, branch, eps, masks,
                train=True,
            )  # fmt: skip
            rate = lr * _schedule(epoch + step / steps, warmup, epochs)
            old, new = ({n: getattr(t, n) for n in names} for t in (params, grads))
            changed, velocity = sgd(old, new, velocity, lr=rate, momentum=momentum)
            params = params._replace(**changed, **moved)
            losses.append(loss * len(part))
        history.append(sum(losses) / len(labels))
    return params, np.array(history)


@dataclass(frozen=True)
class ViTSize:
    """The sizes that `count_trainable` reads; ViT-B/16 unless given. num_prompts: rows a block of VPT."""

    image_size: int = 224
    patch: int = 16
    dim: int = 768
    depth: int = 12
    channels: int = 3
    num_prompts: int = 0


def count_trainable(config: ViTSize, tuning, *, bottleneck=64, num_classes):
    """Numbers that train: L (2 d r + r + d), L n_p d, none or all of the backbone; and (d + 1) K."""
    d, L = config.dim, config.depth
    n = (config.image_size // config.patch) ** 2
    stem = config.patch**2 * config.channels * d + 2 * d + (1 + n) * d
    backbone = stem + L * block_parameters(d, 4 * d) + 2 * d
    extra = {
        "adapter": L * (2 * d * bottleneck + bottleneck + d),
        "vpt": L * config.num_prompts * d,
        "linear": 0,
        "full": backbone,
    }
    one_of("tuning", tuning, extra)
    if tuning == "vpt" and config.num_prompts < 1:
        raise ValueError('tuning "vpt" needs num_prompts of at least 1')
    return extra[tuning] + (d + 1) * num_classes


def multi_task_storage(total, trainable, tasks):
    """(K P, P + K p): numbers stored for K tasks as separate networks, and as one with K sets of branches."""
    return tasks * total, total + tasks * trainable


def _tokens(images, params, num_heads, option, branch, eps, masks=None):
    """[tokens before each block, and after the last]."""
    hidden = [vit.embed_patches(images, params)]
    for i, p in enumerate(params.blocks):
        x, n_p = _with_prompts(hidden[-1], params, i)
        a, options = _branch(params, branch, masks, i)
        hidden.append(run_block(x, p, a, options, option, num_heads=num_heads, eps=eps)[..., n_p:, :])
    return hidden


def _vit_vjp(
    images, params, hidden, dlogits, num_heads, global_pool, option, branch, eps, masks=None, train=False
):
    dx, grads = _head_vjp(hidden[-1], params, float64(dlogits), global_pool, eps, train)
    per_block = []
    for i in reversed(range(len(params.blocks))):
        x, n_p = _with_prompts(hidden[i], params, i)
        a, options = _branch(params, branch, masks, i)
        dy = np.concatenate([np.zeros((*dx.shape[:-2], n_p, dx.shape[-1])), dx], axis=-2)
        dx, dp, da = block_vjp(x, params.blocks[i], a, dy, options, option, num_heads, eps)
        per_block.append((dp, da, dx[..., :n_p, :].sum(axis=tuple(range(dx.ndim - 2)))))
        dx = dx[..., n_p:, :]
    blocks, adapters, prompts = (tuple(g) for g in zip(*per_block[::-1], strict=True))
    dimages, embedding = vit.embed_patches_vjp(images, params, dx)
    return dimages, AdaptedViTParams(
        **embedding, **grads, blocks=blocks,
        adapters=None if params.adapters is None else adapters,
        prompts=None if params.prompts is None else prompts,
    )  # fmt: skip


def _head(x, params, global_pool, eps, train=False):
    """(logits, moved running statistics by name): norm, batch norm where there is one, linear."""
    if params.bn_mean is None:
        return vit.classify(x, params, global_pool=global_pool, eps=eps), {}
    y = vit.classify(x, params._replace(w_head=None), global_pool=global_pool, eps=eps)
    y = batch_norm(y, _head_norm(params), train=train, eps=HEAD_EPS)
    y, moved = (y[0], {"bn_mean": y[1].mean, "bn_var": y[1].var}) if train else (y, {})
    return linear(y, params.w_head, params.b_head), moved


def _head_vjp(x, params, dy, global_pool, eps, train):
    """(dx, gradients of norm and head by name)."""
    pooled, linear_grads = vit.pool(x, params, global_pool=global_pool), {}
    if params.bn_mean is not None:
        y = layer_norm(pooled, params.norm_scale, params.norm_bias, eps=eps)
        z = batch_norm(y, _head_norm(params), train=train, eps=HEAD_EPS)
        dz, dw, db = linear_vjp(z[0] if train else z, params.w_head, dy)
        dy = batch_norm_vjp(y, _head_norm(params), dz, train=train, eps=HEAD_EPS)[0]
        params, linear_grads = params._replace(w_head=None), {"w_head": dw, "b_head": db}
    dpooled, grads = vit.head_vjp(pooled, params, dy, eps=eps)
    return vit.pool_vjp(x, params, dpooled, global_pool=global_pool), {**grads, **linear_grads}


def _head_norm(params):
    return BN(np.ones_like(params.bn_mean), np.zeros_like(params.bn_mean), params.bn_mean, params.bn_var)


def _with_prompts(x, params, i):
    if params.prompts is None:
        return x, 0
    p = params.prompts[i]
    return np.concatenate([np.broadcast_to(p, (*x.shape[:-2], *p.shape)), x], axis=-2), len(p)


def _branch(params, branch, masks, i):
    mask = None if masks is None else masks[i]
    return (None if params.adapters is None else params.adapters[i]), {**branch, "dropout_mask": mask}


def _dropout_masks(rng, params, batch, dropout):
    if params.adapters is None or not dropout:
        return None
    n = [len(params.pos_embed) + (0 if params.prompts is None else len(params.prompts[i]))
         for i in range(len(params.blocks))]  # fmt: skip
    return [(rng.random((batch, m, len(a.b_down))) >= dropout) / (1 - dropout)
            for m, a in zip(n, params.adapters, strict=True)]  # fmt: skip


def _schedule(epoch, warmup, epochs):
    """A line from 0 to 1 over the warm-up, then half a cosine from 1 to 0."""
    return epoch / warmup if epoch < warmup else cosine_decay(epoch - warmup, steps=epochs - warmup)


def _new_head(rng, dim, num_classes):
    return {"w_head": 0.01 * truncated_normal(rng, (dim, num_classes)), "b_head": np.zeros(num_classes)}


def _trained(params, tuning):
    """Names of the fields that train."""
    sets = {"adapter": ("adapters", *HEAD), "vpt": ("prompts", *HEAD), "linear": HEAD}
    sets["full"] = tuple(n for n in params._fields if n not in STATISTICS)
    one_of("tuning", tuning, sets)
    needed = {"adapter": "adapters", "vpt": "prompts"}.get(tuning)
    if needed and not any(x.size for x in tree_leaves(getattr(params, needed))):
        raise ValueError(f'tuning "{tuning}" needs {needed} in params, at least one a block')
    return sets[tuning]


def example(seed=0):
    """Handwritten digits through a small adapted network, and one branch on its tokens."""
    from ref.data import digits

    rng = np.random.default_rng(seed)
    images = digits()[0][:2, ..., None] / 16
    net = init_vit(
        rng, image_size=8, patch=4, dim=16, depth=2, num_classes=5, channels=1, num_prompts=2, bottleneck=4
    )
    trained = lambda a: a._replace(w_up=0.5 * rng.standard_normal(a.w_up.shape))
    net = net._replace(adapters=tuple(trained(a) for a in net.adapters))
    x = vit.embed_patches(images, net)
    learnable = net.adapters[0]._replace(ln_scale=np.ones(16), ln_bias=np.zeros(16), scale=np.ones(()))
    return [
        Example("adapter", (x, net.adapters[0]), {}, (0, 1)),
        Example("adapter", (x, learnable), {"scale": None, "layernorm": "out"}, (0, 1)),
        Example("adapted_block", (x, net.blocks[0], net.adapters[0]), {"num_heads": 2}, (0, 2)),
        Example("vit_forward", (images, net), {"num_heads": 2}, (0, 1)),
    ]
