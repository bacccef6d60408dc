"""Stochastic variational inference, and what a killed fit goes on from.

- `loop`: a guide fitted to a model, batch by batch;
- `svi`: a step, and the state that the next ones depend on; `objective`: what it minimises;
- `schedules`, `augmentation`, `averaging`, `stopping`: learning rates, SpecAugment, the mean of the
  last steps, an end in time;
- `distillation`, `elastic`: what else holds a fit near the base;
- `encoder_cache`: what frozen layers make of every utterance, computed once;
- `processes`: one fit in several of them;
- `checkpoints`, `interrupts`: nothing is lost but the step that a fit was in.
"""

from blora_pyro.fitting.loop import Teacher, batches, fit_guide

__all__ = ["Teacher", "batches", "fit_guide"]
