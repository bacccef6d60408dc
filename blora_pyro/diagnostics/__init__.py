"""A posterior looked into.

- `summaries`: figures of every layer; `khat`: how well the guide fits;
- `densities`, `heat_maps`, `plots`: pictures;
- `layers`: where in Whisper a layer sits; `explanations`: what figures mean, in words.
"""

from blora_pyro.diagnostics.summaries import (
    NEAR_ZERO,
    FactorSummary,
    Summary,
    UpdateSummary,
    kl_by_site,
    summarise,
)

__all__ = [
    "NEAR_ZERO",
    "FactorSummary",
    "Summary",
    "UpdateSummary",
    "kl_by_site",
    "summarise",
]
