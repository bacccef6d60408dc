"""Methods against each other, over domains, seeds and settings: the table of the paper, honestly.

`compare_methods` is the whole of it. A *setting* is how many utterances and steps a fit gets. Every
method has one *knob* and a list of its values. On the dev sets of the first domain, with the first
seed, every value is tried, and the method's is the one with the lowest *balanced error*, the mean
of new-domain error and backward error. With that one, and its two neighbours, the test sets of all
domains are scored with all seeds. So LoRA is compared at its own best learning rate, and every
other method at its own best strength, chosen alike and without a look at the test sets.

- `methods`: what is compared, as data; `candidates`: a method at a value of its knob;
- `plan`: which rows there are to be, and which value is chosen;
- `fits`, `rivals`: a fit in its folder, by the Pyro program or as full fine-tuning or stock PEFT;
- `rows`: what one fit gives on one domain, kept as counts of every utterance; `shared_rows`: by way
  of a database;
- `study`: how a row is made; `comparing`: the work, shared by as many processes as are started;
- `measures`, `tables`, `picture`: what comes out.
"""

from blora_pyro.comparison.candidates import Candidate
from blora_pyro.comparison.comparing import Comparison, compare_methods
from blora_pyro.comparison.methods import METHODS, SETTINGS, Method, Setting

__all__ = [
    "METHODS",
    "SETTINGS",
    "Candidate",
    "Comparison",
    "Method",
    "Setting",
    "compare_methods",
]
