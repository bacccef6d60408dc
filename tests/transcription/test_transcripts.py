import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.transcription.transcripts import (
    _PART,
    CUE_LINES,
    LINE_COLUMNS,
    Segment,
    TimedWord,
    Transcript,
    cues,
    srt,
    vtt,
)


def test_the_text_is_that_of_all_segments_in_a_line():
    segments = (Segment(0.0, 1.0, "das rad"), Segment(1.0, 2.0, "ist red"))
    assert Transcript("a.wav", "de-en", 2.0, segments).text == "das rad ist red"
    assert Transcript("a.wav", "de-en", 2.0, ()).text == ""


def test_segments_without_spaces_between_words_are_joined_without():
    segments = (Segment(0, 1, "我喜欢。"), Segment(1, 2, "你好"), Segment(2, 3, "red"))
    assert Transcript("a.wav", "zh-en", 3, segments).text == "我喜欢。你好 red"


def test_words_are_in_the_json_only_if_there_are_draws():
    assert "words" not in Segment(0.0, 1.0, "das rad").to_json()
    assert Segment(0.0, 1.0, "?", ()).to_json()["words"] == []


def transcript(*segments: Segment) -> Transcript:
    return Transcript("a.wav", "de", 10.0, segments)


def test_srt_has_numbers_and_times_with_commas():
    found = srt(transcript(Segment(0.0, 1.5, "das rad"), Segment(3661.0625, 3662.0, "red & <b>")))
    assert found == (
        "1\n00:00:00,000 --> 00:00:01,500\ndas rad\n\n"
        "2\n01:01:01,062 --> 01:01:02,000\nred & <b>\n\n"
    )


def test_vtt_has_a_header_times_with_points_and_escaped_text():
    found = vtt(transcript(Segment(0.0, 1.5, "das rad"), Segment(61.9996, 63.0, "a & <b> --> c")))
    assert found == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\ndas rad\n\n"
        "00:01:02.000 --> 00:01:03.000\na &amp; &lt;b&gt; --&gt; c\n\n"
    )


def test_no_text_looks_like_a_line_of_times():
    assert srt(transcript(Segment(0, 1, "a --> b"))).count("-->") == 1


def test_an_empty_transcript_is_a_valid_file():
    assert (srt(transcript()), vtt(transcript())) == ("", "WEBVTT\n\n")


def test_long_text_is_shared_out_in_proportion():
    text = " ".join(["fahrrad"] * 20)  # 5 words a line: 2 cues
    first, second = cues([Segment(10.0, 20.0, text)])
    assert (first.start, first.end) == (10_000, 15_000)
    assert (second.start, second.end) == (15_000, 20_000)
    assert first.lines == ("fahrrad fahrrad fahrrad fahrrad fahrrad",) * 2


def test_a_cue_lasts_from_its_first_word_to_its_last():
    words = ["fahrrad"] * 19 + ["rot."]  # 5 words a line: 2 cues
    times = tuple(TimedWord(one, at + 0.25, at + 0.75, 0.5) for at, one in enumerate(words))
    found = [Segment(0, 30, " ".join(words), times=times), Segment(30, 31, "das", times=times[:1])]
    assert [(cue.start, cue.end) for cue in cues(found)] == [
        (250, 9750),
        (10_250, 19_750),
        (19_750, 19_751),  # no cue begins before the last ends
    ]
    han = tuple(TimedWord(one, at, at + 1, 0.5) for at, one in enumerate("我" * 63))
    found = [Segment(0, 70, "我" * 63, times=han)]
    assert [(cue.start, cue.end) for cue in cues(found)] == [(0, 42_000), (42_000, 63_000)]
    assert found[0].to_json()["words"][1] == {
        "text": "我",
        "start": 1,
        "end": 2,
        "probability": 0.5,
    }


def test_han_characters_take_two_columns_and_need_no_space_for_a_line_to_end():
    (cue,) = cues([Segment(0, 1, "我" * 22 + "red bicycle")])
    assert cue.lines == ("我" * 21, "我red bicycle")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("我喜欢red bike。「好」", ["我", "喜", "欢", "red", " bike。", "「好」"]),
        ("한국어 좋아요", ["한국어", " 좋아요"]),
        ("เข้าใจกะทิ", ["เข้า", "ใจ", "กะ", "ทิ"]),
        ("ភាសា។ល", ["ភា", "សា។", "ល"]),
        ("スーパー、々", ["スー", "パー、々"]),
    ],
)
def test_a_line_may_end_where_a_word_does(text, parts):
    assert _PART.findall(text) == parts


def test_no_line_begins_with_a_mark_that_closes():
    (cue,) = cues([Segment(0, 1, "我" * 21 + "。我")])
    assert cue.lines == ("我" * 20, "我。我")


def test_a_word_wider_than_a_line_is_left_whole():
    first, second = cues([Segment(0, 1, "a " + "b" * 60 + " c")])
    assert (first.lines, second.lines) == (("a", "b" * 60), ("c",))


times = st.floats(0, 20_000, allow_nan=False)
segments = st.lists(
    st.builds(Segment, times, times, st.text("ab我 \n.&<>-\u0301", min_size=1, max_size=300)),
    max_size=4,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(segments)
def test_cues_follow_each_other_hold_all_text_and_fit_the_screen(found):
    shown = list(cues(found))
    assert all(cue.start < cue.end for cue in shown)
    assert all(a.end <= b.start for a, b in pairwise(shown))
    assert all(1 <= len(cue.lines) <= CUE_LINES for cue in shown)
    lines = [line for cue in shown for line in cue.lines]
    assert all(len(line) <= LINE_COLUMNS or not re.search(r"\s|我", line) for line in lines)
    letters = "".join("".join(lines).split())
    assert letters == "".join("".join(one.text.split()) for one in found)


@pytest.mark.parametrize("form", [srt, vtt])
def test_text_with_empty_lines_stays_one_cue(form):
    assert form(transcript(Segment(0, 1, "das\n\nrad"))).count("das rad\n") == 1
