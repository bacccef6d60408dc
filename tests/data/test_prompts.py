from types import SimpleNamespace

import pytest

from blora_pyro.data.prompts import END, prompt_ids, text_ids
from blora_pyro.errors import UserError


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


def test_english_only_of_openai_has_untrained_language_tokens():
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|notimestamps|>"]
    vocabulary = {token: 50256 + place for place, token in enumerate(special)}
    assert prompt_ids(SimpleNamespace(get_vocab=lambda: vocabulary), "en") == [50257, 50259]


@pytest.mark.parametrize("language", ["xx", "de-xx", "de-", "DE", "german", "nospeech"])
def test_an_unknown_language_is_refused(tokenizer, language):
    with pytest.raises(UserError, match=f"of '{language}'; it knows de, en, es$"):
        prompt_ids(tokenizer, language)


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


def test_special_tokens_in_a_text_are_text(tokenizer):
    ids = text_ids(tokenizer, "a <|endoftext|> b")
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == " a <|endoftext|> b"


def test_a_blank_text_has_no_tokens(tokenizer):
    assert text_ids(tokenizer, " \n") == []
