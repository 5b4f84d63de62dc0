"""Which technique for my case: data of the decision guide. Every technique stands in it once, by test."""

# Question: (what it is about, {slug: (take it when, what must be trained, what it costs or where it fails)}).
CHOICES = {
    "Attention is too slow or too large, and the answer must not change": (
        "Exact methods. They change the order of the sums alone: no training, no validation.",
        {
            "flash": (
                "always, from a few hundred tokens on",
                "nothing",
                "gains shrink with a single query; a tile must fit the chip",
            ),
            "lean": (
                "one query a step meets a long cache, and batch times heads is below the number of cores",
                "nothing",
                "no gain where all cores are busy anyway",
            ),
            "block_sparse_flash": (
                "whole tiles of the score matrix are masked anyway, or may be",
                "nothing if the mask is given; else the model has to learn with it",
                "a mask of single elements saves nothing",
            ),
        },
    ),
    "The input is long, and not every pair of tokens matters": (
        "Fewer scores. The model has to be trained, or trained further, with the pattern.",
        {
            "longformer": (
                "documents of thousands of tokens, with a few tokens that must see all",
                "continued pre-training",
                "far pairs meet only through several layers or a global token",
            ),
            "bigbird": (
                "as above, and far pairs should meet in few hops",
                "continued pre-training",
                "random blocks are hard on caches; the pattern is fixed",
            ),
            "landmark": (
                "a language model should look up passages of a very long past by itself",
                "fine-tuning with landmark tokens",
                "a token more in every block; retrieval by block, not by token",
            ),
            "scout": (
                "you train from scratch and most tokens need only a summary of the far past",
                "training",
                "what the cheap mixer forgot inside a segment is gone",
            ),
            "axial": (
                "pixels or voxels on a grid, with exact likelihoods",
                "training",
                "a diagonal neighbour is two layers away",
            ),
            "attention_pruning": (
                "you have a trained model and inputs of one kind",
                "training again with the mask",
                "one mask for all inputs; positions must mean the same in each",
            ),
            "subsampled": (
                "dense training costs too much, and the model will run dense in the end",
                "training, then a short dense fine-tuning",
                "every step is noisier; the sampler has to suit the data",
            ),
            "wide_attention": (
                "latency counts layers, and the text is short",
                "training",
                "one layer cannot compose; heads side by side are no depth",
            ),
        },
    ),
    "The past must fit a state of fixed size": (
        "Recurrence, and attention with a memory. Cost a token does not grow with the length.",
        {
            "rum": (
                "exact copying and key-value recall in a small recurrent net",
                "training",
                "a scan: steps depend on each other",
            ),
            "pavlovian": (
                "you want to know what an associative memory can hold",
                "nothing to start with: it is theory with code",
                "linear memories interfere",
            ),
            "atlas": (
                "a linear memory holds too little, and arithmetic a token is to spare",
                "training",
                "the memory takes optimisation steps while it reads",
            ),
            "memmamba": (
                "a state-space model forgets what it read long ago",
                "training",
                "the pool of notes is small and chosen greedily",
            ),
            "bmojo": (
                "recent tokens word for word, the rest faded, surprises kept",
                "training",
                "what was not a surprise cannot be quoted",
            ),
            "gtrxl": (
                "reinforcement learning where the clue lies many steps back",
                "training",
                "more parameters a layer: the gates",
            ),
            "pmi": (
                "relations between few things matter more than many tokens",
                "training",
                "few slots: fine detail is lost",
            ),
            "concept_centric": (
                "an image classifier must say which concepts it went by",
                "training, best with annotated concepts",
                "explanations are only as good as their annotation",
            ),
        },
    ),
    "A vision model is too slow": (
        "Images have two axes and much sameness.",
        {
            "pitome": (
                "you have a trained ViT and no time",
                "nothing, or a short fine-tuning",
                "fine detail merges with its surroundings",
            ),
            "shvit": (
                "you train for phones and GPUs alike",
                "training",
                "most channels never see attention",
            ),
            "efficientvit": (
                "memory traffic of many attentions is what costs",
                "training",
                "heads run one after the other",
            ),
            "hilo": (
                "high resolution, detail and shape both matter",
                "training",
                "the window is a choice made once",
            ),
            "softmax_free": (
                "very many tokens, and cost must grow linearly",
                "training",
                "an inverse inside; similar landmarks are averaged",
            ),
            "dependencyvit": (
                "you want parts and a tree without labels, and pruning for free",
                "training",
                "messages die out in deep networks",
            ),
        },
    ),
    "The model is too large for its memory": (
        "Fewer bits first: they need the least work. Then fewer weights.",
        {
            "llm_int8": (
                "a trained language model in int8, today",
                "nothing",
                "slower than bfloat16 in small products; outlier columns stay in float",
            ),
            "quantization": (
                "8 bits after calibration, 4 or fewer with the rounding in the loop",
                "nothing, or fine-tuning",
                "outliers set the grid",
            ),
            "vidit_q": (
                "diffusion transformers at 8 and 4 bits",
                "calibration alone",
                "a grid a token has to be computed while running",
            ),
            "quantizable": (
                "you pre-train now and will quantise later",
                "pre-training",
                "clipping needs the finished row of scores",
            ),
            "pruning": (
                "the hardware can use the zeros: whole rows, heads, or 2 of 4",
                "fine-tuning",
                "scattered zeros save storage, not time",
            ),
            "distillation": (
                "you can train a small model and have a large one",
                "training, with the teacher's outputs",
                "two models in memory while training",
            ),
            "nas": (
                "one network for many devices with different limits",
                "training a supernet, then a search",
                "the search is only as good as its cost model",
            ),
            "lightweight": (
                "you are drawing the architecture now",
                "training",
                "sharing layers saves memory, not time",
            ),
            "memoryformer": (
                "memory is plentiful and multiplication is not",
                "training",
                "tables are larger than the matrices they replace",
            ),
            "vvma": (
                "a chip that keeps one small matrix in place",
                "training, or fitting to trained weights",
                "all tiles share one matrix",
            ),
            "unified_norm": (
                "layer norms cost time at inference",
                "training",
                "statistics must settle; warm-up longer than the window",
            ),
        },
    ),
    "The prompt is long, and the model is given": (
        "Leave tokens out before or behind the model. No weights change.",
        {
            "spec_kv": (
                "the cache is the limit, and a small model of the family exists",
                "nothing",
                "the draft has to be run; the full prompt is still read once",
            ),
            "spec_pc": (
                "reading the prompt is the limit",
                "nothing",
                "what is left out is gone for the whole answer",
            ),
            "long_text_hack": (
                "a classifier reads 128 or 512 tokens and texts are longer",
                "fine-tuning as usual",
                "stop words sometimes matter",
            ),
            "mtm": (
                "long articles are matched with short claims",
                "the scorer of sentences",
                "tuned to how such articles speak",
            ),
        },
    ),
    "Training does not fit, or costs too much": (
        "What is stored for the backward pass, and what is trained at all.",
        {
            "mesa": (
                "activations fill the memory, and gradients should stay close to exact",
                "your training, as it is",
                "time to quantise what is stored",
            ),
            "wta_crs": (
                "fine-tuning, where linear layers' inputs fill the memory",
                "your fine-tuning",
                "gradients are unbiased but noisier",
            ),
            "local_learning": (
                "depth fills the memory",
                "training by modules",
                "modules do not know what later ones need",
            ),
            "adaptformer": (
                "many tasks on one frozen vision model",
                "a thin branch beside each MLP",
                "what the frozen part lacks cannot be added",
            ),
            "user_prefix": (
                "captions in the manner of a user, language model frozen",
                "the mapping to a prefix",
                "needs words of that user",
            ),
            "masked_multidomain": (
                "many small classification problems, one service",
                "one encoder on all",
                "the domain of a request must be known",
            ),
            "logah": (
                "many networks of one family need good starting weights",
                "the hypernetwork, once",
                "written weights are of low rank",
            ),
        },
    ),
    "What does the model do, really?": (
        "Methods to look inside.",
        {
            "smollm2": (
                "you want a whole language model you can read",
                "nothing: trained weights are fetched",
                "135 M parameters know little",
            ),
            "verbatim_memory": (
                "does the model keep words or their gist?",
                "nothing",
                "nouns in lists are not sentences",
            ),
            "grokking": (
                "when does training beyond memory pay?",
                "training, long",
                "small worlds of facts",
            ),
        },
    ),
    "The target is not a GPU": (
        "Start with [how to read a cost model](../costs/) and price your own function: `triptych price`.",
        {
            "melt": (
                "language models on phones and boards",
                "nothing",
                "heat: the first minute is not the tenth",
            ),
            "pim_gpt": (
                "decoding is bound by memory, and the memory could multiply",
                "nothing",
                "batches gain nothing",
            ),
            "edge_moe": (
                "several vision tasks on a small FPGA",
                "training, with experts by task",
                "fixed point throughout",
            ),
            "mcuformer": (
                "a vision transformer in a few hundred kilobytes",
                "a supernet and a search",
                "integers only; softmax costs more than its products",
            ),
        },
    ),
}


def rows(cases):
    """Markdown lines of one question's table, techniques of the catalogue alone."""
    from ref.catalog import BY_SLUG

    yield "| technique | take it when | to be trained | price, and where it fails |"
    yield "|---|---|---|---|"
    for slug, words in cases.items():
        if t := BY_SLUG.get(slug):
            yield f"| [{t.title}](../../{t.part}/{slug}/) | " + " | ".join(words) + " |"
