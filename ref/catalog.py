"""The catalogue: one record a technique. Names, files, tests and chapters all follow from it."""

from dataclasses import dataclass
from difflib import get_close_matches

# The book's parts, in order; also the folders of ref, accel, tests and docs.
PARTS = ("attention", "memory", "vision", "compression", "training", "language", "devices")


@dataclass(frozen=True)
class Technique:
    """What the project knows of one paper: its place, its source, its idea in a line, its core functions."""

    slug: str
    part: str
    title: str
    paper: str
    year: int
    arxiv: str | None
    idea: str
    core: tuple[str, ...]  # numerical functions: mirrored in accel, priced by hw


CATALOG = (
    Technique(
        slug="flash",
        part="attention",
        title="FlashAttention",
        paper="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
        year=2022,
        arxiv="2205.14135",
        idea="Exact attention by tiles with a running softmax: the score matrix never reaches memory.",
        core=(
            "flash_attention",
            "flash_attention_bwd",
            "attention_dense",
            "merge",
            "finalize",
            "online_softmax",
        ),
    ),
    Technique(
        slug="lean",
        part="attention",
        title="Lean Attention",
        paper="Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers",
        year=2024,
        arxiv="2405.10480",
        idea="Decode attention as one line of tiles in equal runs: no worker idles, whatever the lengths.",
        core=("lean_attention", "flash_decoding_attention", "combine_partials", "merge", "finalize"),
    ),
    Technique(
        slug="rum",
        part="memory",
        title="RUM",
        paper="Rotational Unit of Memory: A Novel Representation Unit for RNNs with Scalable Applications",
        year=2019,
        arxiv="1710.09537",
        idea="A recurrent state turned from input towards target: rotations keep lengths and bind key to value.",
        core=("rotate", "rotate_vjp", "rotation_matrix", "rum_cell", "rum", "rum_vjp"),
    ),
    Technique(
        slug="pitome",
        part="vision",
        title="PiToMe",
        paper="Accelerating Transformers with Spectrum-Preserving Token Merging",
        year=2024,
        arxiv="2405.16148",
        idea="Merge the tokens that have many alike, and leave the lonely ones, which say most.",
        core=(
            "bipartite_soft_matching",
            "energy_score",
            "pitome_matching",
            "pitome_text_matching",
            "merge_tokens",
            "unmerge_tokens",
            "proportional_attention",
            "merged_block",
            "vit_forward_merged",
        ),
    ),
    Technique(
        slug="quantization",
        part="compression",
        title="Quantization",
        paper="A Survey of Techniques for Optimizing Transformer Inference (quantization)",
        year=2023,
        arxiv="2307.07982",
        idea="Numbers on a grid of few bits: calibrated afterwards, or learned with the rounding in the loop.",
        core=(
            "affine_params",
            "symmetric_params",
            "quantize",
            "dequantize",
            "fake_quantize",
            "fake_quantize_vjp",
            "lsq_quantize",
            "lsq_quantize_vjp",
            "update_range",
            "quantized_linear",
            "integer_linear",
            "ternarize",
            "binarize",
            "i_exp",
            "i_gelu",
            "i_softmax",
            "i_layer_norm",
            "i_exp_int",
            "i_gelu_int",
            "i_softmax_int",
            "i_layer_norm_int",
        ),
    ),
    Technique(
        slug="llm_int8",
        part="compression",
        title="LLM.int8()",
        paper="LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
        year=2022,
        arxiv="2208.07339",
        idea="Int8 products with a scale a row, and the few columns that hold outliers in float beside them.",
        core=(
            "quantize_rowwise",
            "int8_matmul",
            "dequantize_matmul",
            "llm_int8_linear",
            "llm_int8_linear_vjp",
            "quantization_ladder",
        ),
    ),
    Technique(
        slug="pruning",
        part="compression",
        title="Pruning",
        paper="A Survey of Techniques for Optimizing Transformer Inference (pruning)",
        year=2023,
        arxiv="2307.07982",
        idea="Remove weights by size, by structure, by N:M groups, by movement in training or by second order.",
        core=(
            "magnitude_mask",
            "global_magnitude_masks",
            "structured_mask",
            "nm_mask",
            "nm_pack",
            "nm_matmul",
            "head_importance",
            "movement_mask",
            "movement_linear",
            "movement_linear_vjp",
            "obs_prune_row",
            "bsr_matmul",
        ),
    ),
    Technique(
        slug="distillation",
        part="compression",
        title="Distillation",
        paper="A Survey of Techniques for Optimizing Transformer Inference (distillation)",
        year=2023,
        arxiv="2307.07982",
        idea="A small network learns a large one's soft labels, hidden states and attention scores.",
        core=(
            "soft_cross_entropy",
            "soft_kl",
            "kd_loss",
            "hard_distillation_loss",
            "hidden_mse",
            "hidden_mse_vjp",
            "attention_mse",
            "attention_mse_vjp",
            "tinybert_loss",
            "tinybert_loss_vjp",
            "minilm_loss",
            "cosine_loss",
            "patient_loss",
        ),
    ),
    Technique(
        slug="nas",
        part="compression",
        title="Architecture search",
        paper="A Survey of Techniques for Optimizing Transformer Inference (neural architecture search)",
        year=2023,
        arxiv="2307.07982",
        idea="Train one network whose slices are all the others; evolve the slice that fits the device.",
        core=(
            "super_linear",
            "super_linear_vjp",
            "super_layer_norm",
            "super_transformer",
            "zero_cost_score",
            "saliency_maps",
        ),
    ),
    Technique(
        slug="vvma",
        part="compression",
        title="VVMA",
        paper="Vector-Vector-Matrix Architecture: A Novel Hardware-Aware Framework for Low-Latency Inference "
        "in NLP Applications",
        year=2020,
        arxiv="2010.08412",
        idea="Every tile of a weight matrix is one shared matrix with scaled columns: load it once, keep it.",
        core=(
            "vvma_linear",
            "vvma_linear_vjp",
            "vvma_dense",
            "vvma_lstm_cell",
            "vvma_mlp",
            "vvma_attention",
        ),
    ),
    Technique(
        slug="unified_norm",
        part="compression",
        title="Unified Normalization",
        paper="Unified Normalization for Accelerating and Stabilizing Transformers",
        year=2022,
        arxiv="2208.01313",
        idea="A norm that is a fixed scale at inference, smoothed in training by geometric means that shrug off "
        "outliers.",
        core=(
            "un_train_forward",
            "un_train_backward",
            "un_train_step",
            "un_train_steps",
            "un_inference",
            "amgm_gap",
            "fuse_un_into_next_linear",
            "fuse_un_into_previous_linear",
        ),
    ),
    Technique(
        slug="spec_kv",
        part="compression",
        title="SpecKV",
        paper="Draft-based Approximate Inference for LLMs",
        year=2026,
        arxiv="2506.08373",
        idea="Let a small model guess the answer, and keep the cached keys that the guess looks at.",
        core=(
            "kv_importance",
            "compress_kv",
            "spec_kv_select",
            "snap_kv_select",
            "streaming_select",
            "h2o_select",
            "attend_kept",
            "vertical_band_mask",
        ),
    ),
    Technique(
        slug="spec_pc",
        part="compression",
        title="SpecPC",
        paper="Draft-based Approximate Inference for LLMs",
        year=2026,
        arxiv="2506.08373",
        idea="A small model reads the long prompt; the big one gets the tokens that the small one attended to.",
        core=("window_attention", "token_importance", "select_prompt_tokens"),
    ),
    Technique(
        slug="wta_crs",
        part="training",
        title="WTA-CRS",
        paper="Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model",
        year=2023,
        arxiv="2305.15265",
        idea="Store a tenth of a layer's input rows: the heaviest for certain, a fair sample of the rest.",
        core=(
            "row_probabilities",
            "winner_count",
            "winner_mask",
            "wta_indices",
            "wta_scale",
            "wta_rows",
            "wta_weight_grad",
            "approx_matmul",
            "wta_linear",
            "wta_linear_vjp",
            "estimator_variance",
        ),
    ),
    Technique(
        slug="smollm2",
        part="language",
        title="SmolLM2",
        paper="SmolLM2: When Smol Goes Big, Data-Centric Training of a Small Language Model",
        year=2025,
        arxiv="2502.02737",
        idea="A trained 135 M language model, from its 4-bit file to text: claims about inference, tested.",
        core=(
            "forward",
            "prefill",
            "decode_step",
            "candidate_logits",
            "dequantize",
        ),
    ),
)

BY_SLUG = {t.slug: t for t in CATALOG}


def technique(slug: str) -> Technique:
    """The record of `slug`. Raises: LookupError that suggests the nearest slugs."""
    if slug in BY_SLUG:
        return BY_SLUG[slug]
    near = get_close_matches(slug, BY_SLUG, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; `triptych` lists them all"
    raise LookupError(f"no technique {slug!r}{hint}")
