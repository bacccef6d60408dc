"""The main job on the built-in Whisper: it hears its languages, and learns a mixture of two."""

import numpy as np
import pytest

from blora_pyro.data import load_split
from blora_pyro.evaluation import evaluate
from blora_pyro.models import load_base
from blora_pyro.options import FitConfig
from blora_pyro.runs.fits import fit
from blora_pyro.runs.loading import load_examples


def few(corpus):
    """24 utterances of its dev set."""
    return load_split(corpus, "dev").select(range(24))


@pytest.mark.parametrize("language", ["de", "zh"])
def test_the_pocket_whisper_recognises_speech(language):
    base = load_base()
    assert evaluate(base, load_examples(base, few(language), "dev")).main.rate < 0.15


def test_a_short_fit_halves_the_error_and_forgets_little():
    short = {"steps": 24, "batch_size": 8, "max_utterances": 100}
    sets = {"test": few("de-en"), "backward": {"en": few("en")}}
    run = fit(FitConfig(base="pocket", data="de-en", **sets, **short))
    domain, backward = run.metrics["new_domain"], run.metrics["backward_error"]
    assert domain["adapted"]["wer"]["rate"] < 0.5 * domain["base"]["wer"]["rate"]
    assert backward["change"]["difference"] < 0.05
    assert np.mean([step.nll for step in run.history[-10:]]) < run.history[0].nll
