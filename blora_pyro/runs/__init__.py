"""A run, from base model to table, and its folder.

- `fits`: one fit from start to end; `parts`: what it is made of; `loading`: the sets it reads;
- `chains`: an earlier run's posterior as its prior;
- `scoring`: what it gained and forgot; `utterances`: the same, utterance by utterance;
- `folders`: how any run is kept and read; `fit_folders`: how a fit keeps what it has; `early_ends`:
  what it says when it ends before its time; `skipped_rows`: of its data;
- `listeners`, `tracking`: who is told how it goes;
- `finished`: a run scored again, merged, used; `diagnosis`: its figures and plots;
  `strength_curves`: at every strength; `pruned`: made smaller; `combined`: several made one;
- `report`: tables of its metrics, and its errors word by word.
"""
