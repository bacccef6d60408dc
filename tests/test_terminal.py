import json

from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.terminal import escaped


def test_what_steers_a_terminal_is_shown_and_letters_are_left():
    assert escaped("a\x1b[31mb\x9b0m\r\x7f") == r"a\x1b[31mb\x9b0m\r\x7f"
    assert escaped("\u202eab\u2028\ud800") == r"\u202eab\u2028\ud800"
    text = "Ärger\t中文\u3000\n\u0645\u06cc\u200c\u062e 👩\u200d🔬"
    assert escaped(text) == text


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.text())
def test_of_json_it_changes_the_writing_and_not_the_content(text):
    written = escaped(json.dumps(text, ensure_ascii=False), json=True)
    assert json.loads(written) == text
    assert escaped(written) == written and escaped(escaped(text)) == escaped(text)
