import math
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributions import MultivariateNormal, Normal

from blora_pyro.adapters import Group, find_targets
from blora_pyro.data import IGNORED, Examples, features, load_split
from blora_pyro.diagnostics.summaries import summarise
from blora_pyro.errors import UserError
from blora_pyro.files import cache_dir
from blora_pyro.fitting.encoder_cache import EncoderCache
from blora_pyro.guides import (
    base_informed,
    build_guide,
    build_prior,
    normal,
    prepare_prior,
    with_prior_arguments,
)
from blora_pyro.guides.base_informed import Guide, Prior, leading_eigenvectors, second_moments
from blora_pyro.models import BLoRA, FactorPrior, load_base
from blora_pyro.models.decoding import decode, encode
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.combining import combine
from blora_pyro.posterior.pruning import prune
from blora_pyro.posterior.spectra import spectra
from blora_pyro.posterior.storage import POSTERIOR_FILE
from blora_pyro.posterior.strength import at_strength
from blora_pyro.runs.chains import Previous
from blora_pyro.runs.fits import fit
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.parts import build, old_data

N, K, LAM, SCALE = 6, 3, 2.0, 0.3
GROUP = Group(("one", "two"), out_features=4, in_features=N, rank=3)
SITE = GROUP.A


def moments(n=N, first=0):
    """Second moments of inputs of two layers, of mean diagonal 1."""
    found = {}
    for seed, name in enumerate(GROUP.modules):
        draws = torch.Generator().manual_seed(first + seed)
        x = torch.randn(20, n, generator=draws) @ torch.randn(n, n, generator=draws)
        c = (x.mT @ x).double()
        found[name] = c / c.diagonal().mean()
    return found


def informed(k=N, lam=LAM):
    """A prior with the leading `k` eigenvectors of `moments`, not rounded."""
    prior = Prior(SCALE, lam)
    for name, c in moments().items():
        values, vectors = torch.linalg.eigh(c)
        values, vectors = values.flip(0), vectors.flip(1)
        rest = values[k:].mean() if k < N else torch.tensor(0.0)
        found = {"vectors": vectors[:, :k], "values": torch.cat([values[:k], rest[None]])}
        prior.tensors |= {f"{name}.{what}": one.float() for what, one in found.items()}
    return prior


def informed_of_outputs(lam_b=4.0):
    """Likewise, with the statistics of outputs."""
    prior = informed(K)
    prior.lam_b = lam_b
    for name, g in moments(GROUP.out_features, 9).items():
        found = leading_eigenvectors(g.float(), GROUP.out_features)
        prior.tensors |= {f"{name}.outputs.{what}": one for what, one in found.items()}
    return prior


def covariances(k=N, lam=LAM):
    """scale² (I + lam C)^-1 of both layers, the eigenvalues beyond `k` replaced by their mean."""
    found = []
    for c in moments().values():
        values, vectors = torch.linalg.eigh(c)
        values[: N - k] = values[: N - k].mean() if k < N else 0
        c = vectors @ torch.diag(values) @ vectors.mT
        found.append(SCALE**2 * torch.linalg.inv(torch.eye(N).double() + lam * c))
    return torch.stack(found)


def moved_guide(prior, kind=Guide):
    program = FactorPrior((GROUP,), prior, torch.device("cpu"))
    guide = kind(program)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return program, guide


# ---- the density


@pytest.mark.parametrize("k", [N, K, 1])
def test_rows_of_a_have_the_density_of_a_dense_normal(k):
    a = 0.3 * torch.randn(SITE.shape)
    found = informed(k)(SITE).log_prob(a)
    covariance = covariances(k)[:, None].expand(-1, GROUP.rank, N, N)
    dense = MultivariateNormal(torch.zeros(N).double(), covariance)
    torch.testing.assert_close(found.double(), dense.log_prob(a.double()).sum(1), rtol=1e-5, atol=0)


def test_columns_of_b_have_the_density_of_a_dense_normal_and_a_map_of_their_own():
    prior = informed_of_outputs()
    z, x = torch.randn(GROUP.B.shape), torch.randn(2, GROUP.out_features, 5)
    colouring = prior.coordinates(GROUP.B)
    b = colouring(z)
    torch.testing.assert_close(colouring.inv(b), z)
    torch.testing.assert_close(b.mT @ x, z.mT @ colouring.adjoint(x))
    eye = torch.eye(GROUP.out_features).double()
    g = torch.stack([*moments(GROUP.out_features, 9).values()])
    covariance = SCALE**2 * torch.linalg.inv(eye + prior.lam_b * g)
    dense = MultivariateNormal(torch.zeros(len(eye)).double(), covariance[:, None])
    found = prior(GROUP.B).log_prob(b).double()
    expected = dense.log_prob(b.mT.double()).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # vectors in half precision
    variance = covariance.diagonal(dim1=1, dim2=2)[:, :, None].expand(b.shape)
    torch.testing.assert_close(prior(GROUP.B).variance.double(), variance, rtol=1e-2, atol=0)
    a = torch.randn(SITE.shape)
    assert torch.equal(prior(SITE).log_prob(a), informed(K)(SITE).log_prob(a))


def test_b_is_as_under_normal_and_all_is_near_lambda_0():
    b = torch.randn(GROUP.B.shape)
    assert torch.equal(informed()(GROUP.B).log_prob(b), normal.Prior(SCALE)(GROUP.B).log_prob(b))
    a = torch.randn(SITE.shape)
    found, plain = (prior(SITE).log_prob(a) for prior in (informed(lam=1e-9), normal.Prior(SCALE)))
    torch.testing.assert_close(found, plain)


def test_draws_have_the_covariance_and_its_diagonal_is_the_variance():
    prior = informed(K)
    covariance = covariances(K)
    rows = torch.stack([prior(SITE).sample() for _ in range(5000)]).transpose(0, 1).flatten(1, 2)
    assert rows.shape == (2, 15000, N)
    found = rows.mT.double() @ rows.double() / rows.shape[1]
    torch.testing.assert_close(found, covariance, rtol=0, atol=0.05 * SCALE**2)
    variance = covariance.diagonal(dim1=1, dim2=2)[:, None].expand(SITE.shape)
    torch.testing.assert_close(prior(SITE).variance.double(), variance, rtol=1e-5, atol=0)


def test_the_map_its_inverse_and_its_adjoint_agree():
    colouring = informed(K).coordinates(SITE)
    z, x = torch.randn(SITE.shape), torch.randn(2, N, 5)
    a = colouring(z)
    torch.testing.assert_close(colouring.inv(a), z)
    torch.testing.assert_close(a @ x, z @ colouring.adjoint(x))


# ---- the guides


@pytest.mark.parametrize("prior", [informed(K), informed_of_outputs()])
def test_the_kl_is_that_of_the_coordinates_and_of_a_monte_carlo_estimate(prior):
    program, guide = moved_guide(prior)
    kl = TraceMeanField_ELBO().loss(program, guide)
    expected = 0.0
    for name in guide.means:
        q = Normal(guide.means[name], torch.nn.functional.softplus(guide.rhos[name]))
        expected += torch.distributions.kl_divergence(q, Normal(0.0, SCALE)).sum().item()
    assert kl == pytest.approx(expected, rel=1e-5)
    ratios = []
    for _ in range(400):
        drawn = poutine.trace(guide).get_trace()
        scored = poutine.trace(poutine.replay(program, trace=drawn)).get_trace()
        ratios.append((drawn.log_prob_sum() - scored.log_prob_sum()).item())
    error = torch.tensor(ratios).std().item() / math.sqrt(400)
    assert abs(sum(ratios) / 400 - kl) < 5 * error < 0.05 * kl


def test_the_point_is_one_in_the_coordinates_and_costs_its_density():
    prior = informed(K)
    program, guide = moved_guide(prior, lambda program: build_guide("point", program))
    a = prior.coordinates(SITE)(guide.means[SITE.name])
    assert torch.equal(guide.mean()[SITE.name], a)
    log_p = prior(SITE).log_prob(a).sum() + prior(GROUP.B).log_prob(guide.means["B_4x6"]).sum()
    assert TraceMeanField_ELBO().loss(program, guide) == pytest.approx(-log_p.item(), rel=1e-5)
    (a.sum() + guide()[SITE.name].sum()).backward()
    assert (guide.means[SITE.name].grad != 0).all()


def test_the_guide_needs_its_prior():
    program = FactorPrior((GROUP,), normal.Prior(), torch.device("cpu"))
    with pytest.raises(UserError, match="the guide base-informed needs that prior"):
        Guide(program)


# ---- the statistics


def test_all_eigenvectors_are_those_of_the_whole_decomposition():
    for c in moments(40).values():
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


@pytest.fixture
def heard(fluent_base, tones_folder):
    """The base of the tones, and two batches of the new domain's audio."""
    train = load_split(str(tones_folder), "train")
    examples = Examples(train, fluent_base.feature_extractor, fluent_base.tokenizer)
    return fluent_base, examples, [examples.batch([0]), examples.batch([1])]


DECODER = ".*decoder.*"


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
    with pytest.raises(UserError, match="statistics is 'new'; give own or backward"):
        Prior(statistics="new")


def test_new_and_old_moments_are_those_of_texts_and_of_old_prompts(heard):
    base, _, batches = heard
    modules = [*find_targets(base.net, DECODER)]
    new, old = second_moments(base.net, batches, modules, ("en", "de"))
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
    assert size <= base.net.num_parameters() / base_informed.PART
    plain = prepared(base, batches, targets, statistics="backward").tensors
    assert not any(".outputs." in name for name in plain)
    with pytest.raises(UserError, match="lam_b is -1; give 0, or a number above it"):
        Prior(lam_b=-1)


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
    assert size <= base.net.num_parameters() / base_informed.PART


def test_they_are_computed_once_and_kept(heard, monkeypatch):
    base, _, batches = heard
    first = prepared(base, batches).tensors
    (file,) = (cache_dir() / "statistics").iterdir()

    def refuse(*given):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(base_informed, "_listen", refuse)
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
    with pytest.raises(UserError, match="languages is 'en,,de'; give codes"):
        Prior(languages="en,,de")


def test_without_statistics_there_is_no_density():
    with pytest.raises(UserError, match="has no statistics of one; fit with a base model"):
        Prior()(SITE)


def test_an_english_only_base_is_prompted_as_ever(net):
    net.generation_config.lang_to_id = None
    start, last = net.config.decoder_start_token_id, net.generation_config.no_timestamps_token_id
    assert base_informed._prompts(net, ("en",)) == [[start, last]]


def test_the_languages_are_those_of_the_backward_sets_unless_given():
    config = FitConfig(prior="base-informed", backward={"de": "a", "en": "b"}, base="x", data="c")
    assert with_prior_arguments(config).prior_args["languages"] == "de,en"
    given = config.with_options(prior_args={"languages": "fr"})
    assert with_prior_arguments(given).prior_args["languages"] == "fr"
    assert build_prior("base-informed").languages == ""


# ---- what is made of a posterior


@pytest.fixture(scope="module")
def fitted(fit_options, tmp_path_factory):
    """A run of some steps, its encoder's states kept, with its folder."""
    return fitted_run(fit_options, tmp_path_factory)


@pytest.fixture(scope="module", params=[0.0, 2.0])
def either(request, fitted, fit_options, tmp_path_factory):
    """That run, or one whose B is informed, too."""
    return fitted_run(fit_options, tmp_path_factory, request.param) if request.param else fitted


def fitted_run(fit_options, tmp_path_factory, lam_b=0.0):
    options = {**fit_options, "target_modules": DECODER, "cache_encoder": True, "steps": 8}
    options["backward"] = dict(zip(("de", "en"), fit_options["backward"], strict=True))
    prior_args = {"utterances": 2, "lam_b": lam_b}
    config = FitConfig(**options, prior="base-informed", prior_args=prior_args)
    return fit(config, tmp_path_factory.mktemp("informed") / "run", evaluate=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v, c: {"values": c - 5}, "statistics that no inputs have"),
        (lambda v, c: {"values": c + 1e6}, "statistics that no inputs have"),
        (lambda v, c: {"vectors": v.float() + 3e38}, "statistics that no inputs have"),
        (lambda v, c: {"values": c[:-1]}, "of shapes"),
        (lambda v, c: {"values": c.sum()}, "of shapes"),
        (lambda v, c: {"vectors": v[:-1]}, "of shapes"),
        (lambda v, c: {"vectors": v.float().round().long()}, "no floats"),
        (lambda v, c: {"vectors": None}, "is missing"),
        (lambda v, c: {"more": c + 1}, "of no layer"),
    ],
)
def test_statistics_that_cannot_be_are_refused_as_they_are_read(fitted, tmp_path, change, words):
    copy = shutil.copytree(fitted.output, tmp_path / "run")
    with safe_open(copy / POSTERIOR_FILE, framework="pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    layer = next(name for name in tensors if name.startswith("prior.")).rpartition(".")[0]
    given = [tensors[f"{layer}.{what}"] for what in ("vectors", "values")]
    changed = {f"{layer}.{name}": one for name, one in change(*given).items()}
    kept = {name: one for name, one in (tensors | changed).items() if one is not None}
    save_file(kept, copy / POSTERIOR_FILE, metadata=about)
    with pytest.raises(UserError, match=words):
        Posterior.load(copy)


def test_a_fit_learns_and_its_posterior_is_read_as_it_was_written(either):
    fitted = either
    assert fitted.history[-1].nll < fitted.history[0].nll
    assert fitted.config.prior_args["languages"] == "de,en"
    stored, own = Posterior.load(fitted.output), fitted.posterior
    assert own.prior_tensors.keys() == stored.prior_tensors.keys() != set()
    for name in own.mean:
        torch.testing.assert_close(stored.guide.mean()[name], own.mean[name])
        torch.testing.assert_close(stored.guide.stddev()[name], own.stddev[name])
        draws = torch.stack([draw[name] for draw in stored.draws(300)])
        errors = (draws.mean(0) - own.mean[name]) / (draws.std(0) / math.sqrt(300))
        assert errors.abs().max() < 6
        torch.testing.assert_close(draws.std(0), own.stddev[name], rtol=0.3, atol=0)


def test_a_fit_that_is_stopped_goes_on_to_the_same_posterior(fitted, tmp_path):
    def stop(step):
        if step.step == 5:
            raise KeyboardInterrupt

    listener = Listener()
    listener.step = stop
    folder = tmp_path / "run"
    options = {"evaluate": False, "checkpoint_every": 4}
    with pytest.raises(KeyboardInterrupt):
        fit(fitted.config, folder, progress=listener, **options)
    again = fit(output=folder, resume=True, **options).posterior
    for name, mean in fitted.posterior.mean.items():
        assert torch.equal(again.mean[name], mean)
        assert torch.equal(again.stddev[name], fitted.posterior.stddev[name])


def test_contraction_and_signal_to_noise_are_those_of_the_coordinates(fitted):
    own = fitted.posterior
    rows = {(row.module, row.factor): row for row in summarise(own).factors}
    for group in own.groups:
        z = own.independent[group.A.name]
        for i, module in enumerate(group.modules):
            row = rows[module, "A"]
            ratio = (z.stddev[i] / 0.05) ** 2
            assert row.contraction == pytest.approx(1 - ratio.mean().item(), rel=1e-4)
            snr = (z.mean[i] / z.stddev[i]).abs().median().item()
            assert row.signal_to_noise == pytest.approx(snr, rel=1e-4)
    assert own.independent.keys() == {group.A.name for group in own.groups}
    assert math.isfinite(summarise(own).kl)


def test_the_spread_of_singular_values_is_that_of_draws(either):
    own = either.posterior
    assert math.isfinite(summarise(own).kl)
    assert len(own.independent) == (2 if own.family.prior_args["lam_b"] else 1) * len(own.groups)
    draws = list(own.draws(400))
    for group, found in zip(own.groups, spectra(own).values(), strict=True):
        values = torch.stack(
            [
                own.scalings[group.key]
                * (
                    (draw[group.A.name] @ found.right).mT * (found.left.mT @ draw[group.B.name])
                ).sum(2)
                for draw in draws
            ]
        )
        torch.testing.assert_close(values.std(0), found.stddevs, rtol=0.25, atol=0)


def test_what_takes_weights_one_by_one_refuses_and_the_rest_works(fitted, tmp_path):
    own = fitted.posterior
    with pytest.raises(UserError, match=r"run 1 depend on one another .*; give method mean") as one:
        combine([own, own], "product")
    with pytest.raises(UserError, match=r"whose weights depend on one another .*another") as two:
        Previous.read(fitted.output)
    assert "\n" not in f"{one.value}{two.value}"
    with pytest.raises(UserError, match="prior"):
        FitConfig(
            prior="base-informed", data={"a": "x", "b": "y"}, base="z", pooling="none"
        ).check()
    half = at_strength(own, 0.5)
    for smaller in (combine([own, own])[0], prune(own, snr=0.1), prune(own, rank=2), half):
        assert smaller.rank > 0
    for (_, delta), (_, whole) in zip(half.delta_weights(), own.delta_weights(), strict=True):
        torch.testing.assert_close(delta, whole / 2)


def test_the_adapter_is_that_of_peft(fitted, fluent_folder):
    base = load_base(str(fluent_folder))
    adapted = PeftModel.from_pretrained(load_base(str(fluent_folder)).net, str(fitted.output))
    fitted.posterior.merge(base.net)
    mels, tokens = torch.randn(1, 8, 100), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        one, other = (
            net(input_features=mels, decoder_input_ids=tokens).logits for net in (base.net, adapted)
        )
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
