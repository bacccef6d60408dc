import json
import math
import warnings

import numpy as np
import pyro
import pytest
import torch
import xarray

from blora_pyro.adapters import Group
from blora_pyro.data import IGNORED, Examples, read_manifest
from blora_pyro.diagnostics.khat import leave_one_out
from blora_pyro.errors import UserError
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.inference_data import import_arviz, pareto_khat

from .conftest import ENCODER, FACTORS, GROUPS, TALL, fitted, group_of

DRAWS = 200


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    pyro.set_rng_seed(0)
    return fitted(scale=0.05)


@pytest.fixture(scope="module")
def data(posterior):
    return posterior.to_arviz(draws=DRAWS)


# ---- groups, dimensions, coordinates


def test_groups_have_a_variable_per_site_and_log_densities_per_draw(data):
    for name in ("posterior", "prior"):
        assert set(group_of(data, name)) == set(FACTORS)
    assert set(group_of(data, "sample_stats")) == {"log_guide", "log_prior"}
    for variable in group_of(data, "sample_stats").values():
        assert variable.dims == ("chain", "draw")
        assert variable.shape == (1, DRAWS)
        assert variable.dtype == np.float64
        assert np.isfinite(variable).all()


def test_dimension_names_end_in_the_shape_if_groups_differ(data):
    dims = {
        "A_4x4": ("chain", "draw", "module_4x4", "rank", "in_feature"),
        "B_4x4": ("chain", "draw", "module_4x4", "out_feature_4x4", "rank"),
        "A_6x4": ("chain", "draw", "module_6x4", "rank", "in_feature"),
        "B_6x4": ("chain", "draw", "module_6x4", "out_feature_6x4", "rank"),
    }
    shapes = {"A_4x4": (3, 2, 4), "B_4x4": (3, 4, 2), "A_6x4": (2, 2, 4), "B_6x4": (2, 6, 2)}
    for group in ("posterior", "prior"):
        for name, variable in group_of(data, group).items():
            assert variable.dims == dims[name]
            assert variable.shape == (1, DRAWS, *shapes[name])
            assert variable.dtype == np.float32


def test_coordinates_are_names_of_layers_and_numbers(data):
    dataset = group_of(data, "posterior")
    assert tuple(dataset["module_4x4"].values) == ENCODER
    assert tuple(dataset["module_6x4"].values) == TALL
    assert dataset["chain"].values.tolist() == [0]
    assert dataset["draw"].values.tolist() == list(range(DRAWS))
    assert dataset["rank"].values.tolist() == [0, 1]
    assert dataset["out_feature_6x4"].values.tolist() == list(range(6))


def test_one_group_of_layers_has_plain_dimensions():
    dataset = group_of(fitted(groups=GROUPS[1:]).to_arviz(draws=2), "posterior")
    assert dataset["A_6x4"].dims == ("chain", "draw", "module", "rank", "in_feature")
    assert dataset["B_6x4"].dims == ("chain", "draw", "module", "out_feature", "rank")
    assert tuple(dataset["module"].values) == TALL


def test_ranks_that_differ_are_told_apart():
    groups = (Group(TALL, 6, 4, 3, suffix="_r3"), Group(("other",), 6, 4, 1, suffix="_r1"))
    dataset = group_of(fitted(groups=groups).to_arviz(draws=2), "posterior")
    assert dataset["A_6x4_r3"].dims == (
        "chain",
        "draw",
        "module_6x4_r3",
        "rank_6x4_r3",
        "in_feature",
    )
    assert dataset["B_6x4_r1"].dims == (
        "chain",
        "draw",
        "module_6x4_r1",
        "out_feature",
        "rank_6x4_r1",
    )
    assert dataset["B_6x4_r1"].shape == (1, 2, 1, 6, 1)


def test_attributes_name_the_family():
    dataset = group_of(fitted("student-t", df=5.0).to_arviz(draws=1), "posterior")
    assert dataset.attrs["prior"] == "student-t"
    assert json.loads(dataset.attrs["prior_args"]) == {"df": 5.0}
    assert dataset.attrs["guide"] == "student-t"


def test_the_scales_of_a_hierarchical_prior_are_variables():
    dims = {
        "horseshoe": {"_global": (), "_local": ("module_{}", "rank")},
        "learned-scale": {"_scale": ("module_{}",)},
    }
    for prior, endings in dims.items():
        data = fitted(prior).to_arviz(draws=3)
        for group in ("posterior", "prior"):
            dataset = group_of(data, group)
            assert set(dataset) == {*FACTORS, *(f + e for f in FACTORS for e in endings)}
            for ending, expected in endings.items():
                for key, factor in (("4x4", "A_4x4"), ("6x4", "B_6x4")):
                    variable = dataset[factor + ending]
                    expected_dims = tuple(dim.format(key) for dim in expected)
                    assert variable.dims == ("chain", "draw", *expected_dims)
                    assert (variable > 0).all()


# ---- values


def test_values_are_the_posteriors_own_draws(posterior, data):
    for i, draw in enumerate(posterior.draws(3)):
        for name, value in draw.items():
            found = group_of(data, "posterior")[name].values[0, i]
            np.testing.assert_array_equal(found, value.numpy())


def test_scales_are_the_posteriors_own_draws():
    posterior = fitted("horseshoe")
    dataset = group_of(posterior.to_arviz(draws=2, seed=4), "posterior")
    for i, draw in enumerate(posterior.draws(2, seed=4)):
        assert set(draw) == set(dataset)
        for name, value in draw.items():
            np.testing.assert_array_equal(dataset[name].values[0, i], value.numpy())


def assert_moments(values, mean, stddev):
    """Of draws (draws, ...), within standard errors."""
    values, mean = values.astype(np.float64), mean.numpy()
    error = values.std(0) / math.sqrt(len(values))
    assert (np.abs(values.mean(0) - mean) < 4.5 * error).all()
    squares = (values - mean) ** 2
    error = squares.std(0) / math.sqrt(len(values))
    assert (np.abs(squares.mean(0) - stddev.numpy() ** 2) < 5 * error).all()


def test_draws_have_the_moments_of_the_posterior(posterior, data):
    for name, variable in group_of(data, "posterior").items():
        assert_moments(variable.values[0], posterior.mean[name], posterior.stddev[name])


def test_prior_draws_are_the_priors_and_independent_of_the_posteriors(posterior, data):
    for name in FACTORS:
        prior, own = (group_of(data, group)[name].values[0] for group in ("prior", "posterior"))
        z = prior.astype(np.float64) / 0.05
        assert abs(z.mean()) < 4 / math.sqrt(z.size)
        assert abs((z**2).mean() - 1) < 4 * math.sqrt(2 / z.size)
        own = (own - own.mean(0)) / own.std(0)
        assert abs((own * z).mean()) < 4 / math.sqrt(z.size)


def test_log_densities_are_those_of_the_normals(posterior, data):
    stats, draws = group_of(data, "sample_stats"), group_of(data, "posterior")
    log_guide, log_prior = np.zeros(DRAWS), np.zeros(DRAWS)
    for name in FACTORS:
        w = draws[name].values[0].astype(np.float64).reshape(DRAWS, -1)
        mean, sigma = (
            value[name].double().numpy().ravel() for value in (posterior.mean, posterior.stddev)
        )
        half = 0.5 * math.log(2 * math.pi)
        log_guide += (-0.5 * ((w - mean) / sigma) ** 2 - np.log(sigma) - half).sum(1)
        log_prior += (-0.5 * (w / 0.05) ** 2 - math.log(0.05) - half).sum(1)
    np.testing.assert_allclose(stats["log_guide"].values[0], log_guide, rtol=1e-5)
    np.testing.assert_allclose(stats["log_prior"].values[0], log_prior, rtol=1e-5)


def test_log_densities_count_the_scales():
    posterior = fitted("learned-scale", scale=0.05, spread=1.0)
    stats = group_of(posterior.to_arviz(draws=3), "sample_stats")
    for i, draw in enumerate(posterior.draws(3)):
        log_guide = log_prior = 0.0
        for name in FACTORS:
            w, scale = draw[name], draw[f"{name}_scale"]
            q = torch.distributions.Normal(posterior.mean[name], posterior.stddev[name])
            log_guide += q.log_prob(w).sum()  # the scale is a point
            log_prior += torch.distributions.Normal(0.0, scale[:, None, None]).log_prob(w).sum()
            log_prior += torch.distributions.LogNormal(math.log(0.05), 1.0).log_prob(scale).sum()
        assert stats["log_guide"].values[0, i] == pytest.approx(log_guide.item(), rel=1e-5)
        assert stats["log_prior"].values[0, i] == pytest.approx(log_prior.item(), rel=1e-5)


def test_the_seed_decides_the_draws(posterior):
    one, again, other = (posterior.to_arviz(draws=2, seed=seed) for seed in (7, 7, 8))
    for name in ("posterior", "prior", "sample_stats"):
        xarray.testing.assert_identical(group_of(one, name), group_of(again, name))
        for key, variable in group_of(other, name).items():
            assert (variable.values != group_of(one, name)[key].values).all()


# ---- choosing


def test_sites_are_chosen_by_name_and_their_draws_stay_the_same(posterior, data):
    chosen = posterior.to_arviz(draws=4, sites=["B_6x4"])
    for group in ("posterior", "prior"):
        assert list(group_of(chosen, group)) == ["B_6x4"]
        found = group_of(chosen, group)["B_6x4"]
        assert found.dims == ("chain", "draw", "module", "out_feature", "rank")
        np.testing.assert_array_equal(found, group_of(data, group)["B_6x4"][:, :4])
    xarray.testing.assert_identical(
        group_of(chosen, "sample_stats"), group_of(data, "sample_stats").isel(draw=slice(4))
    )


@pytest.mark.parametrize(
    ("modules", "layers"),
    [
        ("q_proj", {"4x4": [0, 2]}),
        ("q_proj,fc1", {"4x4": [0, 2], "6x4": [0, 1]}),
        (r"decoder\..*", {"4x4": [2], "6x4": [1]}),
        (r"encoder\.0\.(v_proj|fc1)", {"4x4": [1], "6x4": [0]}),
        ("decoder.0.fc1", {"6x4": [1]}),
    ],
)
def test_layers_are_chosen_by_suffix_and_by_regex(posterior, data, modules, layers):
    dataset = group_of(posterior.to_arviz(draws=4, modules=modules), "posterior")
    assert set(dataset) == {f"{factor}_{key}" for key in layers for factor in "AB"}
    names = {"4x4": ENCODER, "6x4": TALL}
    for name, variable in dataset.items():
        _, key = name.split("_")
        (dim,) = [dim for dim in variable.dims if dim.startswith("module")]
        assert dim == ("module" if len(layers) == 1 else f"module_{key}")
        assert list(variable[dim].values) == [names[key][i] for i in layers[key]]
        whole = group_of(data, "posterior")[name].values
        np.testing.assert_array_equal(variable, whole[:, :4, layers[key]])


def test_scales_go_with_their_layers():
    dataset = group_of(fitted("horseshoe").to_arviz(draws=2, modules="v_proj"), "posterior")
    endings = ("", "_global", "_local")
    assert set(dataset) == {f"{factor}_4x4{ending}" for factor in "AB" for ending in endings}
    assert dataset["A_4x4_local"].shape == (1, 2, 1, 2)
    assert dataset["A_4x4_global"].shape == (1, 2)
    only = fitted("horseshoe").to_arviz(draws=2, sites=["B_6x4_local"])
    assert list(group_of(only, "posterior")) == ["B_6x4_local"]


def refusal(posterior, **options) -> str:
    with pytest.raises(UserError) as caught:
        posterior.to_arviz(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_sites_and_layers_are_refused_with_the_known_ones(posterior):
    message = refusal(posterior, draws=1, sites=["A_4x4", "A_5x5"])
    assert "A_5x5" in message
    assert all(name in message for name in FACTORS)
    for modules in ("k_proj", r".*\.k_proj", "proj", ""):
        assert "encoder.0.q_proj" in refusal(posterior, draws=1, modules=modules)
    assert "no regex" in refusal(posterior, draws=1, modules="(")
    message = refusal(posterior, draws=1, sites=["A_6x4"], modules="v_proj")
    assert "A_6x4" in message
    assert "v_proj" in message
    assert "A_4x4_local" in refusal(posterior, draws=1, sites=["A_4x4_local"])


@pytest.mark.parametrize("draws", [0, -1])
def test_a_number_of_draws_below_one_is_refused(posterior, draws):
    assert str(draws) in refusal(posterior, draws=draws)


def test_too_large_draws_are_refused(posterior):
    message = refusal(posterior, draws=10**7)
    # 88 weights of 4 bytes, of posterior and prior
    assert "10000000 draws" in message
    assert f"{88 * 4 * 2 * 10**7 / 2**20:,.0f} MiB" in message
    assert "1,024 MiB are allowed" in message
    assert all(word in message for word in ("draws=", "sites=", "modules=", "max_bytes="))


def test_only_the_chosen_sites_count_towards_the_size(posterior):
    size = 2 * 4 * 10 * 88
    posterior.to_arviz(draws=10, max_bytes=size)
    refusal(posterior, draws=10, max_bytes=size - 1)
    refusal(posterior, draws=11, max_bytes=size)
    of_one = 2 * 4 * 10 * (2 * 4)
    posterior.to_arviz(draws=10, max_bytes=of_one, sites=["A_4x4"], modules="v_proj")
    refusal(posterior, draws=10, max_bytes=of_one, sites=["A_4x4"], modules="q_proj")


# ---- other posteriors


def without_state(posterior) -> Posterior:
    """As pruning leaves it: moments alone."""
    return Posterior(
        posterior.base,
        posterior.groups,
        posterior.alpha,
        posterior.mean,
        posterior.stddev,
        posterior.family,
    )


def test_a_posterior_of_moments_alone_draws_from_its_normals():
    pruned = without_state(fitted())
    data = pruned.to_arviz(draws=DRAWS)
    dataset = group_of(data, "posterior")
    for name, mean in pruned.mean.items():
        z = (dataset[name].values[0] - mean.numpy()) / pruned.stddev[name].numpy()
        assert abs(z.mean()) < 4 / math.sqrt(z.size)
        assert abs((z**2).mean() - 1) < 4 * math.sqrt(2 / z.size)
    assert np.isfinite(group_of(data, "sample_stats")["log_prior"]).all()


def test_moments_alone_under_a_hierarchical_prior_have_no_density_of_the_prior():
    """Its scales are gone: there is nothing to condition on, and no closed form without."""
    data = without_state(fitted("horseshoe")).to_arviz(draws=3)
    assert set(group_of(data, "posterior")) == set(group_of(data, "prior")) == set(FACTORS)
    stats = group_of(data, "sample_stats")
    assert np.isnan(stats["log_prior"]).all()
    assert np.isfinite(stats["log_guide"]).all()


def test_a_point_is_the_same_in_every_draw():
    posterior = fitted("normal", "point")
    dataset = group_of(posterior.to_arviz(draws=3), "posterior")
    for name, mean in posterior.mean.items():
        assert (dataset[name].values == mean.numpy()).all()


USER_FILE = """
import pyro, pyro.distributions as dist, torch
from blora_pyro.guides import normal

class Prior:
    def __call__(self, site):
        pyro.sample(f"width_{site.name}", dist.Gamma(2.0, torch.ones(3)).to_event(1))
        pyro.sample(f"mood {len(site.name)} of {site.factor}{site.shape[1]}", dist.Exponential(1.0))
        return dist.Normal(0.0, 1.0).expand(site.shape).to_event(2)

class Guide(normal.Guide):
    def distribution(self, site):
        pyro.sample(f"width_{site.name}", dist.Gamma(3.0, torch.ones(3)).to_event(1))
        pyro.sample(f"mood {len(site.name)} of {site.factor}{site.shape[1]}", dist.Exponential(2.0))
        return super().distribution(site)
"""


def test_sites_that_a_users_prior_names_as_it_likes_are_variables(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER_FILE)
    dataset = group_of(fitted(str(path), groups=GROUPS[1:]).to_arviz(draws=2), "posterior")
    assert dataset["width_A_6x4"].dims == ("chain", "draw", "width_A_6x4_dim_0")
    assert dataset["mood 5 of B6"].dims == ("chain", "draw")
    assert len(dataset) == 6


# ---- ArviZ


def test_the_class_is_that_of_the_installed_arviz(data):
    arviz = import_arviz()
    is_first = arviz.__version__.startswith("0.")
    assert type(data) is (arviz.InferenceData if is_first else xarray.DataTree)


def test_arviz_writes_netcdf_and_reads_all_of_it(data, tmp_path):
    data.to_netcdf(str(tmp_path / "draws.nc"))
    back = import_arviz().from_netcdf(str(tmp_path / "draws.nc"))
    for name in ("posterior", "prior", "sample_stats"):
        xarray.testing.assert_identical(group_of(back, name), group_of(data, name))


def test_arviz_summarises_a_layer(posterior, data):
    chosen = group_of(data, "posterior").sel(module_4x4="encoder.0.v_proj")
    table = import_arviz().summary(chosen, var_names=["A_4x4"], kind="stats", round_to="none")
    mean = posterior.mean["A_4x4"][1].flatten().numpy()
    stddev = posterior.stddev["A_4x4"][1].flatten().numpy()
    assert list(table.index) == [f"A_4x4[{r}, {i}]" for r in range(2) for i in range(4)]
    assert (np.abs(table["mean"].astype(float) - mean) < 4.5 * stddev / DRAWS**0.5).all()
    np.testing.assert_allclose(table["sd"].astype(float), stddev, rtol=0.2)


# ---- what the draws predict


@pytest.fixture
def examples(tones_folder, tiny_base) -> Examples:
    dataset = read_manifest(tones_folder / "train.jsonl")
    return Examples(dataset, tiny_base.feature_extractor, tiny_base.tokenizer)


def log_probs(net, examples, index) -> torch.Tensor:
    """Of every next token of an utterance, at its targets."""
    batch = examples.batch([index])
    with torch.no_grad():
        logits = net(
            input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
        ).logits
    return logits[batch.labels != IGNORED].log_softmax(-1)


def test_log_likelihoods_are_those_of_the_draws_beside_them(random_posterior, tiny_base, examples):
    posterior, net = random_posterior(0), tiny_base.net
    data = posterior.to_arviz(draws=3, seed=5, base=tiny_base, examples=examples)
    found = group_of(data, "log_likelihood")["tokens"]
    assert found.dims == ("chain", "draw", "utterance")
    assert found["utterance"].values.tolist() == examples.origins
    for draw in range(3):
        drawn = group_of(data, "posterior").isel(chain=0, draw=draw)
        factors = {name: torch.from_numpy(drawn[name].values) for name in posterior.mean}
        with posterior.applied(net, factors):
            for index, target in enumerate(examples.targets):
                chances = log_probs(net, examples, index)
                expected = chances[range(len(target)), target].sum().item()
                assert found[0, draw, index].item() == pytest.approx(expected, rel=1e-5)
    assert np.ptp(found.values, axis=1).min() > 0.01


def test_predicted_tokens_are_as_frequent_as_they_are_likely(random_posterior, tiny_base, examples):
    posterior = random_posterior(0, spread=1e-9)  # as good as one draw
    data = posterior.to_arviz(draws=200, base=tiny_base, examples=examples)
    tokens = group_of(data, "posterior_predictive")["tokens"]
    observed = group_of(data, "observed_data")["tokens"]
    assert tokens.dims == ("chain", "draw", "utterance", "position")
    assert observed.dims == ("utterance", "position")
    longest = max(map(len, examples.targets))
    padded = [[*one, *[IGNORED] * (longest - len(one))] for one in examples.targets]
    assert observed.values.tolist() == padded
    assert ((tokens == IGNORED) == (observed == IGNORED)).all()
    expected, variance, hits = 0.0, 0.0, 0
    with posterior.applied(tiny_base.net):
        for index in range(len(examples)):
            chances, top = log_probs(tiny_base.net, examples, index).exp().max(-1)
            expected += 200 * chances.sum().item()
            variance += 200 * (chances * (1 - chances)).sum().item()
            hits += int((tokens.values[0, :, index, : len(top)] == top.numpy()).sum())
    assert abs(hits - expected) < 4 * variance**0.5
    assert 4 * variance**0.5 < 0.5 * expected


def test_arviz_compares_posteriors_of_one_data_set(random_posterior, tiny_base, examples):
    arviz = import_arviz()
    found = {
        name: random_posterior(0, spread=spread).to_arviz(
            draws=60, sites=["A_32x16"], base=tiny_base, examples=examples
        )
        for name, spread in (("narrow", 0.01), ("wide", 1.0))
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of k-hats, and of what changes in ArviZ
        elpd = {name: arviz.loo(data) for name, data in found.items()}
        table = arviz.compare(found)
    scores = group_of(found["narrow"], "log_likelihood")["tokens"].values[0]
    ours = leave_one_out(scores, 1.0, tokens=1)
    theirs = elpd["narrow"]
    assert theirs.se == pytest.approx(ours.se, rel=1e-6)
    assert (getattr(theirs, "elpd", None) or theirs.elpd_loo) == pytest.approx(ours.elpd)
    assert list(table.index) == ["narrow", "wide"]


def test_a_base_without_examples_is_refused(posterior, tiny_base):
    with pytest.raises(UserError, match="base and examples belong together; give both"):
        posterior.to_arviz(draws=1, base=tiny_base)


# ---- k-hat


def pareto_ratios(k: float, count: int, seed: int) -> np.ndarray:
    """Logarithms of ratios from a generalised Pareto distribution of shape k and scale 1."""
    u = np.random.default_rng(seed).random(count)
    return np.log(np.expm1(-k * np.log(u)) / k)


@pytest.mark.parametrize("k", [0.3, 0.5, 0.7, 1.0])
def test_khat_is_the_shape_of_pareto_ratios(k):
    found = [pareto_khat(pareto_ratios(k, 20_000, seed)) for seed in range(6)]
    assert abs(np.mean(found) - k) < 0.1
    assert np.std(found) < 0.15


def test_khat_tells_a_light_tail_from_a_heavy_one():
    x = np.random.default_rng(2).standard_normal(4000)
    # q is N(0, 1): p narrower, and p wider, whose ratios have no variance
    narrow, wide = (-(x**2) / 2 * (1 / s**2 - 1) for s in (0.8, 3.0))
    assert pareto_khat(narrow) < 0.2
    assert pareto_khat(wide) > 0.5


def test_khat_asks_neither_for_a_constant_nor_for_an_order():
    ratios = pareto_ratios(0.6, 500, seed=3)
    khat = pareto_khat(ratios)
    assert pareto_khat(ratios + 1000) == pytest.approx(khat, abs=1e-6)
    assert pareto_khat(np.random.default_rng(0).permutation(ratios)) == pytest.approx(khat)


def test_khat_takes_ratios_of_a_thousand_nats():
    ratios = 300 * np.random.default_rng(5).standard_normal(50)
    assert 5 < pareto_khat(ratios) < math.inf


@pytest.mark.parametrize(
    "ratios",
    [[], np.arange(29.0), np.zeros(50), [1e5, *[0.0] * 49]],
    ids=["none", "29", "equal", "one far above"],
)
def test_khat_is_infinite_where_there_is_no_tail_to_fit(ratios):
    assert pareto_khat(np.array(ratios)) == math.inf
