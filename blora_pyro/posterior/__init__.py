"""What a fit found: a distribution of every adapter weight.

- `posterior`: the fitted object; `storage`: how it is kept; `peft_export`: its mean for stock PEFT;
- `families`: which prior and guide it comes from;
- `draws`: as traces of Pyro programs, and for ArviZ;
- `spectra`: singular values of ΔW and their spread.
"""

from blora_pyro.posterior.posterior import Posterior

__all__ = ["Posterior"]
