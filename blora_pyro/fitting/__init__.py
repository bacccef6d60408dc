"""Stochastic variational inference, and how a killed fit is resumed.

- `svi`: `fit_guide`, the loop over the data, and the state between two steps;
- `objective`: the loss and its gradient; `batches`: order, micro-batches, SpecAugment;
- `alarms`: a fit that goes wrong ends early; `history`: what `run.json` keeps of its way;
- `stopping`: early stopping, and the average of the last steps;
- `distillation`, `elastic`: regularisers that hold a fit near the base;
- `encoder_cache`: states of frozen encoder layers, computed once an utterance;
- `processes`: one fit in several processes;
- `checkpoints`, `interrupts`: at most the current step is lost.
"""
