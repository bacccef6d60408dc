"""Many fits: a study of methods, or a search for the best options, shared by any processes.

- `methods`: methods with their knobs; `definition`: a study, and its checks;
- `study_file`: the TOML file that defines one;
- `results`: what every scored fit gave, as one table (CSV);
- `plan`: which scores are wanted, and which value of a knob is chosen;
- `trials`: the queue, Optuna's trials in a database; `base_fits`: fits to a base, and their scores;
- `running`: all of that until nothing is missing;
- `estimates`: figures with intervals; `standings`: those of a setting; `report`, `picture`: shown;
- `search`, `search_report`: a Pareto front over ranges of options.
"""

from blora_pyro.errors import UserError

try:
    import optuna  # noqa: F401
    import pandas  # noqa: F401
except ImportError as error:
    raise UserError(
        f"a study needs {error.name}, which is not installed; pip install 'blora-pyro[studies]'"
    ) from None
