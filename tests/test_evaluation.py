import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.data import Examples, read_manifest
from blora_pyro.evaluation import Evaluation, change_summary, evaluate, rate_summary, score
from blora_pyro.languages import read_language
from blora_pyro.metrics import Counts, words
from blora_pyro.metrics.normalizers import Normalizer

quick = settings(deadline=None, max_examples=60)


def texts_of(texts, languages, word_languages=None) -> Examples:
    """`Examples` without audio: what `score` looks at."""
    examples = object.__new__(Examples)
    examples.texts = texts
    examples.languages = languages
    examples.written = [read_language(language) for language in languages]
    examples.word_languages = word_languages or [[] for _ in texts]
    return examples


def made(edits, lengths) -> Evaluation:
    counts = Counts(np.array(edits), np.array(lengths))
    texts, points = ["a"] * len(edits), [[] for _ in edits]
    return Evaluation("wer", {"wer": counts, "cer": counts}, texts, texts, points)


@pytest.mark.parametrize(
    ("language", "metric", "measures"),
    [
        ("de", "wer", {"wer", "cer"}),
        ("zh", "cer", {"cer"}),
        ("de-en", "wer", {"wer", "cer"}),
        ("zh-en", "mer", {"mer", "cer"}),
        ("", "wer", {"wer", "cer"}),
    ],
)
def test_the_measure_is_chosen_by_the_language(language, metric, measures):
    result = score(texts_of(["ab cd"], [language]), ["ab ce"])
    assert result.metric == metric
    assert set(result.counts) == measures
    assert result.main is result.counts[metric]


@pytest.mark.parametrize(
    ("languages", "metric"),
    [
        (["zh", "ja"], "cer"),
        (["zh", "zh", "en"], "mer"),
        (["en", "en", "zh"], "mer"),
        (["de", "de-en"], "wer"),
        (["zh-en", "zh"], "mer"),
        (["km", "bo", "th"], "cer"),
        (["ja-Latn"], "wer"),
        (["de", "my"], "mer"),
    ],
)
def test_the_measure_of_mixed_sets_is_one_for_all_of_them(languages, metric):
    texts = {
        "zh": "我 红",
        "ja": "こ れ",
        "en": "red car",
        "de": "rot",
        "de-en": "das car",
        "ja-Latn": "kore wa",
    }
    given = [texts.get(language, "我car") for language in languages]
    result = score(texts_of(given, languages), given)
    assert result.metric == metric
    assert result.main.rate == 0


def test_without_a_language_the_text_decides():
    assert score(texts_of(["red", "我"], ["", "zh"]), ["", ""]).metric == "mer"
    assert score(texts_of(["红", "我"], ["", "zh"]), ["", ""]).metric == "cer"
    assert score(texts_of(["red"], [""]), [""]).metric == "wer"


def test_a_script_without_spaces_counts_whatever_the_language_is_called():
    assert score(texts_of(["red 红", "rot"], ["de", "de"]), ["", ""]).metric == "mer"
    assert score(texts_of(["ភាសា"], [""]), [""]).metric == "cer"
    assert score(texts_of(["ok", "我"], ["zh", "zh"]), ["", ""]).metric == "cer"


def test_a_translation_is_scored_as_english():
    examples = texts_of(["$200"], ["zh"])
    examples.written = [language.written("translate") for language in examples.written]
    result = score(examples, ["two hundred dollars"])
    assert (result.metric, result.main.edits.tolist()) == ("wer", [0])


def test_rates_are_those_counted_by_hand():
    result = score(texts_of(["the red car", "a cat"], ["en", "en"]), ["the rad car", "a"])
    assert result.counts["wer"].rate == 2 / 5
    assert result.counts["cer"].rate == (1 + 4) / (11 + 5)


def test_case_and_punctuation_are_no_errors_on_either_side():
    result = score(texts_of(["Hallo, Welt!"], ["de"]), ["hallo welt"])
    assert result.counts["wer"].edits.tolist() == [0]
    result = score(texts_of(["hallo welt"], ["de"]), ["«Hallo» – Welt..."])
    assert result.counts["wer"].edits.tolist() == [0]
    assert (result.references, result.hypotheses) == (["hallo welt"], ["hallo welt"])


def test_pier_comes_with_word_languages_only_and_only_if_every_utterance_has_them():
    texts, languages = ["das red", "ein bicycle"], ["de-en", "de-en"]
    tags = [["de", "en"], ["de", "en"]]
    assert "pier" in score(texts_of(texts, languages, tags), texts).counts
    assert "pier" not in score(texts_of(texts, languages), texts).counts
    assert "pier" not in score(texts_of(texts, languages, [tags[0], []]), texts).counts
    assert "pier" not in score(texts_of(texts, ["de", "de"], tags), texts).counts


def test_pier_counts_errors_at_words_of_the_embedded_language():
    examples = texts_of(["das red rad"], ["de-en"], [["de", "en", "de"]])
    assert score(examples, ["der rad rat"]).counts["pier"].rate == 1
    assert score(examples, ["der red rat"]).counts["pier"].rate == 0
    examples = texts_of(["das red rad"], ["en-de"], [["de", "en", "de"]])
    assert score(examples, ["das rad rad"]).counts["pier"].rate == 0


def test_normalising_keeps_every_word_with_its_language():
    # The dash is dropped with its code, and "E-Mail" becomes two words of the same language.
    examples = texts_of(["Das – E-Mail, bitte!"], ["de-en"], [["de", "de", "en", "de"]])
    for hypothesis, edits in (
        ("das e mail bitte", 0),
        ("das é mail bitte", 1),
        ("das e male bitte", 1),
        ("der e mail bitten", 0),
        ("Das, E-MAIL. BITTE?", 0),
    ):
        pier = score(examples, [hypothesis]).counts["pier"]
        assert (pier.edits.tolist(), pier.lengths.tolist()) == ([edits], [2])


def test_pier_of_chinese_and_english_takes_a_code_a_character():
    examples = texts_of(["我喜欢Red!"], ["zh-en"], [["zh", "zh", "zh", "en"]])
    pier = score(examples, ["我喜欢 rad"]).counts["pier"]
    assert (pier.edits.tolist(), pier.lengths.tolist()) == ([1], [1])


def test_pier_of_a_mixed_set_is_that_of_its_code_switched_utterances():
    texts = ["ein rad", "das red rad", "el red rosso", "ja"]
    languages = ["de", "de-en", "es-it", "de"]
    tags = [[], ["de", "en", "de"], ["es", "es", "it"], []]
    result = score(texts_of(texts, languages, tags), ["", "das rad rad", "el red rosa", "ja"])
    assert result.counts["pier"].edits.tolist() == [1, 1]
    assert result.points == [[], [False, True, False], [False, False, True], []]


def test_pier_goes_without_code_switched_utterances_that_say_nothing():
    examples = texts_of(["das red", ""], ["de-en", "de-en"], [["de", "en"], []])
    assert score(examples, ["das red", "oh"]).counts["pier"].lengths.tolist() == [1]


def test_a_transcript_without_word_languages_leaves_no_pier_raw_or_normalised():
    examples = texts_of(["das red", "[laughs]"], ["de-en", "de-en"], [["de", "en"], []])
    result = score(examples, ["das red", ""])
    assert "pier" not in result.counts
    assert "pier" not in result.raw.counts


def test_words_in_brackets_go_with_their_languages():
    text, tags = "das (loud noise) red [x]rad", ["de", "en", "en", "en", "de"]
    result = score(texts_of([text], ["de-en"], [tags]), ["das rad rad"])
    assert result.references == ["das red rad"]
    assert result.points == [[False, True, False]]
    assert result.raw.points == [[code == "en" for code in tags]]
    assert result.counts["pier"].edits.tolist() == [1]


def test_words_of_marks_without_letters_are_dropped_with_their_languages():
    result = score(texts_of(["\u3099\u0e34 red"], ["zh-en"], [["zh", "zh", "en"]]), ["red"])
    assert result.references == result.hypotheses == ["red"]


def test_pier_and_wer_are_counted_on_one_alignment():
    # Han that a model made up is one word to both.
    examples = texts_of(["das red rad"], ["de-en"], [["de", "en", "de"]])
    result = score(examples, ["das 我喜欢 rad"])
    assert result.counts["pier"].edits.tolist() == result.counts["wer"].edits.tolist() == [1]


messy = st.text(
    alphabet="aBßΣ我欢がｶﾞ\u3099ทิe\u0301 '-.,()[]\u3000–½ﬁ㈱\U000e0020\U000f0000",
    min_size=1,
    max_size=12,
)


@quick
@given(st.lists(messy, min_size=1, max_size=4), st.data())
def test_the_reference_as_hypothesis_has_no_errors(texts, data):
    codes = st.sampled_from(["zh", "en"])
    tags = [
        data.draw(st.lists(codes, min_size=(n := len(words(text))), max_size=n)) for text in texts
    ]
    examples = texts_of(texts, ["zh-en"] * len(texts), tags)
    result = score(examples, texts)
    assert all(int(counts.edits.sum()) == 0 for counts in result.counts.values())
    for one, normalise in ((result, Normalizer()), (result.raw, Normalizer("none"))):
        assert one.references == one.hypotheses == [normalise(text) for text in texts]
        for reference, points in zip(one.references, one.points, strict=True):
            assert len(points) in (0, len(words(reference)))


def test_a_last_sigma_is_one_on_both_sides():
    # A letter, a Thai vowel sign (a word of its own) and Σ, which so is the last of its word.
    text = "B\u0e34Σ"
    result = score(texts_of([text], ["zh-en"], [["zh", "en", "zh"]]), [text])
    assert result.references == result.hypotheses == ["b\u0e34ς"]


def test_summary_has_rates_as_fractions_within_their_intervals():
    texts = ["das red rad"] * 12
    examples = texts_of(texts, ["de-en"] * 12, [["de", "en", "de"]] * 12)
    result = score(examples, ["das red rad"] * 6 + ["das rot"] * 6)
    summary = result.summary()
    assert (summary["metric"], summary["utterances"], summary["length"]) == ("wer", 12, 36)
    assert summary["wer"]["rate"] == 1 / 3
    assert summary["pier"]["rate"] == 1 / 2
    for measure in ("wer", "cer", "pier"):
        low, high = summary[measure]["interval"]
        assert 0 <= low < summary[measure]["rate"] < high <= 1


def test_summary_is_json_also_where_no_utterance_has_points_of_interest():
    examples = texts_of(["das rad"], ["de-en"], [["de", "de"]])
    summary = score(examples, ["das rad"]).summary()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads(json.dumps(summary), parse_constant=refuse)


def test_hypotheses_that_repeat_themselves_are_counted_as_loops():
    loop = "Please wait while I connect your call. " * 6
    result = score(texts_of(["a", "b", "c"], ["en"] * 3), ["a", loop, "wait, wait"])
    assert result.loops == result.summary()["loops"] == 1


def test_the_macro_average_weighs_sets_alike():
    small, large = made([1, 1], [2, 2]), made([0] * 50, [9] * 50)
    assert rate_summary([small, large]) == {"rate": 0.25, "interval": [0.25, 0.25]}
    low, high = rate_summary([made([0, 4] * 20, [4] * 40), large])["interval"]
    assert 0 < low < 0.25 < high < 0.5


def test_raw_and_normalised_rates_stand_side_by_side():
    examples = texts_of(["Hallo, Welt!", "ja"] * 10, ["de"] * 20)
    before, after = score(examples, ["hallo welt", "nein"] * 10), score(examples, examples.texts)
    summary = before.summary()["wer"]
    assert (summary["rate"], summary["raw"]["rate"]) == (1 / 3, 1)
    assert summary["raw"]["interval"] == [1, 1]
    change = change_summary([before], [after], "wer")
    assert (change["difference"], change["raw"]["difference"]) == (-1 / 3, -1)
    assert change["interval"][0] < -1 / 3 < change["interval"][1]
    average = rate_summary([before, after])
    assert (average["rate"], average["raw"]["rate"]) == (1 / 6, 1 / 2)


def test_the_normaliser_none_leaves_both_alike():
    result = score(texts_of(["Hallo  Welt!"], ["de"]), ["hallo welt"], Normalizer("none"))
    assert result.references == ["Hallo Welt!"]
    assert result.counts["wer"].edits.tolist() == result.raw.counts["wer"].edits.tolist() == [2]


def test_english_utterances_are_normalised_as_english_and_others_not():
    texts, languages = ["I can't, uh, see 5"] * 3, ["en", "de", "de-en"]
    hypotheses = ["i can not see five"] * 3
    assert score(texts_of(texts, languages), hypotheses).main.edits.tolist() == [0, 3, 3]
    basic = score(texts_of(texts, languages), hypotheses, Normalizer("basic"))
    assert basic.main.edits.tolist() == [3, 3, 3]


def test_empty_references_and_hypotheses_are_counted():
    examples = texts_of(["", "[laughs]", "a b"], ["de"] * 3)
    result = score(examples, ["x y", "z", ""])
    assert result.main.edits.tolist() == [2, 1, 2]
    assert result.main.lengths.tolist() == [0, 0, 2]


def test_rates_of_nothing_are_null_in_json():
    empty = score(texts_of(["[laughs]", ""], ["de", "de"]), ["a", "b"])
    summary = empty.summary()
    assert summary["wer"]["rate"] is None
    assert summary["wer"]["interval"] == [None, None]
    assert summary["wer"]["raw"]["rate"] == 2
    change = change_summary([empty], [empty], "wer")
    assert (change["difference"], change["interval"]) == (None, [None, None])
    json.dumps([summary, change], allow_nan=False)


def test_evaluate_transcribes_and_scores(fluent_base, tones_folder):
    def read(name):
        dataset = read_manifest(tones_folder / name)
        return Examples(dataset, fluent_base.feature_extractor, fluent_base.tokenizer)

    known = evaluate(fluent_base, read("de.jsonl"))
    assert known.references == known.hypotheses == ["das rote", "ein rad"]
    assert known.main.rate == 0
    unknown = evaluate(fluent_base, read("test.jsonl"))
    assert unknown.references == ["das red", "ein bicycle"]
    assert unknown.main.rate > 0
    assert set(unknown.counts) == set(unknown.raw.counts) == {"wer", "cer", "pier"}
