import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from blora_pyro.errors import UserError
from blora_pyro.languages import is_language, language_code

CODES = sorted(LANGUAGES)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("German", "de"),
        ("DE", "de"),
        (" de ", "de"),
        ("mandarin", "zh"),
        ("Haitian Creole", "ht"),
        ("German-English", "de-en"),
        ("DE-EN", "de-en"),
        ("german_english", "de-en"),
        ("de-Thai", "de-th"),
        ("de-en-fr", "de-en-fr"),
        ("de_DE", "de"),
        ("zh-CN", "zh"),
        ("zh-Hant-TW", "zh"),
        ("es-419", "es"),
        ("zh-en-US", "zh-en"),
    ],
)
def test_as_people_write_them(text, code):
    assert language_code(text) == code
    assert is_language(text)


@pytest.mark.parametrize("text", ["", "xx", "klingon", "de-xx", "de-", "-de", "de-em", "1"])
def test_what_is_no_language_of_whisper_s_stays_as_it_is(text):
    assert language_code(text) == text
    assert not is_language(text)


@pytest.mark.parametrize(("text", "choice"), [("pt-BR", "'pt' or 'pt-br'"), ("de-EN", "'de-en'")])
def test_a_region_that_is_a_language_too_is_refused(text, choice):
    with pytest.raises(UserError, match=f"{text}' may be .*{choice}"):
        language_code(text)
    assert not is_language(text)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(CODES), min_size=1, max_size=3))
def test_codes_stay_and_names_become_them(codes):
    joined = "-".join(codes)
    assert language_code(joined) == joined
    assert language_code("-".join(LANGUAGES[code].title() for code in codes)) == joined


def test_every_name_of_transformers_table():
    assert {name: language_code(name) for name in TO_LANGUAGE_CODE} == TO_LANGUAGE_CODE
