"""A search for beta and the prior.

- `sweeping`: the whole of it; `searching`: what is searched; `trials`: a fit and its errors;
- `studies`: one Optuna study, by processes that may die; `storages`: by way of a database;
- `report`, `plot`: what came of it.
"""
