"""Error rates and their intervals, from texts and counts alone."""

from blora_pyro.metrics.error_rates import (
    Aligned,
    Counts,
    align,
    backward_gain,
    cer_counts,
    check_tags,
    forgetting,
    forgetting_removed,
    mer_counts,
    new_domain_drop,
    pier_counts,
    points_of_interest,
    spans,
    sparsity,
    wer_counts,
    words,
)

__all__ = [
    "Aligned",
    "Counts",
    "align",
    "backward_gain",
    "cer_counts",
    "check_tags",
    "forgetting",
    "forgetting_removed",
    "mer_counts",
    "new_domain_drop",
    "pier_counts",
    "points_of_interest",
    "spans",
    "sparsity",
    "wer_counts",
    "words",
]
