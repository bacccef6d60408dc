import shutil
from dataclasses import replace

import pytest
import torch

from blora_pyro.adapters import find_targets
from blora_pyro.data import IGNORED, Examples, features, load_split
from blora_pyro.errors import UserError
from blora_pyro.files import cache_dir
from blora_pyro.fitting.encoder_cache import EncoderCache
from blora_pyro.guides import normal, prepare_prior, with_prior_arguments
from blora_pyro.guides.base_informed import Prior
from blora_pyro.models import BLoRA, second_moments
from blora_pyro.models.decoding import decode, encode
from blora_pyro.models.second_moments import leading_eigenvectors
from blora_pyro.options import FitConfig
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.parts import build, old_data

DECODER = ".*decoder.*"


def moments(n):
    """Two second moments of mean diagonal 1."""
    found = []
    for seed in range(2):
        draws = torch.Generator().manual_seed(seed)
        x = torch.randn(20, n, generator=draws) @ torch.randn(n, n, generator=draws)
        c = (x.mT @ x).double()
        found.append(c / c.diagonal().mean())
    return found


# ---- their eigenvectors


def test_all_eigenvectors_are_those_of_the_whole_decomposition():
    for c in moments(40):
        found = leading_eigenvectors(7 * c, 40)  # its scale does not matter
        values = torch.linalg.eigvalsh(c).flip(0)
        torch.testing.assert_close(found["values"][:-1].double(), values, rtol=1e-4, atol=1e-4)
        assert found["values"][-1] == 0
        vectors = found["vectors"].double()
        rebuilt = vectors @ torch.diag(values) @ vectors.mT
        torch.testing.assert_close(rebuilt, c, rtol=0, atol=0.02)  # float16
        part = leading_eigenvectors(c, 8)
        assert part["vectors"].shape == (40, 8)
        torch.testing.assert_close(part["values"][:8].double(), values[:8], rtol=1e-3, atol=1e-3)
        assert part["values"][8].item() == pytest.approx(values[8:].mean().item(), rel=1e-3)


def test_inputs_that_are_all_zero_hold_nothing():
    found = leading_eigenvectors(torch.zeros(5, 5), 2)
    assert not found["values"].any()


# ---- what layers hear


@pytest.fixture
def heard(fluent_base, tones_folder):
    """The base of the tones, and two batches of the new domain's audio."""
    train = load_split(str(tones_folder), "train")
    examples = Examples(train, fluent_base.feature_extractor, fluent_base.tokenizer)
    return fluent_base, examples, [examples.batch([0]), examples.batch([1])]


def prepared(base, batches, targets=DECODER, **arguments):
    torch.manual_seed(0)
    prior = Prior(**{"languages": "en,de", "directions": 2, **arguments})
    prepare_prior(prior, base.net, iter(batches), find_targets(base.net, targets))
    return prior


@torch.no_grad()
def check(tensors, base, said):
    """Hold statistics against the dense moments of what layers hear, of pairs (batch, tokens)."""
    inputs = {name: [] for name in find_targets(base.net, DECODER)}
    hooks = [
        base.net.get_submodule(name).register_forward_pre_hook(
            lambda layer, given, rows=rows: rows.append(given[0][0])
        )
        for name, rows in inputs.items()
    ]
    for batch, tokens in said:
        base.net(input_features=batch.input_features, decoder_input_ids=torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    assert {name.rpartition(".")[0] for name in tensors} == inputs.keys()
    for name, rows in inputs.items():
        x = torch.cat(rows).double()
        c = x.mT @ x / (x**2).sum(0).mean()
        values, found = torch.linalg.eigvalsh(c).flip(0), tensors[f"{name}.values"].double()
        kept = len(found) - 1
        torch.testing.assert_close(found[:kept], values[:kept], rtol=1e-3, atol=1e-3)
        first = tensors[f"{name}.vectors"][:, 0].double()
        assert (first @ c @ first).item() == pytest.approx(values[0].item(), rel=1e-2)


def test_c_is_of_the_inputs_as_the_base_says_its_own_transcripts_in_old_languages(heard):
    base, _, batches = heard
    ids, said = base.tokenizer.convert_tokens_to_ids, []
    for batch, language in zip(batches, ("en", "de"), strict=True):
        names = ("startoftranscript", language, "transcribe", "notimestamps")
        prompt = [
            ids(f"<|{name}|>") for name in names if f"<|{name}|>" in base.tokenizer.get_vocab()
        ]
        (tokens,) = decode(base, encode(base, batch.input_features), [prompt])
        assert tokens
        said.append((batch, prompt + tokens))
    check(prepared(base, batches).tensors, base, said)


def test_c_of_old_data_is_that_of_their_own_texts_or_of_what_the_base_says(heard):
    base, examples, batches = heard
    rows = [*zip(batches, examples.prompts, examples.targets, strict=True)]
    said = [(batch, [*prompt, *target[:-1]]) for batch, prompt, target in rows]
    own = {"statistics": "backward", "languages": "fr"}
    check(prepared(base, batches, **own).tensors, base, said)

    said, silent = [], []
    for batch, prompt, target in rows:
        (tokens,) = decode(base, encode(base, batch.input_features), [prompt])
        said.append((batch, [*prompt, *tokens]))
        labels = torch.full((1, len(prompt)), IGNORED)
        labels[0, -1] = target[-1]
        silent.append(replace(batch, decoder_input_ids=torch.tensor([prompt]), labels=labels))
    check(prepared(base, silent, **own).tensors, base, said)


def test_new_and_old_moments_are_those_of_texts_and_of_old_prompts(heard):
    base, _, batches = heard
    modules = [*find_targets(base.net, DECODER)]
    new, old = second_moments.second_moments(base.net, batches, modules, ("en", "de"))
    plain = prepared(base, batches, directions=99).tensors
    backward = prepared(base, batches, directions=99, statistics="backward").tensors
    for name in modules:
        for moment, tensors in ((new.pop(name), backward), (old.pop(name), plain)):
            c = moment / moment.diagonal().mean()
            found = leading_eigenvectors(moment, tensors[f"{name}.vectors"].shape[1])
            torch.testing.assert_close(
                found["values"], tensors[f"{name}.values"], rtol=1e-3, atol=1e-3
            )
            assert c.diagonal().mean().item() == pytest.approx(1)


def test_old_data_are_as_many_utterances_of_every_set_and_none_that_are_scored(
    fluent_base, tones_folder, fit_options, tmp_path
):
    sets = {"de": ("train", "dev"), "en": ("validation", "test")}
    for name, splits in sets.items():
        for split in splits:
            (tmp_path / name).mkdir(exist_ok=True)
            shutil.copy(tones_folder / f"{name}.jsonl", tmp_path / name / f"{split}.jsonl")
        for wav in tones_folder.glob(f"{name}*.wav"):
            shutil.copy(wav, tmp_path / name)
    backward = {name: str(tmp_path / name) for name in sets}
    prior = {"prior": "base-informed", "prior_args": {"statistics": "backward", "utterances": 2}}
    options = {**fit_options, **prior, "backward": backward, "target_modules": DECODER}
    config = with_prior_arguments(FitConfig(**options)).resolved(10, 2)
    found = old_data(Loader(fluent_base, config), 2)
    assert [one.languages for one in found] == [["de"], ["en"]]
    assert ["train" in found[0].origins[0], "validation" in found[1].origins[0]] == [True, True]
    train = found[0]
    model, _ = build(fluent_base, config, None, train)
    said = [(one.batch([0]), [*one.prompts[0], *one.targets[0][:-1]]) for one in found]
    check(model.prior.tensors, fluent_base, said)

    (tmp_path / "en" / "validation.jsonl").unlink()
    with pytest.raises(UserError, match="has neither a train nor a dev split, one of which"):
        build(fluent_base, config, None, train)
    with pytest.raises(UserError, match="statistics is backward, but no backward set"):
        FitConfig(**{**options, "backward": ()})


@pytest.mark.parametrize("targets", [DECODER, "all-linear"])
def test_g_is_of_the_gradients_by_outputs_of_what_the_base_predicts(heard, targets, monkeypatch):
    base, examples, batches = heard
    monkeypatch.setattr(torch, "multinomial", lambda p, count: p.argmax(-1, keepdim=True))
    own = {"statistics": "backward", "lam_b": 1.0, "directions": 99}
    tensors = prepared(base, batches, targets, **own).tensors
    rows = {name: [] for name in find_targets(base.net, targets)}
    outputs, hooks = {}, []
    for name in rows:
        layer = base.net.get_submodule(name)
        layer.weight.requires_grad_(True)
        hooks.append(
            layer.register_forward_hook(
                lambda layer, given, output, name=name: outputs.update({name: output})
            )
        )
    for batch, prompt in zip(batches, examples.prompts, strict=True):
        logits = base.net(
            input_features=batch.input_features,
            decoder_input_ids=batch.decoder_input_ids,
            use_cache=False,
        ).logits[0, len(prompt) - 1 :]
        log_p = logits.log_softmax(-1).amax(-1).sum()
        for name, one in zip(outputs, torch.autograd.grad(log_p, [*outputs.values()]), strict=True):
            rows[name].append(one.flatten(0, -2))
    for hook in hooks:
        hook.remove()
    base.net.requires_grad_(False)
    for name, some in rows.items():
        g = torch.cat(some).double()
        g = g.mT @ g / (g**2).sum(0).mean()
        found = tensors[f"{name}.outputs.values"].double()
        kept = len(found) - 1
        values = torch.linalg.eigvalsh(g).flip(0)[:kept]
        torch.testing.assert_close(found[:kept], values, rtol=1e-2, atol=1e-2)
        first = tensors[f"{name}.outputs.vectors"][:, 0].double()
        assert (first @ g @ first).item() == pytest.approx(values[0].item(), rel=1e-2)
    size = sum(one.numel() for name, one in tensors.items() if name.endswith("vectors"))
    assert size <= base.net.num_parameters() / second_moments.PART
    plain = prepared(base, batches, targets, statistics="backward").tensors
    assert not any(".outputs." in name for name in plain)


def test_states_that_the_fit_keeps_are_taken(heard):
    base, examples, batches = heard
    model = BLoRA(base.net, normal.Prior(), rank=2, target_modules=DECODER)
    cache = EncoderCache(model, 2, fingerprint=examples.fingerprint)
    with_states = [cache(batch, [i], 0) for i, batch in enumerate(batches)]
    plain = prepared(base, batches).tensors
    for file in (cache_dir() / "statistics").iterdir():
        file.unlink()
    for name, value in prepared(base, with_states).tensors.items():
        torch.testing.assert_close(value, plain[name])


def test_full_windows_are_heard_whatever_the_fit_cuts(
    fluent_base, tones_folder, fit_options, monkeypatch
):
    monkeypatch.setattr(features, "MARGIN", 0)  # of frames: the tones fill half of the window
    options = {**fit_options, "prior": "base-informed", "target_modules": DECODER}
    config = with_prior_arguments(FitConfig(**options)).resolved(10, 2)
    train, found = load_split(str(tones_folder), "train"), []
    for trim in (False, True):
        extractor, tokenizer = fluent_base.feature_extractor, fluent_base.tokenizer
        examples = Examples(train, extractor, tokenizer, trim=trim)
        found.append((examples.batch([0]), build(fluent_base, config, None, examples)[0].prior))
    (whole, one), (cut, other) = found
    assert cut.input_features.shape[-1] < whole.input_features.shape[-1]
    assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())


def test_layers_of_the_encoder_have_statistics_too(heard):
    base, _, batches = heard
    tensors = prepared(base, batches, "all-linear").tensors
    assert tensors["model.encoder.layers.1.fc2.vectors"].shape[0] == 32
    size = sum(one.numel() for name, one in tensors.items() if name.endswith("vectors"))
    assert size <= base.net.num_parameters() / second_moments.PART


def test_they_are_computed_once_and_kept(heard, monkeypatch):
    base, _, batches = heard
    first = prepared(base, batches).tensors
    (file,) = (cache_dir() / "statistics").iterdir()

    def refuse(*given):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(second_moments, "_listen", refuse)
        again = prepared(base, batches, lam=9.0).tensors  # which they do not depend on
        with pytest.raises(UserError, match="computed again"):
            prepared(base, batches, languages="de,en")
        with pytest.raises(UserError, match="computed again"):
            prepared(base, batches[::-1])
    assert again.keys() == first.keys()
    assert all(torch.equal(value, first[name]) for name, value in again.items())
    file.write_bytes(b"damaged")
    assert prepared(base, batches).tensors.keys() == first.keys()


def test_an_unknown_language_is_refused(heard):
    base, _, batches = heard
    with pytest.raises(UserError, match=r"languages has 'fr', and the base has no <\|fr\|>; give"):
        prepared(base, batches, languages="en,fr")


def test_an_english_only_base_is_prompted_as_ever(net):
    net.generation_config.lang_to_id = None
    start, last = net.config.decoder_start_token_id, net.generation_config.no_timestamps_token_id
    assert second_moments._prompts(net, ("en",)) == [[start, last]]
