"""Error rates and their intervals, from texts and counts alone.

- `error_rates`: WER, CER, MER, PIER, their alignments, and forgetting;
- `normalizers`: text normalisation;
- `bootstrap`: macro-averages and intervals over utterances;
- `pareto`: the front of two errors, and its knee.
"""

from blora_pyro.metrics.error_rates import (
    WITHOUT_SPACES,
    Aligned,
    Counts,
    align,
    backward_gain,
    cer_counts,
    check_tags,
    forgetting,
    forgetting_removed,
    is_unspaced,
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
    "WITHOUT_SPACES",
    "Aligned",
    "Counts",
    "align",
    "backward_gain",
    "cer_counts",
    "check_tags",
    "forgetting",
    "forgetting_removed",
    "is_unspaced",
    "mer_counts",
    "new_domain_drop",
    "pier_counts",
    "points_of_interest",
    "spans",
    "sparsity",
    "wer_counts",
    "words",
]
