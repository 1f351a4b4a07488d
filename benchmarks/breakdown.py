"""Where the time of a step goes, by kind of operator."""

import re
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

OPTIMIZER = "clip and optimizer"
OTHER = "other"
# The first pattern that an operator's name matches is its kind. Seen: "other" (autograd, Python) is 1 to 4%.
KINDS = {
    "matrix products": r"(aten|mkldnn)::(_?(add|b|badd|grouped_)*mm_?|mv|addmv_?|_?linear.*|mkldnn_linear.*)$",
    "attention": r"scaled_dot_product|flash_attention",
    "cross-entropy": r"log_softmax|nll_loss|aten::_softmax|aten::exp_?$|cross_entropy|_CrossEntropy",
    "copies, gathers, concatenation": r"aten::(copy_|cat|_to_copy|clone|contiguous|fill_|zero_|stack|repeat_interleave"
    r"|index\w*|_index\w*|gather|scatter\w*|slice_backward|embedding\w*|select_backward|split\w*|take\w*)$"
    r"|deterministic_scatter_add",
    "routing": r"aten::(sort|argsort|topk|sigmoid|sigmoid_backward|cumsum|nonzero|where|one_hot|eq|bincount|histc)",
    "norm and elementwise": r"aten::(mul|add|sub|div|neg|pow|mean|rsqrt|sqrt|sum|square|silu|silu_backward|addcmul"
    r"|reciprocal|linalg_vector_norm|linalg_vecdot|rms_norm|_fused_rms_norm\w*|roll|flip|conj_physical"
    r"|_conj_physical|masked_fill|complex|where)_?$",
}


def breakdown(gradients: Callable[[], object], update: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one step by kind of operator, by the self times of torch's profiler.

    Args:
        gradients: forward and backward.
        update: clip and optimizer; counted as one kind, whatever it calls.
    """
    total = dict.fromkeys([*KINDS, OPTIMIZER, OTHER], 0.0)
    for name, milliseconds in _times(gradients).items():
        total[_kind(name)] += milliseconds
    total[OPTIMIZER] = sum(_times(update).values())
    return total


def _times(function: Callable[[], object]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    return {event.key: event.self_cpu_time_total / 1e3 for event in seen.key_averages()}


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHER)
