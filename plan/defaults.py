"""Every constant that the plan decides by, in one place, each with its reason. Tuned with benchmarks/race.py.

Learning rate, batch and micro-batch are part of the product: an untouched recipe should train about as well
as a tuned one, for the budget that it has.
"""

from __future__ import annotations

from math import sqrt

from ..optimizers import rate_over_adamw

# --- memory

# On a CPU the process is larger than its live tensors: glibc keeps freed blocks below 32 MB and cannot
# always use them again for rows of other lengths (ops.FreedMemory bounds that at an eighth of the process),
# oneDNN keeps scratch pads and compiled kernels. Fitted to whole runs of a 135M model with 0.6 to 3 GB of
# activations, which benchmarks/memory_prediction.py repeats.
HOST_SLACK_BYTES = 180 << 20
HOST_SLACK_SHARE = 0.65
# On a 4-bit base each layer takes and frees a dozen blocks (dequantised weights, float32 products) between
# those that it keeps, and the heap has more holes.
HOST_SLACK_SHARE_4BIT = 1.10
# Dequantising goes block by block, the rest is read ahead by the file system.
LOAD_BUFFER_BYTES = 64 << 20
# CUDA context and libraries on the device, outside torch's allocator.
CUDA_CONTEXT_BYTES = 600 << 20
# The plan leaves this share of a limit free: the prediction aims at 10 % error.
MEMORY_MARGIN = 0.10

# --- batch

MIN_BATCH_TOKENS = 512
MAX_BATCH_TOKENS = 65_536
MIN_STEPS = 100
# A step longer than this share of the time cannot land precisely, and follows the schedule in jumps.
MAX_STEP_SHARE = 0.02
# Applying the optimizer to all weights may cost at most about this share of a step.
MAX_OPTIMIZER_SHARE = 0.25
# An update's time over what its memory traffic and matrix products take at the machine's best rates
# (benchmarks/optimizers.py prints it for each optimizer).
UPDATE_OVER_FLOOR = 2.0
# batch = 3 · sqrt(tokens in the budget).
BATCH_PER_ROOT_TOKEN = 3.0

# The largest that fits is taken. On a CPU matrix products are at their full speed from about a thousand
# rows on, and larger activations only leave the caches; a GPU wants all the rows that it can get.
MICRO_TOKENS_CPU = (256, 512, 1024, 2048)
MICRO_TOKENS_CUDA = (1024, 2048, 4096, 8192, 16_384)

# --- measurement

# Length of the longer of the two measured micro-batches, and seconds after which only the least is measured.
MEASURE_TOKENS_CPU = 1152
MEASURE_TOKENS_CUDA = 8192
MEASURE_SECONDS = 2.0

# --- offload

# Between an accelerator and host memory, each way: what PCIe 4.0 x16 gives without binding memory nodes. A
# guess; a run does not depend on it, only its predicted time.
LINK_BYTES_PER_SECOND = 12e9
# Read and written by AdamW on the CPU beside an accelerator: somewhat below what two cores were measured to
# do with float32 state.
HOST_BYTES_PER_SECOND = 40e9

# --- the rest of the budget

# Watts of a GPU, and of a CPU package: what an energy budget is taken to last until it is measured. Ours.
WATTS_CUDA = 300.0
WATTS_CPU = 80.0
# All evaluations together, of a limited time. Less of a short one, which start, load, save and export leave
# little of: the mean over fewer rows is nearly as good.
EVAL_SHARE = 0.10
SHORT_EVAL_SHARE = 0.06
SHORT_SECONDS = 600.0
DEFAULT_MAX_LENGTH = 2048
# Peak rate on pairs over that of supervised fine-tuning. Ours, after common practice: the sum of a whole
# answer's log-probabilities moves far with a small step, and the reference holds it back only slowly.
DPO_RATE = 0.1
LOAD_SECONDS = 2.0
LOAD_BYTES_PER_SECOND = 0.4e9
SAVE_SECONDS = 0.3
EXPORT_SECONDS = 0.2
# Merging, reading back and comparing, beside the writing; measured with 135 M parameters on two cores. Where
# an adapter is exported the base is still read for the comparison.
EXPORT_BYTES_PER_SECOND = 165e6
REPORT_SECONDS = 3.0
# One generated token reads all weights once, and pays this for the interpreter.
DECODE_SECONDS_PER_LAYER = 0.5e-3


def batch_tokens_for(tokens_in_budget: float) -> int:
    """Tokens of an optimizer step, for a run that sees `tokens_in_budget` tokens.

    Why a root: to reach a loss, steps S and examples E trade as (S/S_min - 1)(E/E_min - 1) = 1
    (arXiv:1812.06162, eq. 5.3). With E fixed by the budget, neither more steps nor larger batches should take
    all of a larger budget, so both grow as its root. A short budget gets at least MIN_STEPS steps if a batch
    of MIN_BATCH_TOKENS allows it: with fewer, AdamW's averages and the schedule do not settle.
    """
    wanted = BATCH_PER_ROOT_TOKEN * sqrt(max(tokens_in_budget, 1.0))
    wanted = min(wanted, tokens_in_budget / MIN_STEPS)
    return int(min(max(wanted, MIN_BATCH_TOKENS), MAX_BATCH_TOKENS))


SVFIT_RATE = 20.0
"""Of singular values over LoRA's: they are of the size of 1 to 100, LoRA's factors of a hundredth. Measured
on SmolLM2-135M, 10 steps of 6 short rows, once: held-out loss 1.655 before, 1.592 at 5e-3, 1.561 at 2e-2 and
1.573 at 6e-2."""


def learning_rate_for(
    *,
    adapter: bool,
    optimizer: str,
    parameters: int,
    batch_tokens: int,
    steps: int,
    pairs: bool = False,
    svfit: bool = False,
) -> float:
    """Peak learning rate, to two digits.

    LoRA: 1e-3 at 135M parameters, falling with the fourth root of size (8B: 3.6e-4, near the 2e-4 to 5e-4
    that is common there). A LoRA of a tiny model wants five to ten times the rate of the whole model,
    because its product BA starts at zero. Whole model: 1e-4 at 135M, falling faster, kept within 2e-5 ..
    1e-4. Batch: a weak growth, the fourth root, between 1 at 2,048 tokens and 2; AdamW wants sqrt at most
    (arXiv:2205.10287), and a fine-tune is far from the noise limit. Few steps: up to half as much again,
    there is less time to travel. All that is AdamW's; other optimizers take a multiple (`rate_over_adamw`).
    Pairs: DPO_RATE of it. SVFit: SVFIT_RATE times LoRA's.
    """
    size = 135e6 / max(parameters, 1)
    rate = 1e-3 * min(size, 4.0) ** 0.25 if adapter else min(max(1e-4 * size**0.4, 2e-5), 1e-4)
    rate *= min(max(batch_tokens / 2048, 1.0) ** 0.25, 2.0)
    rate *= min(max((300 / max(steps, 1)) ** 0.25, 1.0), 1.5)
    rate *= DPO_RATE if pairs else 1.0
    rate *= SVFIT_RATE if svfit else 1.0
    return float(f"{rate * rate_over_adamw(optimizer):.1e}")
