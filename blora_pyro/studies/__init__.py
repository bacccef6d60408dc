"""Many fits: a study of methods, or a search for the best options, shared by any processes.

- `results`: what every scored fit gave, as one table (CSV);
- `methods`: methods with their knobs, read from TOML; `definition`: a study, and its checks;
- `study_file`: the TOML file that defines one;
- `plan`: which scores are wanted, and which value of a knob is chosen;
- `trials`: the queue, Optuna's trials in a database; `running`: a fit, and its scores;
- `estimates`: errors, forgetting and comparisons with intervals; `standings`: those of a setting;
- `report`, `picture`: tables and picture, made from the scores alone;
- `search`, `searching`, `search_report`: a Pareto front over ranges of options.
"""

from blora_pyro.errors import UserError

try:
    import optuna  # noqa: F401
    import pandas  # noqa: F401
except ImportError as error:
    raise UserError(
        f"a study needs {error.name}, which is not installed; pip install 'blora-pyro[studies]'"
    ) from None
