import re
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from blora_pyro.data.prompts import END, Encoder, Suppressed, prompt_ids, text_ids, unmapped_codes
from blora_pyro.errors import UserError
from blora_pyro.languages import read_language


def tokens(tokenizer, *args):
    return "".join(tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, *args)))


def test_a_prompt_has_its_language_and_task(tokenizer):
    expected = "<|startoftranscript|><|de|><|transcribe|><|notimestamps|>"
    assert tokens(tokenizer, "de") == expected
    assert tokens(tokenizer, "de", "translate") == expected.replace("transcribe", "translate")


def test_a_prompt_of_two_languages_has_the_matrix_language_first(tokenizer):
    expected = "<|startoftranscript|>{}<|transcribe|><|notimestamps|>"
    assert tokens(tokenizer, "de-en") == expected.format("<|de|><|en|>")
    assert tokens(tokenizer, "en-de") == expected.format("<|en|><|de|>")


@pytest.mark.parametrize("language", ["", "en"])
def test_an_english_only_prompt_has_neither_language_nor_task(english_only, language):
    assert tokens(english_only, language) == "<|startoftranscript|><|notimestamps|>"


@pytest.mark.parametrize("language", ["de", "de-en", "xx"])
def test_an_english_only_base_refuses_other_languages(english_only, language):
    with pytest.raises(UserError, match=f"English-only, and the language is '{language}'"):
        prompt_ids(english_only, language)
    with pytest.raises(UserError, match="English-only, and the task is 'translate'"):
        prompt_ids(english_only, "en", "translate")


def test_without_a_language_an_english_only_base_hears_and_writes_english(english_only):
    assert Encoder(english_only).encode("a bicycle")[0] == read_language("en")
    assert Encoder(english_only).encode("a bicycle", "en-GB")[0].code == "en"
    with pytest.raises(UserError, match="English-only"):
        Encoder(english_only).encode("ein rad", "de")


def test_english_only_of_openai_has_untrained_language_tokens():
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|notimestamps|>"]
    vocabulary = {token: 50256 + place for place, token in enumerate(special)}
    assert prompt_ids(SimpleNamespace(get_vocab=lambda: vocabulary), "en") == [50257, 50259]


@pytest.mark.parametrize("language", ["xx", "de-xx", "de-", "DE", "german", "nospeech"])
def test_an_unknown_language_is_refused(tokenizer, language):
    with pytest.raises(UserError, match=f"of '{language}'; it knows de, en, es$"):
        prompt_ids(tokenizer, language)


def test_a_language_without_a_token_is_prompted_as_mapped(tokenizer):
    expected = "<|startoftranscript|>{}<|transcribe|><|notimestamps|>"
    task = "transcribe"
    assert tokens(tokenizer, "qu", task, {"qu": "de"}) == expected.format("<|de|>")
    assert tokens(tokenizer, "qu-es", task, {"qu": "de"}) == expected.format("<|de|><|es|>")
    assert tokens(tokenizer, "qu-es", task, {"qu": "es"}) == expected.format("<|es|>")
    assert tokens(tokenizer, "qu-es", task, {"qu-es": "de"}) == expected.format("<|de|>")


def test_a_row_keeps_the_language_that_is_not_the_prompt_s(tokenizer):
    encoder = Encoder(tokenizer, language_map={"qu": "de"})
    spoken, prompt, _ = encoder.encode("wasi", "qu-es")
    assert spoken.code == "qu-es" and prompt == prompt_ids(tokenizer, "de-es")


def test_a_code_of_iso_639_without_a_token_is_refused_with_the_way_out(tokenizer):
    with pytest.raises(UserError, match=r"knows de, en, es; if .* fit with language_map qu=TOKEN"):
        prompt_ids(tokenizer, "qu-es")
    assert unmapped_codes(tokenizer, "qu-es") == ["qu"]
    assert unmapped_codes(tokenizer, "qu-es", {"qu": "de"}) == []
    assert unmapped_codes(tokenizer, "qu-xx") == []  # which no token can stand for


def test_no_language_and_no_such_task_are_refused(tokenizer):
    with pytest.raises(UserError, match="no language given; choose from de, en, es"):
        prompt_ids(tokenizer, "")
    with pytest.raises(UserError, match="'sing'; choose from transcribe, translate"):
        prompt_ids(tokenizer, "de", "sing")


@pytest.mark.parametrize("text", ["das haus", "the house is old", "ünter 中文 x!"])
def test_text_is_tokenised_as_in_whisper_s_transcripts(tokenizer, text):
    ids = text_ids(tokenizer, f"  {text}\n")
    assert tokenizer.decode(ids) == " " + text
    whole = f"<|startoftranscript|><|de|><|transcribe|><|notimestamps|> {text}<|endoftext|>"
    expected = tokenizer(whole, add_special_tokens=False).input_ids
    assert [*prompt_ids(tokenizer, "de"), *ids, tokenizer.get_vocab()[END]] == expected


def test_white_space_in_a_text_is_a_space(tokenizer):
    assert text_ids(tokenizer, "das\r\n rote\u00a0\trad") == text_ids(tokenizer, "das rote rad")


def test_special_tokens_in_a_text_are_text(tokenizer):
    ids = text_ids(tokenizer, "a <|endoftext|> b")
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == " a <|endoftext|> b"


SPACE_FORBIDDEN_FIRST = {
    "我喜欢": "我喜欢",
    "«ไป": "«ไป",
    "ភាសា": "ភាសា",
    "私は red": "私は red",
    "das 我": " das 我",
    "мир": "мир",  # here the space would be a token of its own
}


@pytest.mark.parametrize("text", SPACE_FORBIDDEN_FIRST)
def test_a_label_does_not_begin_with_a_space_that_decoding_may_not_say(tokenizer, text):
    space, end = tokenizer.encode(" ", add_special_tokens=False)[0], tokenizer.get_vocab()[END]
    suppressed = Suppressed.of(GenerationConfig(begin_suppress_tokens=[space, end]))
    ids = text_ids(tokenizer, text, suppressed)
    assert tokenizer.decode(ids) == SPACE_FORBIDDEN_FIRST[text]
    assert suppressed.of_target([*ids, end]) == []
    assert tokenizer.decode(text_ids(tokenizer, text)) == f" {text}"  # nothing is forbidden


def test_what_decoding_may_not_say_is_found_in_a_target(tokenizer):
    colon, end = tokenizer.get_vocab()[":"], tokenizer.get_vocab()[END]
    suppressed = Suppressed(frozenset([colon]), frozenset([end]))
    encode = Encoder(tokenizer, "de", suppressed=suppressed).encode
    assert suppressed.of_target(encode("um 10:30:00")[2]) == [colon, colon]
    assert suppressed.of_target(encode("um zehn")[2]) == []
    assert suppressed.of_target(encode("")[2]) == [end]  # silence
    assert Suppressed.of(GenerationConfig()).of_target([colon, end]) == []


@pytest.mark.parametrize("spelled", ["<|en|>", "<|0.00|>", "<|notimestamps|>", "<|startofprev|>"])
def test_a_text_that_spells_a_special_token_is_refused(tokenizer, spelled):
    with pytest.raises(UserError, match=rf"spells the token {re.escape(spelled)}; give"):
        Encoder(tokenizer, "de").encode(f"{spelled} das haus")


def test_of_many_languages_the_nearest_are_named(openai_tokenizer):
    for given, named in [("georgien", "ka (Georgian)"), ("jp", "such as"), ("xx", "such as en")]:
        with pytest.raises(UserError, match="it knows 99 others") as error:
            prompt_ids(openai_tokenizer(51865), given)
        assert named in str(error.value) and len(str(error.value)) < 160


def test_a_blank_text_has_no_tokens(tokenizer):
    assert text_ids(tokenizer, " \n") == []
