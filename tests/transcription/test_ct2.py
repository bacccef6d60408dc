"""What CTranslate2 hears: on the pocket Whisper, whose window is 3 s and has no timestamps."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from blora_pyro.data import SAMPLING_RATE, load_split, prompt_ids, read_audio
from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.runs.conversion import Which, converted
from blora_pyro.transcription import Transcriber
from blora_pyro.transcription.transcripts import Transcript
from blora_pyro.transcription.windows import Recording

pytest.importorskip("faster_whisper", reason="needs blora-pyro[fast]")
from blora_pyro.transcription import ct2
from blora_pyro.transcription.ct2 import Decoder, Settings, transcribe_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLORA_PYRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return converted(Which(None, "pocket", None, False, None, "scale", None))


@pytest.fixture(scope="module")
def speech():
    """Code-switched utterances, German and English, that the base is sure enough of."""
    rows = load_split("de-en", "test").select(range(4))
    return [
        (str(number), read_audio(row["audio"], start=row["start"], end=row["end"]))
        for number, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def decoder(folder):
    """Of German and English in one prompt."""
    return Decoder(folder, "cpu", "float32", Settings("de-en", batch_size=3))


def decoded(decoder, recordings, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "settings", replace(decoder.settings, **settings))
        return decoder.decode(recordings)


@pytest.fixture
def asked(decoder, monkeypatch):
    """The prompts of every call, and how it decodes."""
    calls, model = [], decoder.model._model

    class Spied:
        def __getattr__(self, name):
            return getattr(model, name)

        def generate(self, features, prompts, **options):
            calls.append((prompts, options))
            return model.generate(features, prompts, **options)

    monkeypatch.setattr(decoder.model, "_model", Spied())
    return calls


def test_it_says_what_torch_says(decoder, speech):
    base = load_base("pocket")
    recordings = [Recording(*one) for one in speech]
    expected = Transcriber(base, language="de-en").transcribe(recordings)
    found = decoder.decode(speech)
    assert [one.text for one in found] == [one.text for one in expected]
    assert all(one.text for one in found)
    assert [replace(one, engine="torch", segments=()) for one in found] == [
        replace(one, segments=()) for one in expected
    ]
    for one in found:
        assert [(part.start, part.end) for part in one.segments] == [
            (0, pytest.approx(one.duration, abs=0.011))
        ]


def test_recordings_share_batches_and_say_the_same_alone(decoder, speech, asked):
    together = decoder.decode(speech)
    assert [len(prompts) for prompts, _ in asked] == [3, 1]
    assert decoded(decoder, speech, batch_size=1) == together


def test_what_is_decoded_with_times_shares_no_batch(decoder, speech, asked, monkeypatch):
    """One sample more than the window makes timestamps a must, and no frame more."""
    monkeypatch.setattr(decoder, "about", replace(decoder.about, timed=True))
    (name, wave), *others = speech
    longer = np.pad(wave, (0, decoder.feature_extractor.n_samples + 1 - len(wave)))
    found = decoder.decode([(name, longer), *others])
    untimed = decoder.hf_tokenizer.token_to_id("<|notimestamps|>")
    ends = [[prompt[-1] == untimed for prompt in prompts] for prompts, _ in asked[:2]]
    assert ends == [[True] * 3, [False]]
    assert found[1:] == decoder.decode(others)


def test_nothing_is_heard_in_silence(decoder):
    (found,) = decoder.decode([("silence", np.zeros(16_000, np.float32))])
    assert found.segments == ()


def test_special_tokens_of_a_text_are_text(decoder, speech, asked):
    start = decoder.hf_tokenizer.token_to_id("<|startoftranscript|>")
    decoded(decoder, speech[:1], initial_prompt="red <|startoftranscript|>", hotwords="<|en|>")
    ((prompt,), _) = asked[0]
    assert prompt.count(start) == 1


def test_what_leaves_no_room_for_a_transcript_is_refused(decoder):
    for given, names in (
        ({"hotwords": "red " * 40}, "hotwords"),
        ({"hotwords": "red " * 20, "initial_prompt": "red " * 20}, "initial_prompt and hotwords"),
    ):
        one = copy.copy(decoder)
        one.settings = replace(decoder.settings, **given)
        with pytest.raises(
            UserError, match=rf"{names} would take \d+ tokens, .* room for 31 before"
        ):
            one.check()


def test_the_prompt_is_that_of_the_fit(decoder, speech, asked):
    decoder.decode(speech[:2])
    (prompts, options), tokenizer = asked[0], load_base("pocket").tokenizer
    assert prompts == [prompt_ids(tokenizer, "de-en")] * 2
    assert options["beam_size"] == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "about", replace(decoder.about, language_map={"qu": "tr"}))
        decoded(decoder, speech[:1], language="qu-es")
    assert asked[-1][0] == [prompt_ids(tokenizer, "qu-es", language_map={"qu": "tr"})]
    with pytest.raises(UserError, match="does not know the language 'xh'"):
        decoded(decoder, speech[:1], language="xh")


def test_what_is_said_before_comes_before_the_prompt(decoder, speech, asked):
    decoded(decoder, speech[:2], initial_prompt="the red", beam_size=2)
    decoded(decoder, speech[:1], hotwords="fahrrad")
    tokenizer = decoder.hf_tokenizer
    previous = tokenizer.token_to_id("<|startofprev|>")
    for (prompts, _), text in zip(asked, (" the red", " fahrrad"), strict=True):
        before = [previous, *tokenizer.encode(text, add_special_tokens=False).ids]
        assert [prompt[: len(before)] for prompt in prompts] == [before] * len(prompts)
        assert prompts[0][len(before)] == tokenizer.token_to_id("<|startoftranscript|>")
    assert [options["beam_size"] for _, options in asked] == [2, 1]


def test_words_have_times(decoder, speech):
    for one, plain in zip(
        decoded(decoder, speech, word_timestamps=True), decoder.decode(speech), strict=True
    ):
        assert one.text == plain.text
        (segment,) = one.segments
        assert [word.text for word in segment.times] == one.text.split()
        times = [time for word in segment.times for time in (word.start, word.end)]
        assert times == sorted(times) and 0 <= times[0] < times[-1] <= one.duration
        assert all(0 < word.probability <= 1 for word in segment.times)
        assert len(segment.to_json()["words"]) == len(segment.times)
        json.dumps(one.to_json())


def test_words_have_the_times_of_torch(decoder, speech):
    transcriber = Transcriber(load_base("pocket"), language="de-en", word_timestamps=True)
    theirs = transcriber.transcribe([Recording(*one) for one in speech])
    apart = []
    for one, other in zip(decoded(decoder, speech, word_timestamps=True), theirs, strict=True):
        for word, same in zip(one.segments[0].times, other.segments[0].times, strict=True):
            assert word.text == same.text
            assert word.probability == pytest.approx(same.probability, abs=0.02)
            apart.append(max(abs(word.start - same.start), abs(word.end - same.end)))
    assert sum(each <= 0.2 for each in apart) >= 0.95 * len(apart) > 5


def test_a_long_recording_is_cut_at_its_pauses(decoder, speech):
    pause = np.zeros(SAMPLING_RATE, np.float32)
    long = np.concatenate([part for _, wave in speech[:3] for part in (wave, pause)])
    (found,) = decoder.decode([("long", long)])
    assert len(found.segments) >= 3
    starts = [segment.start for segment in found.segments]
    assert starts == sorted(starts) and starts[2] > len(speech[0][1]) / SAMPLING_RATE + 1
    expected = Transcriber(load_base("pocket"), language="de-en").transcribe(
        [Recording("long", long)]
    )
    assert found.text == expected[0].text


def test_what_is_no_speech_is_left_out(decoder):
    noise = 0.01 * np.random.default_rng(0).standard_normal(SAMPLING_RATE).astype(np.float32)
    (found,) = decoded(decoder, [("noise", noise)], vad_filter=True)
    assert (found.segments, found.duration, found.language) == ((), 1.0, "de-en")


def test_pieces_of_a_word_are_one_where_spaces_are_between_words():
    def said(*texts):
        words = [
            SimpleNamespace(word=text, start=place, end=place + 0.5, probability=0.5 + 0.1 * place)
            for place, text in enumerate(texts)
        ]
        segment = SimpleNamespace(start=0, end=4, text="".join(texts), words=words)
        (found,) = ct2._read([segment], start=10.0, length=3.25, timed=True)
        return [(one.text, one.start, one.end, one.probability) for one in found.times]

    assert said(" We", " re", "-entered.") == [
        ("We", 10.0, 10.5, 0.5),
        ("re-entered.", 11.0, 12.5, pytest.approx(0.65)),
    ]
    assert [text for text, *_ in said("我", "们", " red", "我")] == ["我", "们", "red", "我"]
    assert said(*"abcd")[-1][2] == 13.25  # the end of the recording


def test_silence_follows_a_recording(decoder):
    features = np.zeros((80, 300), np.float32)
    features[:, :7] = np.linspace(-1, 1, 7)
    window = decoder._window(features)
    assert window.shape == (80, 300)
    np.testing.assert_array_equal(window[:, :7], features[:, :7])
    assert (window[:, 7:] == -1).all()  # eight orders of magnitude below the loudest
    assert (decoder._window(features[:, :0]) == -1.5).all()


def test_what_is_decoded_is_handed_out_before_much_more_is_read(decoder, tmp_path, monkeypatch):
    groups = []

    def decode(recordings, on_progress):
        groups.append(len(recordings))
        return [Transcript(name, "", 1.0, ()) for name, _ in recordings]

    monkeypatch.setattr(decoder, "decode", decode)
    for number, seconds in enumerate([1, 1, 10, 1, 1, 1, 1]):  # batches of three windows of 3 s
        wave = np.zeros(seconds * SAMPLING_RATE, np.float32)
        soundfile.write(tmp_path / f"{number}.wav", wave, SAMPLING_RATE)
    transcribe_files(decoder, sorted(tmp_path.glob("*.wav")))
    assert groups == [3, 3, 1]
    groups.clear()
    transcribe_files(decoder, sorted(tmp_path.glob("*.wav"))[2:])
    assert groups == [1, 3, 1]


def test_it_is_told_how_much_of_a_long_recording_is_decoded(decoder, speech):
    wave, pause = [one for _, one in speech], np.zeros(16_000, np.float32)
    shares = []
    (found,) = decoder.decode([("long", np.concatenate([*wave, pause, *wave]))], shares.append)
    assert len(found.segments) > 2
    shares = [round(share, 6) for share in shares]
    assert shares == sorted(shares) and 0 < shares[0] < 0.9 and shares[-1] == 1


def test_files_come_in_order_and_a_bad_one_is_told(decoder, speech, tmp_path):
    for name, wave in speech:
        soundfile.write(tmp_path / f"{name}.wav", wave, SAMPLING_RATE, subtype="FLOAT")
    (tmp_path / "bad.wav").write_text("no audio")
    paths = [tmp_path / f"{name}.wav" for name in ("0", "1", "bad", "2", "3")]
    done, failed = [], []
    found = transcribe_files(
        decoder,
        paths,
        lambda index, transcript: done.append((index, transcript)),
        lambda index, error: failed.append(index),
    )
    assert [index for index, _ in done] == [0, 1, 3, 4] and failed == [2]
    assert [one for _, one in done] == found
    assert [one.text for one in found] == [one.text for one in decoder.decode(speech)]
    assert transcribe_files(decoder, paths[2:3], on_error=lambda *_: None) == []
    with pytest.raises(UserError, match=r"bad\.wav"):
        transcribe_files(decoder, paths)
