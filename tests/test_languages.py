import itertools
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from blora_pyro import languages
from blora_pyro.errors import UserError
from blora_pyro.languages import (
    UNSPACED_LANGUAGES,
    Language,
    begins_unspaced,
    is_iso_code,
    is_language,
    is_unspaced,
    join_texts,
    language_code,
    prompt_codes,
    read_language,
    read_language_map,
)

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
        ("de-EN", "de-en"),  # EN is no region
        ("german_english", "de-en"),
        ("de-Thai", "de-th"),
        ("de-en-fr", "de-en-fr"),
        ("zh-en", "zh-en"),
        ("zh_en", "zh-en"),
        ("zh-Hant-en", "zh-en"),
        ("zh-en-US", "zh-en"),
        ("en-es", "en-es"),
        ("en_es", "en-es"),
        ("hi-en", "hi-en"),
        ("en-vi", "en-vi"),
        ("no-sv", "no-sv"),
        # ISO 639-3, and 639-2 for bibliographies
        ("deu", "de"),
        ("GER", "de"),
        ("zho", "zh"),
        ("cmn", "zh"),
        ("arb", "ar"),
        ("swh", "sw"),
        ("jav", "jw"),
        ("nob", "no"),
        ("deu-eng", "de-en"),
        ("deu_Latn", "de"),
    ],
)
def test_as_people_write_them(text, code):
    assert language_code(text) == code
    assert is_language(text)


def test_an_older_tag_of_cantonese_is_refused_with_both_readings():
    for text in ("zh-yue", "zh_yue", "Chinese-yue"):
        with pytest.raises(UserError, match="may be Cantonese, or Chinese code-switched with it"):
            read_language(text)
    assert language_code("zh-cantonese") == "zh-yue"
    assert read_language(read_language("zh-cantonese").tag).codes == ("zh", "yue")


@pytest.mark.parametrize("text", ["und", "mul", "zxx", "de-und"])
def test_what_iso_639_has_for_no_language_is_none(text):
    assert not is_language(text) and not is_iso_code(text)


def test_every_language_has_a_code_of_three_letters():
    letters = map("".join, itertools.product(string.ascii_lowercase, repeat=3))
    found = {code: one for one in letters if (code := language_code(one)) in LANGUAGES}
    assert found.keys() == LANGUAGES.keys() and found["haw"] == "haw"


@pytest.mark.parametrize(
    ("text", "code", "script", "region"),
    [
        ("de_DE", "de", "", "DE"),
        ("de_de", "de", "", "DE"),
        ("de-DE", "de", "", "DE"),
        ("de-de", "de", "", "DE"),
        ("de-at", "de", "", "AT"),
        ("EN-US", "en", "", "US"),
        ("en_us", "en", "", "US"),
        ("hi_in", "hi", "", "IN"),
        ("es-419", "es", "", "419"),
        # regions whose code is that of a language, too
        ("pt-BR", "pt", "", "BR"),
        ("pt_br", "pt", "", "BR"),
        ("pt-br", "pt", "", "BR"),
        ("PT-BR", "pt", "", "BR"),
        ("ca_es", "ca", "", "ES"),
        ("ca-ES", "ca", "", "ES"),
        ("sl_si", "sl", "", "SI"),
        ("hy-AM", "hy", "", "AM"),
        ("ms_my", "ms", "", "MY"),
        ("fr-be", "fr", "", "BE"),
        ("en_ca", "en", "", "CA"),
        ("zh-CN", "zh", "", "CN"),
        ("zh-Hant", "zh", "Hant", ""),
        ("zh-hant", "zh", "Hant", ""),
        ("zh-Hant-TW", "zh", "Hant", "TW"),
        ("yue_hant_hk", "yue", "Hant", "HK"),
        ("cmn_hans_cn", "zh", "Hans", "CN"),
        ("sr-Latn-RS", "sr", "Latn", "RS"),
        ("th-Thai", "th", "Thai", ""),
        ("nb_no", "no", "", "NO"),
        ("jv_id", "jw", "", "ID"),
        ("fil_ph", "tl", "", "PH"),
        ("en-UK", "en", "", "UK"),
        ("uk-UA", "uk", "", "UA"),
    ],
)
def test_a_script_or_a_region_is_no_second_language(text, code, script, region):
    assert read_language(text) == Language((code,), script, region)
    assert language_code(text) == code
    assert is_language(text)


@pytest.mark.parametrize("text", ["", "xx", "klingon", "de-xx", "de-", "-de", "de-em", "1"])
def test_what_is_no_language_of_whisper_s_stays_as_it_is(text):
    assert language_code(text) == text
    assert not is_language(text)


@pytest.mark.parametrize(
    ("text", "choice"),
    [("ca-es", "'ca-ES'"), ("en-ca", "'en-CA'"), ("FR-HT", "'fr-HT'"), ("en-uk", "'en-UK'")],
)
def test_what_may_be_a_region_or_a_second_language_is_refused(text, choice):
    with pytest.raises(UserError, match=f"may be .* of a region, or .*give {choice}"):
        language_code(text)
    assert not is_language(text)


def test_two_languages_of_one_region_are_told_by_their_names():
    assert language_code("Catalan-Spanish") == language_code("ca-spanish") == "ca-es"


@settings(deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(CODES), min_size=1, max_size=3))
def test_what_is_read_is_written_as_it_was(codes):
    codes = [code for code, _ in itertools.groupby(codes)]
    language = read_language("-".join(LANGUAGES[code].title() for code in codes))
    assert language == Language(tuple(codes))
    assert language.code == "-".join(codes)
    assert read_language(language.tag) == language


@pytest.mark.parametrize("tag", ["zh-Hant-TW", "pt-BR", "zh-Hans-en", "es-419", "ca-spanish", ""])
def test_a_tag_is_read_as_itself(tag):
    assert read_language(tag).tag == tag


def test_every_name_of_transformers_table():
    assert {name: language_code(name) for name in TO_LANGUAGE_CODE} == TO_LANGUAGE_CODE


def test_a_translation_is_written_in_english():
    spoken = read_language("zh-Hant")
    assert spoken.written("translate") == read_language("en")
    assert spoken.written("transcribe") == spoken


# --- scripts without spaces between words


@pytest.mark.parametrize(
    ("text", "unspaced"),
    [
        *((code, (True,)) for code in sorted(UNSPACED_LANGUAGES)),
        ("zh-Hant", (True,)),
        ("ja-Jpan", (True,)),
        ("ja-Latn", (False,)),  # rōmaji has spaces
        ("ko", (False,)),
        ("zh-en", (True, False)),
        ("en-ja", (False, True)),
        ("", ()),
    ],
)
def test_languages_are_written_with_or_without_spaces(text, unspaced):
    assert read_language(text).unspaced == unspaced


@pytest.mark.parametrize("text", ["汉", "ひ", "カ", "ー", "ท", "ລ", "ខ", "မ", "བ", "ꦗ"])
def test_scripts_without_spaces(text):
    assert is_unspaced(f"x{text}")
    assert begins_unspaced(f"«{text}x")
    assert not begins_unspaced(f"x{text}")


@pytest.mark.parametrize("text", ["한국어", "हिन्दी", "мир", "«»", "", "。"])
def test_scripts_with_spaces(text):
    assert not is_unspaced(text)
    assert not begins_unspaced(text)


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (["我喜欢。", "你好"], "我喜欢。你好"),
        (["「はい」", "「いいえ」"], "「はい」「いいえ」"),
        (["ไป", "ไหน"], "ไปไหน"),
        (["សួ", "ស្តី"], "សួស្តី"),
        (["Hello.", "你好", "red"], "Hello. 你好 red"),
        (["Ja.", "Nein."], "Ja. Nein."),
        (["今天是", "2024", "年", "。"], "今天是2024年。"),
        (["Seite 10", "20", "30页"], "Seite 10 20 30页"),
        ([], ""),
    ],
)
def test_texts_are_joined_as_their_scripts_are_written(texts, joined):
    assert join_texts(texts) == joined


@pytest.mark.parametrize(
    ("text", "codes", "region"),
    [
        ("qu", ("qu",), ""),
        ("QU", ("qu",), ""),
        ("qu-es", ("qu", "es"), ""),
        ("qu_es", ("qu", "es"), ""),
        ("es-quz", ("es", "quz"), ""),
        ("qu-ES", ("qu",), "ES"),
        ("qu-PE", ("qu",), "PE"),
        ("qu_bo", ("qu",), "BO"),  # and not with Tibetan
        ("en-ie", ("en",), "IE"),  # of Ireland, and not with Interlingue
        ("qu-qu", ("qu",), ""),
    ],
)
def test_a_code_of_iso_639_that_whisper_lacks_is_read_as_itself(text, codes, region):
    assert read_language(text) == Language(codes, "", region)
    assert is_iso_code(codes[-1]) and not is_language("qu")


def test_the_languages_are_those_that_transformers_knows():
    assert [*languages.LANGUAGES.items()] == [*LANGUAGES.items()]
    assert languages._CODES == TO_LANGUAGE_CODE


@pytest.mark.parametrize("text", ["jp", "Kichwa", "q", "q1", "", "QU"])
def test_what_is_no_code_of_iso_639_is_not_taken_for_one(text):
    assert not is_iso_code(text)


@pytest.mark.parametrize(
    ("code", "language_map", "expected"),
    [
        ("qu", {"qu": "mi"}, ("mi",)),
        ("qu-es", {"qu": "mi"}, ("mi", "es")),
        ("qu-es", {"qu": "es"}, ("es",)),
        ("es-qu-es", {"qu": "mi"}, ("es", "mi", "es")),
        ("qu-es", {"qu": "mi", "qu-es": "sn"}, ("sn",)),
        ("qu-es", {"qu-es": "es-mi"}, ("es", "mi")),
        ("qu-es", {"ay": "mi"}, ("qu", "es")),
        ("", {"qu": "mi"}, ("",)),
    ],
)
def test_a_map_says_what_prompts_a_language_or_a_pair(code, language_map, expected):
    assert prompt_codes(code, language_map) == expected


def test_a_map_is_read_as_people_write_languages():
    assert read_language_map({"QU": "Maori", "qu-Spanish": "mi-es"}) == {
        "qu": "mi",
        "qu-es": "mi-es",
    }
    for wrong in ({"qu": "qu"}, {"qu": ""}, {"": "mi"}):
        with pytest.raises(UserError, match="give LANG=TOKEN"):
            read_language_map(wrong)
