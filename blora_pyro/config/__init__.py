"""What decides a fit, checked before anything is loaded.

- `fit_config`: every option, in one place;
- `pooling`, `priors`, `streaming`, `training`: which of them go together;
- `commands`: options as a command line.
"""

from blora_pyro.config.fit_config import FitConfig, base_of

__all__ = ["FitConfig", "base_of"]
