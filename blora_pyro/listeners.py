"""Whoever is told how a run goes."""

from blora_pyro.config import FitConfig
from blora_pyro.fitting import Step
from blora_pyro.stopping import DevError


class Listener:
    """What `fit` tells its caller as it goes; this one keeps silent."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def features(self, name: str, done: int, total: int) -> None:
        """So many utterances of a set are featurised, or were found in the cache."""

    def note(self, text: str) -> None:
        """Something worth knowing, in one line."""

    def ready(self, config: FitConfig, num_tokens: int, num_weights: int) -> None:
        """SVI begins: the resolved configuration, N target tokens, number of adapter weights."""

    def step(self, step: Step) -> None:
        """A step of SVI is done."""

    def evaluated(self, error: DevError, best: DevError) -> None:
        """The dev error has been measured; `best` is the lowest so far."""

    def fitted(self) -> None:
        """The last step is done."""
