"""SmolLM2-135M in the arithmetic of the banks: `python -m tests.claims.pim_gpt_model`.

The forward pass of a short text, traced once and run three times: in float32, in bfloat16 with exact
products, and as PIM-GPT's units compute it, tile by tile through their trees. Needs the model (`triptych
fetch smollm2`). Writes docs/data/pim_gpt_model.json; a minute.
"""

from pathlib import Path

import numpy as np

import hw
from accel.language.smollm2 import encode, load_smollm2
from accel.models.llama import forward
from hw import pim
from tests.claims.record import ROOT, store
from tests.claims.smollm2 import ladder

FILES = (
    "hw/pim_formats.py",
    "ref/blocks/lanes.py",
    "tests/claims/pim_gpt_model.py",
)
TOKENS = 32
TEXT = "ref/data/text.txt"


def measure():
    """[{name, perplexity, kl, top1}] of the three arithmetics on the first tokens of a play."""
    ids = np.asarray(encode(Path(ROOT / TEXT).read_text(encoding="utf-8")[: 8 * TOKENS])[:TOKENS], np.int32)
    weights = load_smollm2()
    program = hw.trace(lambda weights, ids: forward(weights, ids)[0], weights, ids, weights=("weights",))
    run = lambda policy: hw.run_program(program, (weights, ids), policy=policy)[0][:-1]
    bfloat16 = hw.FormatPolicy(activations=hw.BF16)
    units = pim.pim_gpt().formats
    runs = {
        "float32": lambda: run(None),
        "bfloat16, exact products": lambda: run(bfloat16),
        "PIM-GPT's units": lambda: run(units),
    }
    return {"tokens": TOKENS, "text": TEXT, "rows": ladder(ids, runs)}


if __name__ == "__main__":
    print(store("pim_gpt_model", measure(), FILES))
