"""A posterior in figures, words and plots; data checked before a fit.

- `summaries`: figures of every layer; `layers`: the same by kind of layer; `khat`: how well the
  guide fits; `explanations`: how the prior shrinks, in words;
- `plots`, `heat_maps`, `densities`: plots;
- `data_check`: what a fit would refuse; `report`: all of it on a terminal.
"""

from blora_pyro.diagnostics.summaries import FactorSummary, Summary, UpdateSummary, summarise

__all__ = ["FactorSummary", "Summary", "UpdateSummary", "summarise"]
