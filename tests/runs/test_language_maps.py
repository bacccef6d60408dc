import json

import pytest
import torch

from blora_pyro.data import load_mixture
from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.options import FitConfig
from blora_pyro.runs.fit_folders import FitFolder
from blora_pyro.runs.fits import fit
from blora_pyro.runs.language_maps import choose_token, heard_languages, used_tokens
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.record import FITTING, RunRecord


class Notes(Listener):
    """Keeps what a fit tells."""

    def __init__(self):
        self.told = []

    def note(self, text):
        self.told.append(text)


@pytest.fixture(scope="module")
def kichwa(tones_folder, tmp_path_factory):
    """Tones that the base knows as Spanish, in a language that it has no token for."""
    folder = tmp_path_factory.mktemp("kichwa")
    for name in ("train", "test"):
        text = (tones_folder / f"{name}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        for row in rows:
            row |= {"audio": str(tones_folder / row["audio"]), "language": "qu"}
            del row["word_languages"]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def base(polyglot_folder):
    return load_base(str(polyglot_folder))


@pytest.fixture
def options(fit_options, polyglot_folder, kichwa):
    return {**fit_options, "base": str(polyglot_folder), "data": str(kichwa), "steps": 1}


def test_the_token_under_which_the_texts_are_likeliest_is_chosen(base, kichwa):
    choice = choose_token(base, "qu", load_mixture(str(kichwa), "train"), used={"de"})
    assert choice.token == "es" and [*choice.scores] == ["es", "en"]
    assert choice.scores["es"] < choice.scores["en"] and choice.utterances == 2
    assert "prompted as es (Spanish), under which 2 training texts are likeliest" in str(choice)
    assert choice == choose_token(base, "qu", load_mixture(str(kichwa), "train"), used={"de"})
    assert base.language_map == {}


def test_a_token_in_use_is_not_chosen_and_none_that_was_never_trained(base, kichwa):
    rows = load_mixture(str(kichwa), "train")
    assert choose_token(base, "qu", rows, used={"es"}).token in ("de", "en")
    with pytest.raises(UserError, match=r"language qu, and none .* language_map qu=TOKEN"):
        choose_token(base, "qu", rows, used={"de", "en", "es"})  # French is left


@pytest.mark.parametrize("slot", ["as it was made", "zero", "the mean word"])
def test_a_slot_that_was_never_trained_is_not_heard(base, kichwa, slot):
    weights = base.net.get_input_embeddings().weight.data
    french = base.tokenizer.convert_tokens_to_ids("<|fr|>")
    if slot != "as it was made":
        weights[french] = 0.0 if slot == "zero" else weights[:french].mean(0)
    with torch.inference_mode():
        states = [torch.randn(1, 50, 16), torch.randn(1, 50, 16)]
    assert "fr" not in heard_languages(base, states)


def test_languages_of_data_and_backward_sets_are_in_use(base, options, tones_folder, kichwa):
    backward = {"talks": str(tones_folder / "de.jsonl"), "Spanish": str(tones_folder / "en.jsonl")}
    config = FitConfig(**{**options, "backward": backward, "language": "fr"})
    rows = load_mixture(str(kichwa), "train")
    assert used_tokens(base, config, rows, None) == {"qu", "fr", "de", "es", "en"}


def test_a_fit_chooses_tells_and_keeps_what_it_chose(options, tmp_path):
    listener = Notes()
    fit(FitConfig(**options), tmp_path / "run", evaluate=False, progress=listener)
    (line,) = (line for line in listener.told if "no token" in line)
    assert line.startswith("the base has no token for the language qu: it is prompted as es")
    record = RunRecord.read(tmp_path / "run")
    assert record.resolved.language_map == {"qu": "es"} and record.options["language_map"] == "auto"
    record.state = FITTING  # as if it had been killed
    record.write(tmp_path / "run")
    assert FitFolder.reopen(tmp_path / "run", FitConfig()).config.language_map == {"qu": "es"}


def test_a_stream_chooses_by_its_first_rows(options):
    config = FitConfig(**{**options, "streaming": True, "beta": 0.0})
    assert fit(config, evaluate=False).config.language_map == {"qu": "es"}


def test_nothing_is_chosen_where_all_have_tokens(options, tones_folder):
    listener = Notes()
    config = FitConfig(**{**options, "data": str(tones_folder)})
    assert fit(config, evaluate=False, progress=listener).config.language_map == "auto"
    assert not any("no token" in line for line in listener.told)


def test_what_is_no_code_of_a_language_is_refused_and_never_mapped(options, kichwa, tmp_path):
    text = (kichwa / "train.jsonl").read_text().replace('"qu"', '"Spansh"')
    (tmp_path / "train.jsonl").write_text(text)
    wanted = r"line 1 and 1 more rows: the tokenizer does not know .* 'Spansh'; it knows"
    with pytest.raises(UserError, match=wanted):
        fit(FitConfig(**{**options, "data": str(tmp_path / "train.jsonl")}), evaluate=False)
