"""Knowledge distillation: losses that teach a small network a large one's outputs, states and attention.

Sources: Hinton et al. 2015 (soft labels), Sanh et al. 2019 (DistilBERT: the cosine), Jiao et al. 2020
(TinyBERT: states and scores), Wang et al. 2020 (MiniLM: relations), Sun et al. 2019 (patient), Touvron et al.
2021 (DeiT: hard labels); surveyed in arXiv 2307.07982. The teacher is a constant throughout. Masks: True =
valid token.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.losses import cross_entropy
from ref.blocks.softmax import log_softmax, logsumexp
from ref.blocks.transformer import block_parameters
from ref.checks import check_num_heads, check_share, one_of
from ref.dims import dims, float64
from ref.example import Example
from ref.models.bert_cost import encoder_macs

REDUCTIONS = ("batch", "mean_all")
PADDED = -100.0  # attention scores from here down belong to padded keys


class Activations(NamedTuple):
    """attention [layers, B, H, N, N], scores before softmax; hidden [layers + 1, B, N, d], 0 = embeddings."""

    attention: np.ndarray
    hidden: np.ndarray


def soft_cross_entropy(student_logits, teacher_logits, *, temperature=1.0, reduction="batch"):
    """(loss, grad_student): -sum_K p_t log p_s over the batch's mean, both softened by the temperature.

    Args: logits [B, K]. reduction "mean_all" divides by B K instead of B, as TinyBERT's code does. No T^2.
    Returns: loss, and its gradient (p_s - p_t) / (T B) [B, K].
    Raises: ValueError for a temperature <= 0, an empty batch or shapes that differ.
    """
    n, log_s, p_t = _soft(student_logits, teacher_logits, temperature, reduction)
    return -(p_t * log_s).sum() / n, (np.exp(log_s) - p_t) / (temperature * n)


def soft_kl(student_logits, teacher_logits, *, temperature=1.0, reduction="batch"):
    """(KL(teacher || student), grad_student): the soft cross-entropy less the teacher's entropy."""
    n, log_s, p_t = _soft(student_logits, teacher_logits, temperature, reduction)
    log_t = log_softmax(float64(teacher_logits) / temperature)
    return (p_t * (log_t - log_s)).sum() / n, (np.exp(log_s) - p_t) / (temperature * n)


def kd_loss(student_logits, teacher_logits, labels, *, temperature=2.0, alpha=0.5, scale_by_t2=True):
    """(loss, grad_student): alpha T^2 KL + (1 - alpha) cross-entropy with the labels [B].

    T^2 keeps the soft gradient's size as T grows (Hinton et al. 2015, section 2.1).
    Raises: ValueError for alpha outside [0, 1] or a label outside 0..K-1.
    """
    check_share("alpha", alpha)
    soft, grad_soft = soft_kl(student_logits, teacher_logits, temperature=temperature)
    hard, grad_hard = cross_entropy(student_logits, labels)
    weight = alpha * (temperature**2 if scale_by_t2 else 1.0)
    return weight * soft + (1 - alpha) * hard, weight * grad_soft + (1 - alpha) * grad_hard


def hard_distillation_loss(class_logits, distill_logits, teacher_logits, labels):
    """Half the class head's cross-entropy with the labels, half the other head's with the teacher's pick.

    All logits [B, K] (Touvron et al. 2021, equation 3). Inference averages the two heads' probabilities.
    """
    dims(distill_logits=(distill_logits, "B K"), teacher_logits=(teacher_logits, "B K"))
    picked = np.argmax(teacher_logits, axis=-1)
    return (cross_entropy(class_logits, labels)[0] + cross_entropy(distill_logits, picked)[0]) / 2


def hidden_mse(student, teacher, proj=None, *, mask=None):
    """Mean over valid tokens and channels of (student proj^T - teacher)^2.

    Args: student [B, N, ds], teacher [B, N, dt], proj [dt, ds] (None: ds = dt), mask [B, N] bool.
    Raises: ValueError naming the argument at fault, also where no token is valid.
    """
    error, count = _hidden_error(student, teacher, proj, mask)
    return (error**2).sum() / count


def hidden_mse_vjp(student, teacher, proj=None, *, mask=None):
    """(grad_student [B, N, ds], grad_proj [dt, ds] or None) of `hidden_mse`."""
    error, count = _hidden_error(student, teacher, proj, mask)
    grad = 2 * error / count
    if proj is None:
        return grad, None
    rows = float64(student).reshape(-1, proj.shape[1])
    return grad @ float64(proj), grad.reshape(-1, proj.shape[0]).T @ rows


def attention_mse(student, teacher, *, mask=None):
    """Mean over heads and valid pairs of the squared difference of scores before softmax.

    Args: student, teacher [B, H, N, N], the same heads; scores <= -100 (padded keys) count as 0 in both. mask
      [B, N] bool: a pair is valid if both its tokens are.
    """
    error, count = _attention_error(student, teacher, mask)
    return (error**2).sum() / count


def attention_mse_vjp(student, teacher, *, mask=None):
    """grad_student [B, H, N, N] of `attention_mse`."""
    error, count = _attention_error(student, teacher, mask)
    return np.where(np.asarray(student) <= PADDED, 0.0, 2 * error / count)


def layer_map(teacher_layers, student_layers, *, kind="uniform"):
    """(att_idx [Ls], hidden_idx [Ls + 1]): which layers of the teacher the student's layers learn from.

    "uniform": with p = Lt / Ls, attention of layer i from i p + p - 1, hidden state i (0 = embeddings)
    from i p. "last": the last Ls, and their hidden states, embeddings from embeddings. "skip": as uniform,
    from the first of each p instead of the last, but for the last state, which learns from the last.
    Raises: ValueError unless Ls divides Lt ("last": Ls <= Lt).
    """
    if kind not in ("uniform", "last", "skip"):
        raise ValueError(f'kind must be "uniform", "last" or "skip", got {kind!r}')
    if not 1 <= student_layers <= teacher_layers or (kind != "last" and teacher_layers % student_layers):
        raise ValueError(
            f"student_layers must divide teacher_layers={teacher_layers} (last: be at most), got "
            f"{student_layers}"
        )
    p, i = teacher_layers // student_layers, np.arange(student_layers)
    if kind == "last":
        att = i + teacher_layers - student_layers
        return att, np.concatenate([[0], att + 1])
    att = i * p + (p - 1 if kind == "uniform" else 0)
    if kind == "skip":
        att[-1] = teacher_layers - 1
        return att, np.concatenate([[0], att + 1])
    return att, np.arange(student_layers + 1) * p


def tinybert_loss(student_acts: Activations, teacher_acts: Activations, proj, *, mask=None):
    """(total, attention, hidden): the summed losses of mapped layers; one proj [dt, ds] for all states."""
    pairs = _mapped(student_acts, teacher_acts)
    attention = sum(attention_mse(s, t, mask=mask) for s, t in pairs[0])
    hidden = sum(hidden_mse(s, t, proj, mask=mask) for s, t in pairs[1])
    return attention + hidden, attention, hidden


def tinybert_loss_vjp(student_acts: Activations, teacher_acts: Activations, proj, *, mask=None):
    """(Activations of gradients, grad_proj) of the total of `tinybert_loss`."""
    pairs = _mapped(student_acts, teacher_acts)
    attention = [attention_mse_vjp(s, t, mask=mask) for s, t in pairs[0]]
    hidden, projs = zip(*(hidden_mse_vjp(s, t, proj, mask=mask) for s, t in pairs[1]), strict=True)
    return Activations(np.stack(attention), np.stack(hidden)), sum(projs)


def minilm_loss(qkv_s, qkv_t, *, mask=None):
    """(total, attention_kl, value_kl): KL(teacher || student), mean over heads and valid queries.

    Of softmax(q k^T / sqrt(d)) and of softmax(v v^T / sqrt(d)), which compare whatever the widths.
    Args: qkv_s, qkv_t: (q, k, v), each [B, H, N, d], the same heads; mask [B, N] bool.
    Raises: ValueError for heads or tokens that differ, or where no token is valid.
    """
    kls = []
    for a, b in ((0, 1), (2, 2)):
        log_s, log_t = (_relations(x[a], x[b], mask) for x in (qkv_s, qkv_t))
        if log_s.shape != log_t.shape:
            raise ValueError(f"qkv_s has heads and tokens {log_s.shape[:3]}, but qkv_t {log_t.shape[:3]}")
        p = np.exp(log_t)
        gap = np.subtract(log_t, log_s, out=np.zeros_like(p), where=p > 0)  # 0 log 0 = 0
        kl = (p * gap).sum(axis=-1)  # [B, H, N]
        valid = _valid(mask, kl[:, 0])[:, None]
        kls.append(_mean(kl, np.broadcast_to(valid, kl.shape)))
    return kls[0] + kls[1], *kls


def cosine_loss(student, teacher, *, mask=None):
    """Mean over valid tokens of 1 - cos(student, teacher), [B, N, d] each; a zero vector has cosine 0."""
    dims(student=(student, "B N d"), teacher=(teacher, "B N d"))
    cosine = (_unit(student) * _unit(teacher)).sum(axis=-1)
    return _mean(1 - cosine, _valid(mask, cosine))


def patient_loss(student_cls, teacher_cls):
    """Mean of (a / |a| - b / |b|)^2 over all entries of the class states [..., d], at least one."""
    dims(student_cls=(student_cls, "... d"), teacher_cls=(teacher_cls, "... d"))
    if student_cls.size == 0:
        raise ValueError(f"student_cls must not be empty, got shape {list(student_cls.shape)}")
    return ((_unit(student_cls) - _unit(teacher_cls)) ** 2).mean()


def init_student_from_teacher(params, keep_layers):
    """The parameters with only the blocks `keep_layers` (rising indices) of any model that has `blocks`."""
    keep = list(keep_layers)
    if not keep or sorted(set(keep)) != keep or not (0 <= keep[0] and keep[-1] < len(params.blocks)):
        raise ValueError(f"keep_layers must be rising indices in 0..{len(params.blocks) - 1}, got {keep}")
    return params._replace(blocks=tuple(params.blocks[i] for i in keep))


def distill(step, params, batches, *, schedule):
    """(params, history): stages in turn, as TinyBERT's two (intermediate losses, then predictions).

    Args: step(params, batch, stage) -> (params, loss); batches: iterable; schedule: ((stage, steps), ...).
    Returns: history, a list of (stage, loss). Raises: ValueError if the batches end before the schedule.
    """
    batches, history = iter(batches), []
    for stage, steps in schedule:
        for n in range(steps):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"batches ended in stage {stage!r} after {n} of {steps} steps")
            params, loss = step(params, batch, stage)
            history.append((stage, float(loss)))
    return params, history


def encoder_cost(layers, hidden, ffn, heads, *, vocab=30522, positions=512, tokens):
    """(parameters, MACs on `tokens` tokens) of a BERT-like encoder.

    Token types and the pooler are not counted here; `encoder_parameters` of ref/models/bert_cost.py has them.
    """
    check_num_heads(hidden, heads, name="heads")
    params = (vocab + positions + 2) * hidden + layers * block_parameters(hidden, ffn)  # 2: the tables' norm
    return params, encoder_macs(tokens, depth=layers, dim=hidden, hidden=ffn)


def _soft(student, teacher, temperature, reduction):
    """(what the sum is divided by, log p_s, p_t)."""
    n = dims(student_logits=(student, "B K"), teacher_logits=(teacher, "B K"))
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    one_of("reduction", reduction, REDUCTIONS)
    if n["B"] * n["K"] == 0:
        raise ValueError("student_logits must not be empty")
    count = n["B"] * (n["K"] if reduction == "mean_all" else 1)
    log_s, log_t = (log_softmax(z / temperature) for z in float64(student, teacher))
    return count, log_s, np.exp(log_t)


def _hidden_error(student, teacher, proj, mask):
    """(error [B, N, dt], 0 where a token is not valid; how many entries count)."""
    if proj is None:
        dims(student=(student, "B N d"), teacher=(teacher, "B N d"))
        projected = float64(student)
    else:
        dims(student=(student, "B N ds"), teacher=(teacher, "B N dt"), proj=(proj, "dt ds"))
        projected = float64(student) @ float64(proj).T
    valid = _valid(mask, projected[..., 0])
    return np.where(valid[..., None], projected - teacher, 0.0), valid.sum() * teacher.shape[-1]


def _attention_error(student, teacher, mask):
    n = dims(student=(student, "B H N N"), teacher=(teacher, "B H N N"))
    s, t = (np.where(x <= PADDED, 0.0, x) for x in float64(student, teacher))
    valid = _valid(mask, s[:, 0, :, 0])
    pairs = valid[:, None, :, None] & valid[:, None, None, :]
    return np.where(pairs, s - t, 0.0), n["H"] * pairs.sum()


def _mapped(student, teacher):
    """((student, teacher) attention of every layer, the same of every hidden state), by the uniform map."""
    att, hidden = layer_map(len(teacher.attention), len(student.attention))
    for name, acts in (("student_acts", student), ("teacher_acts", teacher)):
        if len(acts.hidden) != len(acts.attention) + 1:
            raise ValueError(
                f"{name}.hidden must hold {len(acts.attention) + 1} states, got {len(acts.hidden)}"
            )
    return (
        list(zip(student.attention, teacher.attention[att], strict=True)),
        list(zip(student.hidden, teacher.hidden[hidden], strict=True)),
    )


def _relations(x, y, mask):
    """log softmax(x y^T / sqrt(d)) [B, H, N, N]; keys that are not valid get -inf."""
    dims(x=(x, "B H N d"), y=(y, "B H N d"))
    scores = float64(x) @ np.swapaxes(float64(y), -1, -2) / np.sqrt(x.shape[-1])
    if mask is not None:
        scores = np.where(_valid(mask, scores[:, 0, :, 0])[:, None, None, :], scores, -np.inf)
    return scores - np.where((total := logsumexp(scores)) > -np.inf, total, 0.0)[..., None]


def _valid(mask, like):
    """mask [B, N] checked, or all True, in the shape of `like` [B, N]."""
    if mask is None:
        mask = np.ones(like.shape, bool)
    if mask.shape != like.shape or mask.dtype != bool:
        raise ValueError(
            f"mask must be boolean of shape {list(like.shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    if not mask.any():
        raise ValueError("mask must leave at least one valid token")
    return mask


def _mean(values, valid):
    return np.where(valid, values, 0.0).sum() / valid.sum()


def _unit(x):
    size = np.linalg.norm(float64(x), axis=-1, keepdims=True)
    return x / np.where(size > 0, size, 1.0)


def example(seed=0):
    """Logits of a batch; heads and hidden states of SmolLM2 as the teacher of a narrower student."""
    from ref.data import attention_inputs, hidden_states

    rng = np.random.default_rng(seed)
    n = rng.standard_normal
    logits, teacher, labels = n((6, 10)), 2 * n((6, 10)), rng.integers(0, 10, 6)
    q, k, v = (x[:3, :8, :16][None] for x in attention_inputs())
    h = hidden_states()[:8, :24][None]
    student, proj, mask = h[..., :12] + 0.1 * n((1, 8, 12)), n((24, 12)) / 4, np.arange(8)[None] < 6
    scores = q @ k.swapaxes(-1, -2) / 4
    acts = lambda layers, d, noise: Activations(
        np.stack([scores + noise * n(scores.shape)] * layers), np.stack([h[..., :d]] * (layers + 1))
    )
    pair = acts(1, 12, 0.3), acts(2, 24, 0.0)
    small = tuple(x[..., :8] + 0.1 * n(x[..., :8].shape) for x in (q, k, v))
    return [
        Example("soft_cross_entropy", (logits, teacher), {"temperature": 4.0}, (0,)),
        Example("soft_kl", (logits, teacher), {"temperature": 4.0}, (0,)),
        Example("kd_loss", (logits, teacher, labels), {}, (0,)),
        Example("hard_distillation_loss", (logits, logits[::-1], teacher, labels), {}, (0, 1)),
        Example("hidden_mse", (student, h, proj), {"mask": mask}, (0, 2)),
        Example("hidden_mse_vjp", (student, h, proj), {"mask": mask}, (0, 2)),
        Example("attention_mse", (scores + 0.1 * n(scores.shape), scores), {"mask": mask}, (0,)),
        Example("attention_mse_vjp", (scores + 0.1 * n(scores.shape), scores), {"mask": mask}, (0,)),
        Example("tinybert_loss", (*pair, proj), {}, (0, 2)),
        Example("tinybert_loss_vjp", (*pair, proj), {}, (0, 2)),
        Example("minilm_loss", (small, (q, k, v)), {"mask": mask}, (0,)),
        Example("cosine_loss", (student, h[..., :12]), {"mask": mask}, (0,)),
        Example("patient_loss", (student[:, 0], h[:, 0, :12]), {}, (0,)),
    ]
