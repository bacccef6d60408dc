"""What terminals show.

- `tables`: of fits, diagnoses, priors; `errors`: utterances, word above word;
- `progress`: a run as it goes;
"""
