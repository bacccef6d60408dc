"""The fitted posterior over all adapter weights, and what can be made of it.

- `posterior`: the fitted object; `family`: the prior and the guide that it comes from;
- `storage`: `posterior.safetensors`, and the mean as a stock PEFT adapter;
- `draws`: traces of Pyro programs; `inference_data`: draws for ArviZ;
- `spectra`: singular values of ΔW and their spread;
- `pruning`, `strength`, `combining`: a smaller posterior, a weaker one, one of several runs.
"""

from blora_pyro.posterior.family import Family
from blora_pyro.posterior.posterior import Posterior

__all__ = ["Family", "Posterior"]
