from blora_pyro.data import Heard
from blora_pyro.diagnostics.row_notes import RowNotes, told


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


def test_a_fit_tells_notes_in_one_line():
    assert told({"train": [], "test": [("shared text", "line 1", "yes")]}) == ""
    notes = [("silent", "line 3", "no sample"), ("clipped", "line 4", "!"), ("silent", "", "")]
    assert told({"train": notes, "test": []}) == (
        "rows worth a look: 2 of train: audio that is silent; 1 of train: audio that is clipped; "
        "the first: line 3: no sample (blora-pyro data check shows more)"
    )
