import json

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperTokenizer
from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)

from blora_pyro.declarations import choices_of
from blora_pyro.errors import UserError
from blora_pyro.evaluation import normalizer_for
from blora_pyro.metrics import cer_counts, wer_counts
from blora_pyro.metrics.normalizers import NORMALIZERS, Normalizer
from blora_pyro.models import Base
from blora_pyro.options import FitConfig

quick = settings(deadline=None, max_examples=30)
spoken = st.lists(
    st.sampled_from(
        "I can't won't Mr. Smith's colour twenty five point hundred and a half $ € 5% 3.5 "
        "1,000 uh [noise] (laughs) Üben, l'eau – E-Mail o'clock 我 ½ हिन्दी ß".split()
    ),
    max_size=8,
).map(" ".join)


def tidy(text):
    return " ".join(text.split())


@quick
@given(spoken | st.text(max_size=20))
def test_whisper_s_normalisers_are_those_of_transformers_by_language(text):
    spellings = {"colour": "color"}
    english, basic = EnglishTextNormalizer(spellings)(text), BasicTextNormalizer()(text)
    whisper = Normalizer("whisper", spellings)
    assert whisper(text, "en") == tidy(english)
    if text.isascii():  # else see below
        assert Normalizer(spellings=spellings)(text, "en") == tidy(english)
    for language in ("de", "zh", "de-en", "en-de", ""):
        assert whisper(text, language) == tidy(basic)
    assert Normalizer("basic", spellings)(text, "en") == tidy(basic)
    assert Normalizer("none", spellings)(text, "en") == tidy(text)


@pytest.mark.parametrize(
    ("text", "other", "language"),
    [
        ("don\u2019t say we\u2019re late", "don't say we're late", "en"),
        ("co\u00adoperate \u200ehere\u200f", "cooperate here", "en"),
        ("two\u200bwords, \u2018red\u2019", "two words, 'red'", "en"),
        ("ţară şi Ţară", "țară și Țară", "ro"),
        ("s\u0327i", "și", "ro"),
        ("علي كتاب", "علی کتاب", "fa"),
        ("كيا", "کیا", "ur"),
        ("അവന്\u200d", "അവൻ", "ml"),
        ("น\u0e4d\u0e49\u0e32", "น\u0e49\u0e33", "th"),
        ("ນ\u0ecd\u0ec9\u0eb2", "ນ\u0ec9\u0eb3", "lo"),
    ],
)
def test_two_encodings_of_a_text_are_one(text, other, language):
    normalize = Normalizer()
    assert text != other and normalize(text, language) == normalize(other, language) != ""


def test_letters_that_a_language_tells_apart_stay_apart():
    normalize = Normalizer()
    for text, other, language in (("ş", "ș", "tr"), ("علي", "علی", "ps"), ("ه", "ہ", "fa")):
        assert normalize(text, language) != normalize(other, language)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Mr. Smith won't pay twenty-five dollars, uh", "en", "mister smith will not pay $25"),
        ("Das  ist, «so»! [Husten]", "de", "das ist so"),
        ("Don't stop – e-mail 5€", "de-en", "don t stop e mail 5"),
        ("Ｆｕｌｌ　ｗｉｄｔｈ", "zh", "full width"),
        ("他说\u2018好\u2019了。", "zh", "他说 好 了"),
    ],
)
def test_texts_are_normalised_by_whisper_s_as_papers_do(text, language, expected):
    assert Normalizer("whisper")(text, language) == expected


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Mr. Smith won't pay twenty-five dollars, uh", "en", "mister smith will not pay $25"),
        ("Das  ist, «so»! [Husten] (leise)", "de", "das ist so"),
        ("Don't stop \u2013 e-mail 5€ rock 'n' roll", "de-en", "don t stop e mail 5 rock n roll"),
        ("STRASSE Straße", "de", "strasse straße"),
        ("Ｆｕｌｌ　ｗｉｄｔｈ", "zh", "full width"),
        ("他说\u2018好\u2019了。", "zh", "他说 好 了"),
        ("लड़की किताब पढ़ती है।", "hi", "लड़की किताब पढ़ती है"),
        ("தமிழ், மொழி", "ta", "தமிழ் மொழி"),
        ("ที่ไหน", "th", "ที่ไหน"),
        ("ភាសា\u200bខ្មែរ។", "km", "ភាសា ខ្មែរ"),
        ("مَرْحَبًا، بِكُمْ", "ar", "مَرْحَبًا بِكُمْ"),
        ("مرحـــبا", "ar", "مرحبا"),
        ("می\u200cروم\u200f", "fa", "میروم"),
        ("שָׁלוֹם!", "he", "שָׁלוֹם"),
        ("Tie\u0302\u0301ng Việt", "vi", "tiếng việt"),
        ("İSTANBUL Isparta IŞIK", "tr", "istanbul ısparta ışık"),
        ("Bakı İÇİN", "az", "bakı için"),
        ("İstanbul I", "de", "istanbul i"),
        ("ΟΔΟΣ", "el", "οδος"),
        ("м\u2019ята мʼята м'ята", "uk", "м ята м ята м ята"),
        ("L\u2019eau d'or", "fr", "l eau d or"),
        ("❤\ufe0f 1\ufe0f\u20e3 \u00b4", "fr", "1"),
        ("🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f ja 👍🏽", "de", "ja"),
        ("مرحبا\u061c", "ar", "مرحبا"),
        ("葛\U000e0100城 （笑） ［音］", "ja", "葛城"),
        ("٢٠٢٤ عام", "ar", "2024 عام"),
        ("৫টা ১", "bn", "5টা 1"),
        ("\u02bc\u0301 x", "fr", "x"),
        ("GROẞE STRAẞE", "de", "große straße"),
    ],
)
def test_letters_marks_and_the_case_of_the_language_survive(text, language, expected):
    assert Normalizer()(text, language) == expected


@pytest.mark.parametrize(
    ("reference", "hypothesis", "language", "edits", "length"),
    [
        ("लड़की किताब पढ़ती है", "लड़का किताब पढ़ता है", "hi", 2, 4),
        ("مَرْحَبًا بِكُمْ", "مَرْحَبًا بِكُمْ", "ar", 0, 2),
        ("مَرْحَبًا بِكُمْ", "مَرْحَبًا بِكُم", "ar", 1, 2),
        ("İstanbul güzel", "istanbul güzel", "tr", 0, 2),
        ("ISI", "ısı", "tr", 0, 1),
        ("Isı", "isi", "tr", 1, 1),
        ("বাংলা ভাষা", "বাংলা ভাষী", "bn", 1, 2),
        ("qu\u2019il", "qu'il", "fr", 0, 2),
    ],
)
def test_word_errors_are_those_that_a_reader_would_count(
    reference, hypothesis, language, edits, length
):
    normalize = Normalizer()
    counts = wer_counts([normalize(reference, language)], [normalize(hypothesis, language)])
    assert (counts.edits.tolist(), counts.lengths.tolist()) == ([edits], [length])


@quick
@given(spoken | st.text(alphabet="aBIé我ท'\u2019\u200d \u20e3-\u0301_ʼnΣİ()[]<>"))
def test_a_text_normalised_twice_is_that_normalised_once(text):
    for name in ("unicode", "basic", "none"):
        for language in ("tr", "de"):
            once = Normalizer(name)(text, language)
            assert Normalizer(name)(once, language) == once


@quick
@given(st.lists(st.text(alphabet="我喜。ひらがทิสฟ้า、 「」", min_size=1), min_size=1, max_size=5))
def test_character_errors_equal_word_errors_of_letters_split_by_whisper(texts):
    # Whisper's authors score such languages by the WER of letters split by their normaliser.
    split = BasicTextNormalizer(split_letters=True)
    references, hypotheses = texts, ["我ひ" + text[1:] for text in texts]
    normalize = Normalizer("basic")
    sides = [[normalize(text, "ja") for text in side] for side in (references, hypotheses)]
    ours = cer_counts(*sides)
    letters = [[tidy(split(text)) for text in side] for side in (references, hypotheses)]
    theirs = jiwer.process_words(*letters)
    assert ours.edits.sum() == theirs.substitutions + theirs.deletions + theirs.insertions
    assert ours.lengths.tolist() == [len(text.split()) for text in letters[0]]


def test_an_unknown_normaliser_is_refused():
    with pytest.raises(UserError, match="'english'; give one of unicode, whisper, basic, none"):
        Normalizer("english")


def test_the_normalisers_are_those_that_the_options_declare():
    assert choices_of(FitConfig, "normalizer") == NORMALIZERS


@pytest.mark.parametrize("spellings", [["colour"], {"colour": 5}])
def test_a_damaged_normalizer_json_is_refused(spellings):
    with pytest.raises(UserError, match=r"normalizer\.json of the base model"):
        Normalizer(spellings=spellings)


def test_spellings_are_those_of_the_checkpoint(fluent_base, tmp_path):
    assert normalizer_for(fluent_base, "whisper")("colour", "en") == "colour"
    fluent_base.save_pretrained(tmp_path)
    (tmp_path / "normalizer.json").write_text(json.dumps({"colour": "color"}))
    tokenizer = WhisperTokenizer.from_pretrained(tmp_path)
    base = Base("british", fluent_base.net, tokenizer, fluent_base.feature_extractor)
    assert normalizer_for(base, "whisper")("The Colour", "en") == "the color"
    assert normalizer_for(base, "whisper")("The Colour", "de-en") == "the colour"
    assert normalizer_for(base, "basic")("The Colour", "en") == "the colour"
