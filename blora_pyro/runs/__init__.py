"""Runs: from base model and data to a fitted, scored and stored posterior, and its use.

- `fits`: one fit from start to end; `parts`: what it works with; `loading`: its sets;
- `chains`: an earlier run's posterior as the prior of the next fit;
- `scoring`: what it gained and forgot; `utterances`: the same, utterance by utterance;
- `record`: the content of `run.json`; `measurements`: that of `metrics.json`, and whose it is;
  `folders`: writing and reading run folders;
  `fit_folders`: the folder of a fit that may be interrupted;
- `listeners`: progress and experiment trackers;
- `engines`: transcribing, by torch or CTranslate2; `conversion`: the models that the latter has;
- `finished`: scoring, merging and using a finished run; `edited`: pruned and combined runs;
  `diagnosis`: figures and plots; `strength_curves`: errors at several strengths;
- `listing`: all runs in a folder; `shown`: one, or two side by side; `report`: tables.
"""
