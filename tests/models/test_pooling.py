import math
from dataclasses import replace

import pytest
import torch
from pyro import poutine
from torch.distributions import kl_divergence

from blora_pyro.adapters import RowMap
from blora_pyro.data import Batch
from blora_pyro.errors import UserError
from blora_pyro.families import DEPENDENT_ROWS, FAMILIES
from blora_pyro.fitting.objective import Objective, micro_batches
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import BLoRA, PooledBLoRA, Pooling, Shared

SCALE = 0.05
HIERARCHICAL, NONE = Pooling("hierarchical", ("a", "b"), 0.5), Pooling("none", ("a", "b"))
BOTH = pytest.mark.parametrize("pooling", [HIERARCHICAL, NONE], ids=lambda one: one.kind)
OPTIONS = {"rank": 2, "target_modules": "q_proj,fc1,fc2"}


def pooled(net, pooling, family="normal", guide=None):
    """The program of `pooling`, and its guide, as a fit begins with them."""
    model = PooledBLoRA(net, build_prior(family), pooling, **OPTIONS)
    started = build_guide(guide or family, model)
    pooling.start(started)
    return model, started


def drawn(model, scale=0.3):
    """Factors of all rows, large enough to be seen in the logits."""
    return {site.name: scale * torch.randn(site.shape) for site in model.sites}


def logits(model, factors, batch):
    with torch.no_grad():
        return poutine.condition(model, data=factors)(batch)


def rows_of(batch, rows):
    """Some utterances of a batch."""
    rows = torch.tensor(rows)
    columns = (batch.input_features, batch.decoder_input_ids, batch.labels)
    sources = None if batch.sources is None else batch.sources[rows]
    return Batch(*(column[rows] for column in columns), sources=sources)


@pytest.fixture
def mixed(batch):
    """Utterances of domains b, a, b."""
    return replace(batch, sources=torch.tensor([1, 0, 1]))


# ---- the equation


def test_a_domain_is_the_shared_factor_and_its_deviations():
    stacked = torch.tensor([[[1.0]], [[2.0]], [[10.0]], [[20.0]], [[100.0]], [[200.0]]])
    found = HIERARCHICAL.factors(stacked, torch.tensor([1, 0]))  # two modules, shared, a, b
    assert found.flatten().tolist() == [1 + 50, 2 + 100, 1 + 5, 2 + 10]
    assert HIERARCHICAL.shared(stacked).flatten().tolist() == [1, 2]


def test_without_pooling_a_domain_has_rows_of_its_own():
    stacked = torch.arange(4.0).reshape(4, 1, 1)
    assert NONE.factors(stacked, torch.tensor([1, 0])).flatten().tolist() == [2, 3, 0, 1]
    with pytest.raises(UserError, match=r"domains \(a, b\) has an adapter of its own.*--domain"):
        NONE.shared(stacked)


@BOTH
def test_stacked_groups_name_every_row_and_can_be_taken_apart(net, pooling):
    plain = BLoRA(net, build_prior("normal"), **OPTIONS).groups
    stacked = pooling.stack(plain)
    assert pooling.unstack(stacked) == plain
    names = stacked[0].modules
    assert len(names) == len(set(names)) == pooling.parts * len(plain[0].modules)
    assert names[-1] == f"{plain[0].modules[-1]}@b"
    assert (names[0] == plain[0].modules[0]) is pooling.is_shared


def test_there_are_no_more_sites_than_without_domains(net, batch):
    model, guide = pooled(net, HIERARCHICAL)
    plain = BLoRA(net, build_prior("normal"), **OPTIONS)
    assert [site.name for site in model.sites] == [site.name for site in plain.sites]
    assert model.num_weights == 3 * plain.num_weights
    assert guide(batch).keys() == {site.name for site in model.sites}


def test_a_row_map_multiplies_every_utterance_by_its_own_factor():
    weights, rows, x = torch.randn(2, 3, 4), torch.tensor([1, 0, 1]), torch.randn(3, 5, 4)
    expected = torch.stack([x[i] @ weights[row].T for i, row in enumerate(rows)])
    torch.testing.assert_close(RowMap(weights, rows)(x), expected)


# ---- batches


@BOTH
def test_every_utterance_of_a_batch_is_computed_with_its_domains_factors(net, mixed, pooling):
    model, _ = pooled(net, pooling)
    factors = drawn(model)
    together = logits(model, factors, mixed)
    plain = BLoRA(net, build_prior("normal"), **OPTIONS)
    model.adapters.remove()
    for row, place in enumerate(mixed.sources.tolist()):
        own = {name: pooling.factors(w, torch.tensor([place]))[0] for name, w in factors.items()}
        alone = logits(plain, own, rows_of(mixed, [row]))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[0], logits(plain, own, rows_of(mixed, [1]))[0], atol=0.1)


@BOTH
def test_a_batch_of_one_domain_takes_the_plain_way_to_the_same_place(net, mixed, pooling):
    model, _ = pooled(net, pooling)
    factors = drawn(model)
    together = logits(model, factors, mixed)
    one = logits(model, factors, rows_of(mixed, [0, 2]))
    assert not any(
        isinstance(m, RowMap) for pair in model.adapters._projections.values() for m in pair
    )
    torch.testing.assert_close(one, together[[0, 2]], rtol=1e-3, atol=1e-4)


def test_an_unknown_domain_gets_the_shared_part(net, batch, mixed):
    model, _ = pooled(net, HIERARCHICAL)
    factors = drawn(model)
    no_deviation = {name: w.clone() for name, w in factors.items()}
    for w in no_deviation.values():
        w[len(w) // 3 :] = 0
    torch.testing.assert_close(
        logits(model, factors, batch), logits(model, no_deviation, mixed), rtol=1e-3, atol=1e-4
    )
    model, _ = pooled(net, NONE)
    with pytest.raises(UserError, match="--domain"):
        logits(model, drawn(model), batch)


def test_parts_of_a_batch_know_their_domains(mixed):
    parts = micro_batches(mixed, 2)
    assert torch.cat([part.sources for part in parts]).tolist() == [1, 0, 1]


# ---- the objective


def gradients(model, guide, batch, beta, accumulation=1):
    """Loss and NLL; the gradients of the means by site."""
    torch.manual_seed(5)
    objective = Objective(model, guide, beta=beta, estimator=Shared(), accumulation=accumulation)
    loss, nll = objective.gradients(batch)
    return loss, nll, {name: p.grad.clone() for name, p in guide.named_parameters()}


@BOTH
@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in DEPENDENT_ROWS])
def test_every_family_that_is_allowed_has_a_gradient(net, mixed, pooling, family):
    model, guide = pooled(net, pooling, family)
    loss, _, found = gradients(model, guide, mixed, 1e-3)
    assert math.isfinite(loss)
    assert all(grad.isfinite().all() for grad in found.values())


@BOTH
def test_a_batch_in_parts_has_the_same_gradient(net, mixed, pooling):
    model, guide = pooled(net, pooling)
    whole, parts = (gradients(model, guide, mixed, 1e-3, count) for count in (1, 3))
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)
    for name, grad in whole[2].items():
        torch.testing.assert_close(parts[2][name], grad, rtol=1e-3, atol=1e-5)


@BOTH
def test_the_kl_counts_every_row_once(net, mixed, pooling):
    model, guide = pooled(net, pooling)
    loss, nll, _ = gradients(model, guide, mixed, 0.01)
    total = 0.0
    for name, mean in guide.mean().items():
        sigma = guide.stddev()[name]
        total += (
            ((SCALE / sigma).log() + (sigma**2 + mean**2) / (2 * SCALE**2) - 0.5).double().sum()
        )
    assert (loss - nll) / 0.01 == pytest.approx(float(total), rel=1e-4)


def test_a_deviation_of_tau_has_the_kl_of_a_normal_as_narrow():
    """The non-centred form: KL(q(z) || N(0, s²)) is that of tau z against N(0, (tau s)²)."""
    mean, sigma, tau = torch.tensor(0.03), torch.tensor(0.01), 0.2
    normal = torch.distributions.Normal
    torch.testing.assert_close(
        kl_divergence(normal(mean, sigma), normal(0.0, SCALE)),
        kl_divergence(normal(tau * mean, tau * sigma), normal(0.0, tau * SCALE)),
    )


def test_hierarchical_begins_without_deviations(net):
    _, guide = pooled(net, HIERARCHICAL)
    for name, mean in guide.mean().items():
        shared, *deviations = mean.unflatten(0, (3, -1))
        assert not any(part.any() for part in deviations)
        assert shared.any() == (name[0] == "A")


def test_without_width_hierarchical_is_complete(net, mixed):
    """As points, so without noise: some steps of Adam end in the same shared factors."""
    narrow = replace(HIERARCHICAL, scale=1e-7)
    model, guide = pooled(net, narrow, guide="point")
    plain = BLoRA(net, build_prior("normal"), **OPTIONS)
    complete = build_guide("point", plain)
    with torch.no_grad():
        for name, mean in complete.means.items():
            mean.copy_(narrow.shared(guide.means[name]))
    ends = []
    for program, its in ((model, guide), (plain, complete)):
        optimizer = torch.optim.Adam(its.parameters(), lr=0.01)
        other = plain if program is model else model
        for _ in range(3):
            other.adapters.clear()
            gradients(program, its, mixed, 1e-4)
            optimizer.step()
        program.adapters.clear()
        ends.append(its.mean())
    for name, mean in ends[1].items():
        torch.testing.assert_close(narrow.shared(ends[0][name]), mean, rtol=1e-3, atol=1e-4)
        of_b = narrow.factors(ends[0][name], torch.tensor([1]))[0]
        torch.testing.assert_close(of_b, mean, rtol=1e-3, atol=1e-4)


def test_no_pooling_has_the_gradient_of_separate_fits(net, mixed):
    """Of beta = T / N_d each, at its share N_d / N of the tokens, under the same noise."""
    model, guide = pooled(net, NONE)
    noise = {site.name: torch.randn(site.shape) for site in model.sites}
    temperature = 0.5

    def gradient(program, its, batch, noise):
        """Reparameterised by hand: w = mean + sigma noise."""
        sigma = {name: torch.nn.functional.softplus(rho) for name, rho in its.rhos.items()}
        draws = {name: its.means[name] + sigma[name] * noise[name] for name in noise}
        log_likelihood = (
            poutine.trace(poutine.condition(program, data=draws)).get_trace(batch).nodes["tokens"]
        )
        kl = sum(
            kl_divergence(its.distribution(site), program.prior(site)).sum()
            for site in program.sites
        )
        nll = -log_likelihood["fn"].log_prob(log_likelihood["value"])[batch.labels >= 0].mean()
        loss = nll + temperature / batch.num_tokens * kl
        program.adapters.clear()
        return torch.autograd.grad(loss, list(its.parameters()))

    whole = gradient(model, guide, mixed, noise)
    model.adapters.remove()
    for place, chosen in enumerate(([1], [0, 2])):
        own = slice(place, place + 1)
        plain = BLoRA(net, build_prior("normal"), **OPTIONS)
        alone = build_guide("normal", plain)
        alone.load_state_dict(
            {k: v.unflatten(0, (2, -1))[place] for k, v in guide.state_dict().items()}
        )
        part = rows_of(mixed, chosen)
        its_noise = {name: w.unflatten(0, (2, -1))[place] for name, w in noise.items()}
        share = part.num_tokens / mixed.num_tokens
        for found, expected in zip(whole, gradient(plain, alone, part, its_noise), strict=True):
            its_rows = found.unflatten(0, (2, -1))[own][0]
            torch.testing.assert_close(its_rows, share * expected, rtol=1e-3, atol=1e-5)
        plain.adapters.remove()


# ---- partial pooling


def test_a_domain_with_little_data_shrinks_towards_the_others(net):
    """y ~ Normal(w_d, 1) for one weight: the means of q are those of the exact posterior."""
    tau, scale = 0.5, 2.0
    pooling = Pooling("hierarchical", ("a", "b"), tau)
    y = {"a": torch.full((40,), 1.0), "b": torch.full((2,), 3.0)}
    mean, rho = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([mean, rho], max_iter=200, line_search_fn="strong_wolfe")
    normal = torch.distributions.Normal

    def moments(domain):
        parts = mean.reshape(3, 1, 1), rho.exp().reshape(3, 1, 1)
        return [moment.squeeze() for moment in pooling.moments(*parts, domain)]

    def loss():
        optimizer.zero_grad()
        total = kl_divergence(normal(mean, rho.exp()), normal(0.0, scale)).sum()
        for domain, values in y.items():
            centre, spread = moments(domain)
            total = total + 0.5 * ((values - centre) ** 2 + spread**2).sum()
        total.backward()
        return total

    optimizer.step(loss)
    design = torch.tensor([[1.0, tau, 0.0]] * 40 + [[1.0, 0.0, tau]] * 2)
    precision = design.T @ design + torch.eye(3) / scale**2
    exact = torch.linalg.solve(precision, design.T @ torch.cat([y["a"], y["b"]]))
    torch.testing.assert_close(mean.detach(), exact, rtol=1e-3, atol=1e-3)
    found = {domain: float(moments(domain)[0].detach()) for domain in y}
    shared = float(mean[0].detach())
    assert found["a"] < shared < found["b"] < 3
    pulled = {
        "a": 1 - (found["a"] - shared) / (1 - shared),
        "b": 1 - (found["b"] - shared) / (3 - shared),
    }
    assert 0 < pulled["a"] < 0.2 < pulled["b"]
