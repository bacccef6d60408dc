from blora_pyro.data import Heard
from blora_pyro.diagnostics.row_notes import RowNotes, Told


def heard(content, *kinds):
    return Heard(content, 1.0, tuple((kind, f"so {kind}") for kind in kinds))


def test_each_row_is_compared_with_all_that_came_before():
    notes = RowNotes()
    rows = [
        ("a train", "a.csv, line 2", "x", heard("1")),
        ("a train", "a.csv, line 3", "x", heard("1", "clipped")),
        ("a test", "a.csv, line 4", "x", heard("1")),
        ("a test", "the data set", " ", heard("2")),
        ("b", "b.csv, line 2", "y", heard("2", "silent")),
        ("b", "b.csv, line 3", "z", None),
    ]
    found = [[*notes.of(label, at, text, [], about, True)] for label, at, text, about in rows]
    assert [[(kind, message) for kind, _, message in one] for one in found] == [
        [],
        [("clipped", "so clipped"), ("repeated", "the same audio as a.csv, line 2")],
        [
            ("shared audio", "the same audio as a.csv, line 2"),
            ("shared text", "'x' as a.csv, line 2"),
        ],
        [("empty text", "the fit will learn that nothing is said")],
        [("silent", "so silent"), ("shared audio", "the same audio as the data set")],
        [],
    ]
    assert [origin for _, origin, _ in found[1]] == ["a.csv, line 3"] * 2


def test_wrong_word_languages_are_a_note_where_nothing_is_scored():
    for scored in (False, True):
        (*kinds,) = (kind for kind, *_ in RowNotes().of("", "", "a b", ["de"], None, scored))
        assert kinds == ([] if scored else ["tags"])


def test_what_programs_write_for_a_missing_text_is_a_note():
    for text, kinds in (("NaN", ["missing"]), (" None ", ["missing"]), ("none of it", [])):
        assert [kind for kind, *_ in RowNotes().of("", "", text, [], None, True)] == kinds


def test_a_row_that_is_not_remembered_is_compared_and_no_other_with_it():
    notes = RowNotes()
    assert not [*notes.of("test", "line 1", "x", [], heard("1"), True)]
    for _ in range(2):
        found = notes.of("train", "line 9", "x", [], heard("1"), False, remembered=False)
        assert [kind for kind, *_ in found] == ["shared audio", "shared text"]
        found = notes.of("train", "line 2", "y", [], heard("2"), False, remembered=False)
        assert not [*found]


def test_a_fit_tells_notes_in_one_line_and_once():
    told = Told()
    told.add("test", [])
    assert told.line() == ""
    told.add("train", [("silent", "line 3", "no sample"), ("clipped", "line 4", "!")])
    told.add("train", [("silent", "", "")])
    told.add("test", [("shared text", "line 1", "yes")])
    assert told.line() == (
        "rows worth a look: audio that is clipped: 1 of train; audio that is silent: 2 of train; "
        "text that is in another set too: 1 of test; "
        "the first: line 4: ! (blora-pyro data check shows more)"
    )
    assert told.line() == ""
