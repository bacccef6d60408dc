"""Error rates, and how sure one is of them: no models, only texts and counts.

- `error_rates`: WER, CER, MER, PIER, their alignments, and what is said of an adapter by them;
- `normalizers`: texts before they are compared;
- `bootstrap`: averages and intervals over utterances;
- `pareto`: two errors to be low at once.
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
