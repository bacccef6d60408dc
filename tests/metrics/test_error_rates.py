import math

import jiwer
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blora_pyro.languages import is_unspaced
from blora_pyro.metrics import (
    align,
    backward_gain,
    cer_counts,
    forgetting,
    forgetting_removed,
    mer_counts,
    new_domain_drop,
    pier_counts,
    points_of_interest,
    spans,
    sparsity,
    wer_counts,
    words,
)

quick = settings(deadline=None, max_examples=30)  # no deadline: the machine may be busy

# Few distinct words, so that matches, shifts and ties in the alignment are common.
latin = st.lists(st.sampled_from(["a", "b", "c", "über"]), max_size=8).map(" ".join)
mixed = st.text(alphabet="我喜欢ab \u3000\U00020001", max_size=12)


def texts(of):
    """Lists of (reference, hypothesis)."""
    return st.lists(st.tuples(of, of), min_size=1, max_size=6)


def levenshtein(reference, hypothesis):
    """The edit distance, by a table of its own."""
    row = list(range(len(hypothesis) + 1))
    for i, r in enumerate(reference, 1):
        previous, row = row, [i]
        for j, h in enumerate(hypothesis, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (r != h)))
    return row[-1]


def fewest_point_edits(reference, hypothesis, points, sign):
    """The fewest (sign 1) or most (sign -1) edits at points over all optimal alignments."""
    last = len(reference) - 1
    table = {(0, 0): (0, 0)}
    for i in range(len(reference) + 1):
        for j in range(len(hypothesis) + 1):
            steps = []
            if i:
                cost, edits = table[i - 1, j]
                steps.append((cost + 1, edits + sign * points[i - 1]))
            if j:
                cost, edits = table[i, j - 1]
                steps.append((cost + 1, edits + sign * points[min(i, last)]))
            if i and j:
                cost, edits = table[i - 1, j - 1]
                wrong = reference[i - 1] != hypothesis[j - 1]
                steps.append((cost + wrong, edits + sign * (wrong and points[i - 1])))
            if steps:
                table[i, j] = min(steps)
    return sign * table[len(reference), len(hypothesis)][1]


# --- tokens


def test_words_splits_han_alone_and_the_rest_at_white_space():
    assert words("我喜欢red bicycle") == ["我", "喜", "欢", "red", "bicycle"]
    assert words("ich mag\tdas\u00a0 rote Fahrrad ") == "ich mag das rote Fahrrad".split()
    assert words("") == []


@pytest.mark.parametrize("han", "㐀䶿一鿿々〇豈⺀\U00020000\U0002a6df\U0002ebf0\U00030000")
def test_words_knows_extensions(han):
    assert words(f"x{han}{han}y") == ["x", han, han, "y"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("私はredが好き", "私 は red が 好 き"),
        ("スーパーで", "ス ー パ ー で"),
        ("\u30ab\u3099 ﾊﾟﾝ", "\u30ab\u3099 ﾊﾟ ﾝ"),  # sound marks stay with their kana
        ("ที่ไหน free", "ที่ ไ ห น free"),
        ("ບໍ່ມີ", "ບໍ່ ມີ"),
        ("မြန်မာ", "မြ န် မာ"),
        ("ភាសា", "ភា សា"),
        ("བོད", "བོ ད"),
    ],
)
def test_words_splits_scripts_without_spaces(text, tokens):
    assert words(text) == tokens.split()
    assert is_unspaced(text)


@pytest.mark.parametrize("other", ["한국어", "हिन्दी", "。", "䷀䷁", "ㄅㄆ", "é"])
def test_words_leaves_other_scripts_whole(other):
    assert words(other) == [other]
    assert not is_unspaced(other)


@quick
@given(st.text(max_size=30))
def test_words_keeps_every_character_but_white_space(text):
    assert "".join(words(text)) == "".join(text.split())


@quick
@given(st.text(alphabet=st.characters(max_codepoint=0xDFF)))
def test_words_of_scripts_with_spaces_are_split(text):
    assert words(text) == text.split()


# --- WER, CER, MER


def test_wer_by_hand():
    result = wer_counts(
        ["ich habe das file", "ja", ""],
        ["ich hab das file heute", "", "oh nein"],
    )
    assert result.edits.tolist() == [2, 1, 2]
    assert result.lengths.tolist() == [4, 1, 0]
    assert result.rate == 1.0


def test_wer_is_pooled_and_not_a_mean_of_rates():
    # Rates of the utterances are 1 and 0: their mean is 0.5, the pooled rate 1/5.
    assert wer_counts(["a", "b c d e"], ["x", "b c d e"]).rate == 0.2


def test_wer_splits_at_any_white_space():
    assert wer_counts(["a\tb\u00a0c"], ["a b c"]).edits.tolist() == [0]
    assert wer_counts(["a\tb\u00a0c"], ["a b c"]).lengths.tolist() == [3]


def test_cer_by_hand_counts_spaces():
    result = cer_counts(["das rad"], ["dasrat "])
    assert (result.edits.tolist(), result.lengths.tolist()) == ([2], [7])


def test_cer_of_han_drops_white_space():
    result = cer_counts(["我 喜欢 red", "red"], ["我喜 红 red", "r 我d"])
    assert result.edits.tolist() == [1, 2]
    assert result.lengths.tolist() == [6, 3]


def test_mer_by_hand():
    # 我/我 喜/(gone) 欢/欢 red/read bicycle/bicycle, and 了 added: 3 edits on 5 tokens.
    result = mer_counts(["我喜欢red bicycle"], ["我欢 read bicycle了"])
    assert (result.edits.tolist(), result.lengths.tolist()) == ([3], [5])
    assert result.rate == 0.6


def test_mer_is_not_the_match_error_rate():
    references, hypotheses = ["a b"], ["a b c"]
    assert mer_counts(references, hypotheses).rate == 0.5
    assert jiwer.process_words(references, hypotheses).mer == pytest.approx(1 / 3)


@pytest.mark.parametrize("measure", [wer_counts, cer_counts, mer_counts])
@quick
@given(st.lists(mixed | latin, max_size=5))
def test_identity_has_no_errors(measure, references):
    assert measure(references, references).edits.tolist() == [0] * len(references)


@quick
@given(texts(mixed | latin))
def test_counts_agree_with_an_independent_distance(pairs):
    def squeezed(text, reference):
        han = any(c in "我喜欢\U00020001" for c in reference)
        return "".join(text.split()) if han else text.strip()

    references, hypotheses = zip(*pairs, strict=True)
    for measure, split in (
        (wer_counts, lambda text, _: text.split()),
        (mer_counts, lambda text, _: words(text)),
        (cer_counts, squeezed),
    ):
        expected = [levenshtein(split(r, r), split(h, r)) for r, h in pairs]
        result = measure(references, hypotheses)
        assert result.edits.tolist() == expected
        assert result.lengths.tolist() == [len(split(r, r)) for r in references]


@quick
@given(texts(latin))
def test_mer_of_latin_text_is_wer(pairs):
    references, hypotheses = zip(*pairs, strict=True)
    mer, wer = mer_counts(references, hypotheses), wer_counts(references, hypotheses)
    assert mer.edits.tolist() == wer.edits.tolist()
    assert mer.lengths.tolist() == wer.lengths.tolist()


@quick
@given(texts(latin))
def test_rate_is_the_ratio_of_sums_and_jiwers(pairs):
    references, hypotheses = map(list, zip(*pairs, strict=True))
    assume(any(references))
    result = wer_counts(references, hypotheses)
    assert result.rate == sum(result.edits.tolist()) / sum(result.lengths.tolist())
    assert result.rate == pytest.approx(jiwer.process_words(references, hypotheses).wer)


def test_rate_of_nothing_is_nan():  # and no warning: `filterwarnings = error`
    assert math.isnan(wer_counts([], []).rate)
    assert math.isnan(wer_counts(["", " "], ["a", ""]).rate)


@pytest.mark.parametrize("measure", [wer_counts, cer_counts, mer_counts])
def test_sizes_must_agree(measure):
    with pytest.raises(ValueError, match="2 references, 1 hypotheses"):
        measure(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="hypotheses must be a list"):
        measure(["a", "b"], "ab")


# --- alignments


def told(measure, reference, hypothesis):
    return [tuple(step) for step in align(measure, reference, hypothesis)]


def test_an_alignment_by_hand():
    assert told("wer", "das rote  rad ist da", "oh das rot ist da nun") == [
        ("I", "", "oh", 0),
        ("=", "das", "das", 0),
        ("S", "rote", "rot", 1),
        ("D", "rad", "", 2),
        ("=", "ist", "ist", 3),
        ("=", "da", "da", 4),
        ("I", "", "nun", 4),
    ]
    assert told("wer", "", "a b") == [("I", "", "a", -1), ("I", "", "b", -1)]
    assert told("wer", "a", " ") == [("D", "a", "", 0)]
    assert told("cer", "", "") == []


def test_an_alignment_has_the_tokens_of_its_measure():
    texts = "我喜 red", "我red"
    assert [step[1] for step in told("mer", *texts)] == ["我", "喜", "red"]
    assert [step[1] for step in told("wer", *texts)] == ["我喜", "red"]
    assert [step[1] for step in told("cer", *texts)] == ["我", "喜", "r", "e", "d"]


@quick
@given(texts(mixed | latin))
def test_counts_can_be_counted_from_the_alignments(pairs):
    references, hypotheses = zip(*pairs, strict=True)
    for name, measure in {"wer": wer_counts, "mer": mer_counts, "cer": cer_counts}.items():
        result = measure(references, hypotheses)
        for index, pair in enumerate(pairs):
            steps = align(name, *pair)
            assert sum(step.operation != "=" for step in steps) == result.edits[index]
            assert sum(step.operation != "I" for step in steps) == result.lengths[index]
            places = [step.position for step in steps if step.operation != "I"]
            assert places == list(range(len(places)))
            assert all((step.reference == step.hypothesis) == (step[0] == "=") for step in steps)


@quick
@given(texts(mixed | latin))
def test_an_alignment_spells_both_texts(pairs):
    for reference, hypothesis in pairs:
        for measure, split in {"wer": str.split, "mer": words}.items():
            steps = align(measure, reference, hypothesis)
            assert [step[1] for step in steps if step[1]] == split(reference)
            assert [step[2] for step in steps if step[2]] == split(hypothesis)


@quick
@given(mixed | latin)
def test_spans_are_those_of_the_tokens(text):
    text = " ".join(text.split())
    for measure, split in {"wer": str.split, "mer": words}.items():
        assert [text[start:end] for start, end in spans(measure, text)] == split(text)


# --- PIER

REFERENCE = "hast du das file gedownloadet"
LANGUAGES = ["de", "de", "de", "en", "de"]


@pytest.mark.parametrize(
    ("hypothesis", "edits"),
    [
        (REFERENCE, 0),
        ("hast du das feil gedownloadet", 1),  # substituted
        ("hast du das gedownloadet", 1),  # deleted
        ("hast du den file", 0),  # errors elsewhere only
        ("hast du das alte file gedownloadet", 1),  # inserted before the embedded word
        ("hast du das file heute gedownloadet", 0),  # inserted after it
        ("hast du das file gedownloadet oder nicht", 0),  # trailing: the last word is German
        ("hast du das x y z file gedownloadet", 3),
    ],
)
def test_pier_by_hand(hypothesis, edits):
    result = pier_counts([REFERENCE], [hypothesis], [LANGUAGES], "en")
    assert (result.edits.tolist(), result.lengths.tolist()) == ([edits], [1])


def test_pier_trailing_insertions_count_for_the_last_word_and_may_exceed_one():
    result = pier_counts(["das ist cool"], ["das ist cool man oh man"], [["de", "de", "en"]], "en")
    assert (result.edits.tolist(), result.lengths.tolist()) == ([3], [1])
    assert result.rate == 3.0


def test_pier_leaves_out_utterances_without_points_or_without_other_words():
    references = ["das ist gut", "", "so cool", "das ist cool"]
    codes = [["de"] * 3, [], ["en"] * 2, ["de", "de", "en"]]
    result = pier_counts(references, ["x", "x", "x", "das ist kuhl"], codes, "en")
    assert (result.edits.tolist(), result.lengths.tolist()) == ([1], [1])
    for n in (0, 3):
        nothing = pier_counts(references[:n], ["x"] * n, codes[:n], "en")
        assert nothing.edits.shape == nothing.lengths.shape == (0,)
        assert math.isnan(nothing.rate)


def test_pier_of_han_and_embedded_language_per_utterance():
    references, codes = ["我喜欢red", "das ist cool"], [["zh"] * 3 + ["en"], ["de", "de", "en"]]
    result = pier_counts(references, ["我喜红 read", "der ist kuhl"], codes, ["zh", "de"])
    assert (result.edits.tolist(), result.lengths.tolist()) == ([1, 1], [3, 2])


@st.composite
def switched(draw):
    pairs, codes = draw(texts(latin)), []
    for reference, _ in pairs:
        size = len(reference.split())
        codes.append(draw(st.lists(st.sampled_from(["de", "en"]), min_size=size, max_size=size)))
    return *map(list, zip(*pairs, strict=True)), codes


@quick
@given(switched())
def test_pier_edits_of_the_two_languages_are_all_edits(case):
    references, hypotheses, codes = case
    german, english = (pier_counts(references, hypotheses, codes, e) for e in ("de", "en"))
    both = [len(set(c)) == 2 for c in codes]
    everything = wer_counts(references, hypotheses)
    assert (german.edits + english.edits).tolist() == everything.edits[both].tolist()
    assert (german.lengths + english.lengths).tolist() == everything.lengths[both].tolist()
    assert (english.edits <= everything.edits[both]).all()


@quick
@given(switched())
def test_pier_lies_within_all_optimal_alignments(case):
    references, hypotheses, codes = case
    result = iter(pier_counts(references, hypotheses, codes, "en").edits.tolist())
    for reference, hypothesis, languages in zip(*case, strict=True):
        if len(set(languages)) == 2:
            points = [code == "en" for code in languages]
            split = reference.split(), hypothesis.split(), points
            edits = next(result)
            assert fewest_point_edits(*split, 1) <= edits <= fewest_point_edits(*split, -1)


@quick
@given(switched())
def test_pier_can_be_counted_from_the_alignments(case):
    result = pier_counts(*case, "en")
    rows = []
    for reference, hypothesis, codes in zip(*case, strict=True):
        if points := points_of_interest(codes, "en"):
            steps = [step for step in align("mer", reference, hypothesis) if points[step.position]]
            rows.append([sum(step[0] != "=" for step in steps), sum(points)])
    assert [list(pair) for pair in zip(result.edits, result.lengths, strict=True)] == rows


def test_pier_is_counted_on_the_alignment_of_its_measure():
    case = ["das red"], ["das 我喜"], [["de", "en"]], "en"
    assert pier_counts(*case, "wer").edits.tolist() == [1]
    assert pier_counts(*case, "mer").edits.tolist() == [2]


def test_pier_names_the_utterance_whose_languages_do_not_fit():
    with pytest.raises(ValueError, match="utterance 1: 2 word languages for 3 reference words"):
        pier_counts(["a b", "a b c"], ["a b", "a"], [["de", "en"], ["de", "en"]], "en")


def test_pier_sizes_must_agree():
    with pytest.raises(ValueError, match="1 word_languages"):
        pier_counts(["a", "b"], ["a", "b"], [["de"]], "en")
    with pytest.raises(ValueError, match="3 embedded"):
        pier_counts(["a", "b"], ["a", "b"], [["de"], ["de"]], ["en", "en", "en"])
    with pytest.raises(ValueError, match="references must be a list"):
        pier_counts("a", ["a"], [["de"]], "en")


# --- what an adapter cost


def test_gains_by_hand():
    # The follow-up paper's German row: base 8.53, LoRA 44.15, BLoRA 11.59.
    assert backward_gain(lora=44.15, blora=11.59) == pytest.approx(0.7375, abs=1e-4)
    assert new_domain_drop(lora=0.25, blora=0.26) == pytest.approx(0.04)
    assert forgetting(method=11.59, base=8.53) == pytest.approx(3.06)
    assert forgetting_removed(lora=44.15, blora=11.59, base=8.53) == pytest.approx(0.9141, abs=1e-4)


def test_gains_have_the_sign_of_their_name():
    assert backward_gain(lora=0.2, blora=0.3) < 0
    assert new_domain_drop(lora=0.3, blora=0.2) < 0
    assert forgetting(method=0.1, base=0.2) < 0
    assert forgetting_removed(lora=0.3, blora=0.4, base=0.2) == pytest.approx(-1)
    assert forgetting_removed(lora=0.3, blora=0.2, base=0.2) == pytest.approx(1)


def test_gains_without_a_denominator_are_nan():
    assert math.isnan(backward_gain(lora=0.0, blora=0.1))
    assert math.isnan(new_domain_drop(lora=0.0, blora=0.1))
    assert math.isnan(forgetting_removed(lora=0.2, blora=0.1, base=0.2))
    assert math.isnan(forgetting_removed(lora=0.1, blora=0.1, base=0.2))


def test_sparsity_pools_over_elements():
    arrays = [np.array([[0.0, -0.5], [9e-4, -9e-4]]), np.array([1e-3, -2.0])]
    assert sparsity(arrays) == 0.5  # 3 of 6: the threshold itself does not count
    assert sparsity(iter(arrays), threshold=1.0) == pytest.approx(5 / 6)
    assert math.isnan(sparsity([]))


def test_sparsity_takes_torch_tensors():
    torch = pytest.importorskip("torch")
    assert sparsity([torch.tensor([0.0, 1.0]), torch.zeros(2, 3)]) == pytest.approx(7 / 8)
