import math
import shutil

import pytest
import torch
from peft import PeftModel
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributions import MultivariateNormal, Normal

from blora_pyro.adapters import Group
from blora_pyro.diagnostics.summaries import summarise
from blora_pyro.errors import UserError
from blora_pyro.guides import build_guide, build_prior, normal, with_prior_arguments
from blora_pyro.guides.base_informed import Guide, Prior
from blora_pyro.models import FactorPrior, load_base
from blora_pyro.models.second_moments import leading_eigenvectors
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

N, K, LAM, SCALE = 6, 3, 2.0, 0.3
GROUP = Group(("one", "two"), out_features=4, in_features=N, rank=3)
SITE = GROUP.A
DECODER = ".*decoder.*"


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


# ---- the prior's arguments


def test_arguments_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="statistics is 'new'; give own or backward"):
        Prior(statistics="new")
    with pytest.raises(UserError, match="lam_b is -1; give 0, or a number above it"):
        Prior(lam_b=-1)
    with pytest.raises(UserError, match="languages is 'en,,de'; give codes"):
        Prior(languages="en,,de")


def test_without_statistics_there_is_no_density():
    with pytest.raises(UserError, match="has no statistics of one; fit with a base model"):
        Prior()(SITE)


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
