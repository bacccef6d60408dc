"""Whoever is told how a run goes."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from blora_pyro.fitting.stopping import DevError
from blora_pyro.fitting.svi import Step
from blora_pyro.guides import Guide
from blora_pyro.models import BLoRA
from blora_pyro.options import FitConfig


class Listener:
    """What `fit` tells its caller as it goes; this one keeps silent."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def features(self, name: str, done: int, total: int) -> None:
        """So many utterances of a set are featurised, or were found in the cache."""

    def note(self, text: str) -> None:
        """Something worth knowing, in one line."""

    def built(self, model: BLoRA, guide: Guide) -> None:
        """Program and guide are made."""

    def ready(self, config: FitConfig, num_tokens: int | None, num_weights: int) -> None:
        """SVI begins: the resolved configuration, N target tokens, number of adapter weights.

        N is not known of a stream, and None.
        """

    def step(self, step: Step) -> None:
        """A step of SVI is done."""

    def evaluated(self, error: DevError, best: DevError) -> None:
        """The dev error has been measured; `best` is the lowest so far."""

    def fitted(self) -> None:
        """The last step is done."""

    def measured(self, metrics: Mapping[str, Any], step: int) -> None:
        """All is measured: the content of `metrics.json`, and the last step of SVI."""


class Listeners(Listener):
    """Several, each told in turn of whatever there is to tell."""

    def __init__(self, *listeners: Listener) -> None:
        """In the order that they are told."""
        for name in (one for one in vars(Listener) if not one.startswith("_")):
            setattr(self, name, partial(_tell, [getattr(one, name) for one in listeners]))


def _tell(methods: Iterable[Callable[..., None]], *what: object) -> None:
    for method in methods:
        method(*what)
