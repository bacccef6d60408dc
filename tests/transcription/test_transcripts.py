from blora_pyro.transcription.transcripts import Segment, Transcript


def test_the_text_is_that_of_all_segments_in_a_line():
    segments = (Segment(0.0, 1.0, "das rad"), Segment(1.0, 2.0, "ist red"))
    assert Transcript("a.wav", "de-en", 2.0, segments).text == "das rad ist red"
    assert Transcript("a.wav", "de-en", 2.0, ()).text == ""


def test_words_are_in_the_json_only_if_there_are_draws():
    assert "words" not in Segment(0.0, 1.0, "das rad").to_json()
    assert Segment(0.0, 1.0, "?", ()).to_json()["words"] == []
