import pytest
import soundfile
import torch

from blora_pyro import transcription
from blora_pyro.adapters import find_targets, group_by_shape
from blora_pyro.data import featurise, prompt_ids, read_audio
from blora_pyro.errors import UserError
from blora_pyro.posterior import Posterior
from blora_pyro.transcription import decode, detect_languages, transcribe_features, transcribe_files

# Tones of the monolingual files, out of order, and the prompt that each is given.
FILES = ("en1", "de3", "en0", "de2", "de3", "en1")
CODES = ("en", "de", "en", "de", "de-en", "de")


@pytest.fixture
def features(fluent_base, tones_folder) -> torch.Tensor:
    waves = ((name, read_audio({"path": str(tones_folder / f"{name}.wav")})) for name in FILES)
    return featurise(waves, fluent_base.feature_extractor)


@pytest.fixture
def prompts(fluent_base) -> list[list[int]]:
    return [prompt_ids(fluent_base.tokenizer, code) for code in CODES]


@torch.no_grad()
def greedy(base, features, prompt) -> str:
    """The transcript of one utterance (mels, frames): the most probable token, again and again."""
    net, tokens = base.net, list(prompt)
    while len(tokens) < net.config.max_target_positions:
        logits = net(
            input_features=features[None].float(), decoder_input_ids=torch.tensor([tokens])
        ).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == net.config.eos_token_id:
            break
    return base.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_transcripts_come_in_the_order_of_the_utterances(fluent_base, features, prompts):
    texts = transcribe_features(fluent_base, features, prompts)
    assert texts[:4] == ["a bicycle", "ein rad", "the red", "das rote"]


def test_transcripts_are_those_of_one_utterance_at_a_time(fluent_base, features, prompts):
    texts = transcribe_features(fluent_base, features, prompts)
    for index, prompt in enumerate(prompts):
        tokens = fluent_base.net.generate(
            features[index : index + 1].float(),
            decoder_input_ids=torch.tensor([prompt]),
            language="en",
        )
        alone = fluent_base.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
        assert texts[index] == alone


@pytest.mark.parametrize("talkative", [False, True])
def test_transcripts_are_the_greedy_ones_after_the_prompt_as_given(
    fluent_base, tiny_base, features, prompts, talkative
):
    base = tiny_base if talkative else fluent_base  # the tiny one speaks to the last position
    texts = transcribe_features(base, features, prompts)
    assert texts == [
        greedy(base, feature, prompt) for feature, prompt in zip(features, prompts, strict=True)
    ]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_batch_size_changes_no_transcript(fluent_base, features, prompts, monkeypatch, size):
    whole = transcribe_features(fluent_base, features, prompts)
    monkeypatch.setattr(transcription, "BATCH_SIZE", size)
    assert transcribe_features(fluent_base, features, prompts) == whole


def test_the_prompt_matters(fluent_base, features):
    texts = {
        code: decode(fluent_base, features[:1].float(), prompt_ids(fluent_base.tokenizer, code))
        for code in ("en", "de", "de-en")
    }
    assert texts["en"] == ["a bicycle"]
    assert texts["en"] != texts["de-en"]


def test_nothing_is_transcribed_of_nothing(fluent_base, features):
    assert transcribe_features(fluent_base, features[:0], []) == []


def test_languages_are_detected(fluent_base, features):
    assert detect_languages(fluent_base, features.float()) == [name[:2] for name in FILES]


def test_languages_of_any_net_are_codes_that_it_knows(tiny_base, features):
    codes = detect_languages(tiny_base, features.float())
    assert len(codes) == len(features)
    assert set(codes) <= {"de", "en"}


def test_files_are_transcribed_in_their_detected_languages(fluent_base, tones_folder):
    paths = [tones_folder / "de2.wav", tones_folder / "en0.wav"]
    assert transcribe_files(fluent_base, paths) == ["das rote", "the red"]


def test_files_are_transcribed_in_a_language_that_is_given(fluent_base, tones_folder):
    path = tones_folder / "de2.wav"
    features = featurise([("de2", read_audio({"path": str(path)}))], fluent_base.feature_extractor)
    for code in ("en", "de-en"):
        expected = greedy(fluent_base, features[0], prompt_ids(fluent_base.tokenizer, code))
        assert transcribe_files(fluent_base, [str(path)], code) == [expected]


def test_files_are_transcribed_by_a_net_that_knows_no_languages(fluent_base, tones_folder):
    settings = fluent_base.net.generation_config
    settings.is_multilingual = False
    del settings.lang_to_id, settings.task_to_id
    assert transcribe_files(fluent_base, [tones_folder / "en0.wav"]) == ["the red"]


def test_an_adapted_net_may_say_something_else(fluent_base, features, prompts):
    groups = group_by_shape(find_targets(fluent_base.net, "all-linear"), 2)
    sites = [site for group in groups for site in group.sites]
    mean = {site.name: 0.5 * torch.randn(site.shape) for site in sites}
    posterior = Posterior("fluent", groups, 4.0, mean, mean)
    before = transcribe_features(fluent_base, features, prompts)
    with posterior.applied(fluent_base.net):
        assert transcribe_features(fluent_base, features, prompts) != before
    assert transcribe_features(fluent_base, features, prompts) == before


def test_bad_files_and_languages_are_refused_by_name(fluent_base, tones_folder, tmp_path):
    good = tones_folder / "en0.wav"
    with pytest.raises(UserError, match=r"nowhere\.wav"):
        transcribe_files(fluent_base, [good, tmp_path / "nowhere.wav"])
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(UserError, match=r"text\.wav"):
        transcribe_files(fluent_base, [tmp_path / "text.wav"])
    soundfile.write(tmp_path / "long.wav", torch.zeros(16_001).numpy(), 16_000)
    with pytest.raises(UserError, match=r"long\.wav"):
        transcribe_files(fluent_base, [tmp_path / "long.wav"])
    with pytest.raises(UserError, match="'xx'"):
        transcribe_files(fluent_base, [good], "xx")
