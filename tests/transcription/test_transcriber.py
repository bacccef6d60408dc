import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from blora_pyro.adapters import find_targets, group_by_shape
from blora_pyro.data import featurise, prompt_ids, read_audio
from blora_pyro.errors import UserError
from blora_pyro.models import decoding
from blora_pyro.options import DECODER
from blora_pyro.posterior import Family, Posterior
from blora_pyro.transcription import (
    Transcriber,
    long_form,
    safeguards,
    transcribe_features,
    transcribe_files,
    transcriber,
)
from blora_pyro.transcription.windows import Recording
from blora_pyro.transcription.words import Speller, word_key

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
    encoded, tokens = encode(base, features), list(prompt)
    while len(tokens) < base.net.config.max_target_positions:
        tokens.append(int(next_logits(base, encoded, tokens).argmax()))
        if tokens[-1] == base.net.config.eos_token_id:
            break
    return base.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def encode(base, features) -> torch.Tensor:
    return base.net.model.encoder(features[None].float()).last_hidden_state


def next_logits(base, encoded, tokens) -> torch.Tensor:
    """Of the token after these, nothing being kept from one call to the next."""
    ids = torch.tensor([tokens])
    return base.net(encoder_outputs=(encoded,), decoder_input_ids=ids, use_cache=False).logits[
        0, -1
    ]


def noise(seconds: float, seed: int = 0) -> Recording:
    wave = np.random.default_rng(seed).standard_normal(round(seconds * 16_000)) * 0.1
    return Recording(f"noise{seed}", wave.astype(np.float32))


def texts_of(base, paths, language=None):
    return [one.text for one in transcribe_files(Transcriber(base, language=language), paths)]


def a_posterior(base, stddev=0.05, size=0.3, targets="all-linear") -> Posterior:
    """Around a random update of rank 2, by default a large one."""
    groups = group_by_shape(find_targets(base.net, targets), 2)
    sites = [site for group in groups for site in group.sites]
    mean = {site.name: size * torch.randn(site.shape) for site in sites}
    spread = {name: torch.full_like(value, stddev) for name, value in mean.items()}
    return Posterior("fluent", groups, 4.0, mean, spread)


# ---- features, as in evaluation


def test_transcripts_come_in_the_order_of_the_utterances(fluent_base, features, prompts):
    texts = transcribe_features(fluent_base, features, prompts)
    assert texts[:4] == ["a bicycle", "ein rad", "the red", "das rote"]


@pytest.mark.parametrize("talkative", [False, True])
def test_transcripts_are_the_greedy_ones_after_the_prompt_as_given(
    fluent_base, tiny_base, features, prompts, talkative, monkeypatch
):
    monkeypatch.setattr(safeguards, "TEMPERATURES", (0.0,))
    base = tiny_base if talkative else fluent_base  # the tiny one speaks to the last position
    texts = transcribe_features(base, features, prompts)
    assert texts == [
        greedy(base, feature, prompt) for feature, prompt in zip(features, prompts, strict=True)
    ]


@pytest.mark.parametrize("size", [1, 2])
def test_the_batch_size_changes_no_transcript(fluent_base, features, prompts, size):
    whole = transcribe_features(fluent_base, features, prompts)
    assert transcribe_features(fluent_base, features, prompts, size) == whole


def test_no_utterances_give_no_transcripts(fluent_base, features):
    assert transcribe_features(fluent_base, features[:0], []) == []


def test_an_adapted_net_may_say_something_else(fluent_base, features, prompts):
    before = transcribe_features(fluent_base, features, prompts)
    with a_posterior(fluent_base).applied(fluent_base.net):
        assert transcribe_features(fluent_base, features, prompts) != before
    assert transcribe_features(fluent_base, features, prompts) == before


# ---- files


def test_files_are_transcribed_in_their_detected_languages(fluent_base, tones_folder):
    paths = [tones_folder / "de2.wav", tones_folder / "en0.wav"]
    found = transcribe_files(Transcriber(fluent_base), paths)
    assert [one.text for one in found] == ["das rote", "the red"]
    assert [one.language for one in found] == ["de", "en"]
    assert [one.audio for one in found] == [str(path) for path in paths]
    assert [one.duration for one in found] == [0.5, 0.5]
    (segment,) = found[0].segments
    assert (segment.start, segment.end, segment.words) == (0.0, 0.5, None)


@pytest.mark.parametrize("code", ["en", "de-en"])
def test_files_are_transcribed_in_a_language_that_is_given(fluent_base, tones_folder, code):
    path = tones_folder / "de2.wav"
    features = featurise([("de2", read_audio({"path": str(path)}))], fluent_base.feature_extractor)
    expected = greedy(fluent_base, features[0], prompt_ids(fluent_base.tokenizer, code))
    assert texts_of(fluent_base, [str(path)], code) == [expected]


def test_files_are_transcribed_by_a_net_that_knows_no_languages(fluent_base, tones_folder):
    settings = fluent_base.net.generation_config
    settings.is_multilingual = False
    del settings.lang_to_id, settings.task_to_id
    assert texts_of(fluent_base, [tones_folder / "en0.wav"]) == ["the red"]


def test_the_task_is_in_the_prompt(fluent_base, tones_folder):
    path = tones_folder / "de2.wav"
    features = featurise([("de2", read_audio({"path": str(path)}))], fluent_base.feature_extractor)
    prompt = prompt_ids(fluent_base.tokenizer, "de", "translate")
    (found,) = transcribe_files(Transcriber(fluent_base, language="de", task="translate"), [path])
    assert found.text == greedy(fluent_base, features[0], prompt)
    with pytest.raises(UserError, match="'sing'"):
        transcribe_files(Transcriber(fluent_base, task="sing"), [path])


def test_many_files_are_transcribed_in_order_and_in_groups(fluent_base, tones_folder, monkeypatch):
    names = ["de2", "en0", "de3", "en1"] * 3
    monkeypatch.setattr(transcriber, "BATCHES_IN_MEMORY", 2)
    sizes, seen, files = [], [], []
    original = Transcriber.transcribe

    def transcribe(self, recordings, on_progress):
        sizes.append(len(recordings))
        return original(self, recordings, on_progress)

    monkeypatch.setattr(Transcriber, "transcribe", transcribe)
    found = transcribe_files(
        Transcriber(fluent_base, batch_size=2),
        [tones_folder / f"{name}.wav" for name in names],
        on_transcript=lambda place, one: seen.append((place, one)),
        on_progress=files.append,
    )
    known = {"de2": "das rote", "en0": "the red", "de3": "ein rad", "en1": "a bicycle"}
    assert [one.text for one in found] == [known[name] for name in names]
    assert seen == list(enumerate(found))
    assert sizes == [4, 4, 4]
    assert files == [4, 8, 12]


def test_bad_files_and_languages_are_refused_by_name(fluent_base, tones_folder, tmp_path):
    good = tones_folder / "en0.wav"
    (tmp_path / "text.wav").write_text("no audio")
    for name in ("nowhere.wav", "text.wav"):
        with pytest.raises(UserError, match=name):
            texts_of(fluent_base, [good, tmp_path / name])
    with pytest.raises(UserError, match="'xx'"):
        texts_of(fluent_base, [good], "xx")


def test_unreadable_files_are_reported_and_left_out_if_on_error_is_given(
    fluent_base, tones_folder, tmp_path
):
    told, seen, files = [], [], []
    paths = [tmp_path / "nowhere.wav", tones_folder / "en0.wav", tmp_path]
    found = transcribe_files(
        Transcriber(fluent_base),
        paths,
        lambda place, one: seen.append(place),
        lambda place, error: told.append((place, str(error))),
        files.append,
    )
    assert [one.text for one in found] == ["the red"]
    assert seen == [1]
    assert files == [3]
    assert [place for place, _ in told] == [0, 2]
    assert "nowhere.wav" in told[0][1]


# ---- long ones


@pytest.mark.usefixtures("two_temperatures")
def test_long_recordings_have_segments_in_order(timed_base):
    recordings = [noise(2.6, 1), noise(0.4, 2), noise(1.2, 3)]
    found = Transcriber(timed_base, language="de-en").transcribe(recordings)
    for recording, one in zip(recordings, found, strict=True):
        assert one.audio == recording.name
        assert all(segment.start < segment.end for segment in one.segments)
        starts = [segment.start for segment in one.segments]
        assert starts == sorted(starts)
        assert all(segment.end <= recording.duration for segment in one.segments)
        assert all(segment.text and "<|" not in segment.text for segment in one.segments)
    assert len(found[0].segments) > 2


@pytest.mark.usefixtures("two_temperatures")
def test_the_seed_decides_sampled_windows_and_the_callers_state_stays(timed_base):
    state = torch.get_rng_state()
    transcriber = Transcriber(timed_base, language="de")
    first = transcriber.transcribe([noise(1.2)])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert transcriber.transcribe([noise(1.2)]) == first
    assert replace(transcriber, seed=1).transcribe([noise(1.2)]) != first


# ---- confidences


@torch.no_grad()
def log_probs_one_by_one(base, features, prompt, tokens):
    encoded = encode(base, features)
    return [
        next_logits(base, encoded, [*prompt, *tokens[:place]]).log_softmax(-1)[token].item()
        for place, token in enumerate(tokens)
    ]


@pytest.mark.parametrize("stddev", [1e-4, 0.5])
def test_confidences_are_those_of_every_draw_by_itself(fluent_base, tones_folder, stddev):
    torch.manual_seed(3)
    posterior = a_posterior(fluent_base, stddev, size=0.05)
    names = ["de2", "en0"]
    recordings = [
        Recording(name, read_audio({"path": str(tones_folder / f"{name}.wav")})) for name in names
    ]
    transcriber = Transcriber(fluent_base, posterior, "de", samples=2, seed=5, batch_size=1)
    found = transcriber.transcribe(recordings)
    plain = replace(transcriber, samples=0).transcribe(recordings)
    assert [one.text for one in found] == [one.text for one in plain]
    features = featurise(
        ((one.name, one.wave) for one in recordings), fluent_base.feature_extractor
    )
    prompt, speller = prompt_ids(fluent_base.tokenizer, "de"), Speller(fluent_base.tokenizer)
    checked = agreed = 0
    for row, one in zip(features, found, strict=True):
        with posterior.applied(fluent_base.net):
            said = fluent_base.net.generate(
                row[None].float(), decoder_input_ids=torch.tensor([prompt]), language="de"
            )[0].tolist()
        tokens = [token for token in said if token != fluent_base.net.config.eos_token_id]
        spelled = speller.spell(tokens)
        words = [word for segment in one.segments for word in segment.words]
        assert [word.text for word in words] == [each.text for each in spelled]
        sums, shares = np.zeros(len(words)), np.zeros(len(words))
        for draw in posterior.draws(2, seed=5):
            with posterior.applied(fluent_base.net, draw):
                log_probs = log_probs_one_by_one(fluent_base, row, prompt, tokens)
                others = {word_key(word) for word in greedy(fluent_base, row, prompt).split()}
            sums += [sum(log_probs[place] for place in each.tokens) for each in spelled]
            shares += [word_key(each.text) in others for each in spelled]
        assert [word.log_prob for word in words] == pytest.approx(list(sums / 2), abs=2e-3)
        # Where no word comes twice, the aligned ones are among those that both have.
        assert all(word.agreement <= share / 2 for word, share in zip(words, shares, strict=True))
        checked += len(words)
        agreed += sum(word.agreement for word in words)
    # Close draws say what the mean says, but for what is on the brink of another token; wild ones
    # do not.
    assert agreed > 0.5 * checked if stddev < 0.1 else agreed < 0.9 * checked


@pytest.mark.usefixtures("two_temperatures")
def test_confidences_of_timed_windows(timed_base):
    torch.manual_seed(3)
    posterior = a_posterior(timed_base, stddev=1e-6)  # so that draws say what the mean says
    transcriber = Transcriber(timed_base, posterior, "de-en", samples=2)
    found = transcriber.transcribe([noise(1.3, 1), noise(0.7, 2)])
    for one in found:
        for segment in one.segments:
            assert " ".join(word.text for word in segment.words) == " ".join(segment.text.split())
            assert all(word.log_prob < 0 for word in segment.words)


def test_words_have_times_beside_their_confidences(fluent_base, tones_folder):
    torch.manual_seed(3)
    posterior = a_posterior(fluent_base, size=0.05)
    files = [tones_folder / "de2.wav"]
    options = {"language": "de", "word_timestamps": True}
    plain = transcribe_files(Transcriber(fluent_base, posterior, **options), files)
    found = transcribe_files(Transcriber(fluent_base, posterior, samples=2, **options), files)
    for one, other in zip(plain, found, strict=True):
        (segment,), (sure,) = one.segments, other.segments
        assert segment.times == sure.times and segment.words is None
        times = [time for word in segment.times for time in (word.start, word.end)]
        assert 0 <= min(times) and max(times) <= one.duration
        words = sure.to_json()["words"]
        assert [word["text"] for word in words] == segment.text.split()
        assert {"text", "start", "end", "probability", "confidence"} <= words[0].keys()


@pytest.mark.usefixtures("two_temperatures")
def test_words_of_timed_windows_have_times_in_the_recording(timed_base):
    (found,) = Transcriber(timed_base, None, "de-en", word_timestamps=True).transcribe([noise(3.4)])
    words = [word for segment in found.segments for word in segment.times]
    for segment in found.segments:
        assert " ".join(word.text for word in segment.times) == " ".join(segment.text.split())
    assert all(0 <= word.start <= word.end <= found.duration + 1e-6 for word in words)
    assert words[-1].start > 1.0  # of a later window


def test_draws_depend_on_the_seed_alone(fluent_base, tones_folder):
    torch.manual_seed(3)
    posterior = a_posterior(fluent_base, size=0.05)
    path = [tones_folder / "de2.wav"]

    def words(seed, batch_size=16):
        transcriber = Transcriber(
            fluent_base, posterior, "de", samples=2, seed=seed, batch_size=batch_size
        )
        return transcribe_files(transcriber, path)[0].segments[0].words

    assert words(0) == words(0, batch_size=1) != words(1)


@pytest.mark.parametrize(("targets", "encodings"), [(DECODER, 2), ("all-linear", 3)])
def test_draws_share_the_states_of_an_encoder_that_none_changes(
    fluent_base, tones_folder, monkeypatch, targets, encodings
):
    torch.manual_seed(3)
    posterior = a_posterior(fluent_base, size=0.05, targets=targets)
    files = [tones_folder / f"{name}.wav" for name in ("de2", "en0", "de3")]
    seen: list[int] = []

    def counted(base, features):
        seen.append(len(features))
        return decoding.encode(base, features)

    for module in (transcriber, long_form):
        monkeypatch.setattr(module, "encode", counted)

    def words(room):
        seen.clear()
        if not room:
            monkeypatch.setattr("blora_pyro.models.encoder_states._open", refuse)
        found = transcribe_files(Transcriber(fluent_base, posterior, "de", samples=2), files)
        return [one.segments for one in found]

    def refuse(*_):
        raise UserError("no room")

    with_room = words(True)
    assert sum(seen) == encodings * len(files)  # once for the transcripts
    assert words(False) == with_room
    assert sum(seen) == 3 * len(files)


def test_the_net_is_left_as_it_was(fluent_base, tones_folder):
    before = copy.deepcopy(fluent_base.net.state_dict())
    transcriber = Transcriber(fluent_base, a_posterior(fluent_base), "de", samples=1)
    transcribe_files(transcriber, [tones_folder / "de2.wav"])
    after = fluent_base.net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert texts_of(fluent_base, [tones_folder / "de2.wav"], "de") == ["das rote"]


def test_a_net_that_computes_no_numbers_is_refused_and_says_nothing(fluent_base, features, prompts):
    huge = a_posterior(fluent_base, size=1e30)
    with huge.applied(fluent_base.net), pytest.raises(UserError, match="what is no number"):
        transcribe_features(fluent_base, features, prompts)


def test_invalid_options_are_refused(fluent_base):
    posterior = a_posterior(fluent_base)
    point = a_posterior(fluent_base, stddev=0.0)
    mine = replace(posterior, family=Family("mine.py", {}, "mine.py", runs_code=False))
    mine = replace(mine, state={"x": torch.zeros(1)})
    for options, message in (
        ({"samples": 4}, "no adapter"),
        ({"samples": -1}, "samples is -1"),
        ({"samples": 4, "posterior": point}, "point estimate"),
        ({"samples": 4, "posterior": mine}, r"mine\.py; name it with --prior"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": 10**30}, "seed is 10000"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(UserError, match=message):
            Transcriber(fluent_base, **options)
    Transcriber(fluent_base, point)
    Transcriber(fluent_base, mine)
