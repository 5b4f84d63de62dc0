"""The concept-centric head: parameters, initial values and their number.

Source: Hong et al. 2024 (arXiv 2305.15775); Rigotti et al. 2022 for the variant with fixed vectors.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.slots import SlotParams, init_slots
from ref.checks import one_of

# variant: steps of its slot module, unless told; "ct" has none: the concept transformer's fixed vectors
ITERATIONS = {"sa": 1, "isa": 3, "qsa": 2, "ct": 0}


class CrossParams(NamedTuple):
    """w_q [d, d], w_kv [d, 2d] (keys of all heads, then values), w_proj [d, classes], b_proj [classes]."""

    w_q: np.ndarray
    w_kv: np.ndarray
    w_proj: np.ndarray
    b_proj: np.ndarray


class ConceptStream(NamedTuple):
    """C concepts and their way to the logits.

    start [C, d]: fixed vectors, or the first slots of "isa" and "qsa"; None for "sa". slots, and pos
    [1, C, d], added to them so that each can own a concept: None for fixed vectors.
    """

    start: np.ndarray | None
    slots: SlotParams | None
    pos: np.ndarray | None
    cross: CrossParams


class CctParams(NamedTuple):
    """Streams, None where there is none: global concepts, concepts of patches, concepts without a name."""

    concepts: ConceptStream | None
    spatial: ConceptStream | None
    unsupervised: ConceptStream | None = None


def init_cct(
    key, width, *, concepts, spatial_concepts, classes, variant="sa", unsupervised=0, slot_spatial=False
) -> CctParams:
    """Fixed vectors and first slots normal with deviation width^-1/2, maps uniform, pos and biases 0.

    key: NumPy Generator or seed. concepts, spatial_concepts, unsupervised: how many; 0 for no such stream.
    Raises: ValueError for a variant unknown or no concepts at all.
    """
    check_variant(variant)
    if min(concepts, spatial_concepts, unsupervised) < 0 or concepts + spatial_concepts + unsupervised < 1:
        raise ValueError(
            f"concepts must be counts, not all 0, got {concepts}, {spatial_concepts}, {unsupervised}"
        )
    rng, d = np.random.default_rng(key), width
    u = lambda *shape: rng.uniform(-1, 1, shape) / np.sqrt(shape[0])

    def stream(count, fixed):
        if not count:
            return None
        has_start = fixed or variant != "sa"
        start = rng.standard_normal((count, d)) / np.sqrt(d) if has_start else None
        slots = None if fixed else init_slots(rng, d, d, learned_start=variant == "sa")
        cross = CrossParams(u(d, d), u(d, 2 * d), u(d, classes), np.zeros(classes))
        return ConceptStream(start, slots, None if fixed else np.zeros((1, count, d)), cross)

    fixed = variant == "ct"
    return CctParams(
        stream(concepts, fixed),
        stream(spatial_concepts, fixed or (variant == "sa" and not slot_spatial)),
        stream(unsupervised, fixed),
    )


def cct_params(width, *, concepts, classes, variant="sa"):
    """Numbers in a stream of global concepts: cross-attention, slot module (9 d^2 + 10 d), start, pos."""
    check_variant(variant)
    d, vectors = width, concepts * width
    cross = 3 * d**2 + d * classes + classes
    if variant == "ct":
        return cross + vectors
    return cross + 9 * d**2 + 10 * d + vectors + (2 * d if variant == "sa" else vectors)


def check_variant(variant):
    """Raises: ValueError for a variant unknown."""
    one_of("variant", variant, ITERATIONS)
