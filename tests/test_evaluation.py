import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.data import Examples, read_manifest
from blora_pyro.evaluation import Evaluation, evaluate, macro_summary, score
from blora_pyro.metrics import Counts, words

quick = settings(deadline=None, max_examples=60)


def texts_of(texts, languages, word_languages=None) -> Examples:
    """`Examples` without audio: what `score` looks at."""
    examples = object.__new__(Examples)
    examples.texts = texts
    examples.languages = languages
    examples.word_languages = word_languages or [[] for _ in texts]
    return examples


def made(edits, lengths) -> Evaluation:
    counts = Counts(np.array(edits), np.array(lengths))
    return Evaluation("wer", {"wer": counts, "cer": counts}, ["a"] * len(edits), ["b"] * len(edits))


@pytest.mark.parametrize(
    ("language", "metric", "measures"),
    [
        ("de", "wer", {"wer", "cer"}),
        ("en", "wer", {"wer", "cer"}),
        ("zh", "cer", {"cer"}),
        ("ja", "cer", {"cer"}),
        ("de-en", "wer", {"wer", "cer"}),
        ("zh-en", "mer", {"mer", "cer"}),
        ("en-zh", "mer", {"mer", "cer"}),
        ("", "wer", {"wer", "cer"}),
    ],
)
def test_the_measure_is_chosen_by_the_language(language, metric, measures):
    result = score(texts_of(["ab cd"], [language]), ["ab ce"])
    assert result.metric == metric
    assert set(result.counts) == measures
    assert result.main is result.counts[metric]


def test_the_measure_is_chosen_by_the_most_frequent_language():
    languages = ["zh", "zh", "en"]
    assert score(texts_of(["我", "红", "red"], languages), ["", "", ""]).metric == "cer"


def test_rates_by_hand():
    result = score(texts_of(["the red car", "a cat"], ["en", "en"]), ["the rad car", "a"])
    assert result.counts["wer"].rate == 2 / 5
    assert result.counts["cer"].rate == (1 + 4) / (11 + 5)


def test_chinese_is_scored_by_characters_and_mixed_speech_by_both():
    assert score(texts_of(["我喜欢红"], ["zh"]), ["我喜 黄红"]).main.rate == 1 / 4
    result = score(texts_of(["我喜欢red car"], ["zh-en"]), ["我喜黄 red cat"])
    assert result.counts["mer"].rate == 2 / 5


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


messy = st.text(alphabet="aBß我欢e\u0301 '-.,\u3000–½ﬁ㈱", min_size=1, max_size=12)


@quick
@given(st.lists(messy, min_size=1, max_size=4), st.data())
def test_whoever_says_the_reference_makes_no_error(texts, data):
    codes = st.sampled_from(["zh", "en"])
    tags = [
        data.draw(st.lists(codes, min_size=(n := len(words(text))), max_size=n)) for text in texts
    ]
    examples = texts_of(texts, ["zh-en"] * len(texts), tags)
    result = score(examples, texts)
    assert all(int(counts.edits.sum()) == 0 for counts in result.counts.values())
    assert ("pier" in result.counts) <= all(tags)


def test_summary_has_rates_as_fractions_within_their_intervals():
    texts = ["das red rad"] * 12
    examples = texts_of(texts, ["de-en"] * 12, [["de", "en", "de"]] * 12)
    result = score(examples, ["das red rad"] * 6 + ["das rot"] * 6)
    summary = result.summary()
    assert (summary["metric"], summary["utterances"]) == ("wer", 12)
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


def test_the_macro_summary_weighs_sets_alike():
    small, large = made([1, 1], [2, 2]), made([0] * 50, [9] * 50)
    summary = macro_summary([small, large])
    assert summary["rate"] == 0.25
    assert summary["interval"] == [0.25, 0.25]
    low, high = macro_summary([made([0, 4] * 20, [4] * 40), large])["interval"]
    assert 0 < low < 0.25 < high < 0.5


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
    assert set(unknown.counts) == {"wer", "cer", "pier"}
