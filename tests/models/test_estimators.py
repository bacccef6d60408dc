import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.nn.functional import cross_entropy, linear, softplus

from blora_pyro.adapters import Adapters, group_by_shape, projections
from blora_pyro.data import IGNORED, Batch, Examples, read_manifest
from blora_pyro.errors import UserError
from blora_pyro.fitting.svi import fit_guide
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import (
    ESTIMATORS,
    BLoRA,
    FactorPrior,
    Temper,
    WhisperLikelihood,
    build_estimator,
)
from blora_pyro.options import FittingOptions

NAMES = pytest.mark.parametrize("name", ESTIMATORS)
NOISY = pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "shared"])
PER_TOKEN = ("flipout-token", "local")
FAMILIES = {name: (name,) for name in ("normal", "a-only", "horseshoe", "learned-scale")}
FAMILIES["auto-normal"] = ("normal", "auto-normal")
GUIDES = pytest.mark.parametrize("guide", FAMILIES.values(), ids=FAMILIES.keys())


def z_scores(samples, expected):
    """Distance of the mean over the first dimension from `expected`, in standard errors."""
    samples = samples.double()
    error = samples.std(0) / math.sqrt(len(samples))
    assert (error > 0).all()
    return (samples.mean(0) - expected) / error


def mean_and_variance(x, mean, sigma):
    """Of x wᵀ for independent weights, exactly; mean and sigma (out, in)."""
    x, mean, sigma = x.double(), mean.double(), sigma.double()
    return x @ mean.mT, x.square() @ sigma.square().mT


# ---- one factor: the moments of every output, and who shares its noise with whom

COPIES, UTTERANCES, TOKENS, IN, OUT = 2000, 2, 3, 4, 3


@pytest.fixture
def factor():
    """Inputs (utterances, tokens, in), mean and standard deviation (out, in)."""
    x = torch.randn(UTTERANCES, TOKENS, IN)
    return x, torch.randn(OUT, IN), 0.2 + torch.rand(OUT, IN)


def outputs(name, x, mean, sigma, copies=COPIES):
    """What independent draws of one factor make of x: (copies, utterances, tokens, out)."""
    normal = dist.Normal(mean, sigma).expand((copies, *mean.shape)).to_event(2)
    with build_estimator(name):
        with pyro.plate("copies", copies):
            draw = pyro.sample("w", normal)
        maps = projections(draw)
    return torch.stack([project(x) for project in maps])


@NAMES
def test_every_output_has_the_mean_and_variance_of_the_factor(name, factor):
    mean, variance = mean_and_variance(*factor)
    y = outputs(name, *factor)
    assert z_scores(y, mean).abs().max() < 4.5
    assert z_scores((y - mean).square(), variance).abs().max() < 4.5


def covariances(y, x, mean):
    """Products of the noise of two outputs: (copies, pairs of positions, out)."""
    noise = (y.double() - mean_and_variance(x, mean, mean)[0]).flatten(1, 2)
    i, j = torch.triu_indices(noise.shape[1], noise.shape[1], 1)
    return noise[:, i] * noise[:, j], i // TOKENS == j // TOKENS


@NAMES
def test_noise_is_shared_by_the_batch_the_utterance_or_no_one(name, factor):
    x, mean, sigma = factor
    products, same_utterance = covariances(outputs(name, *factor), x, mean)
    flat = x.double().flatten(0, 1)
    gram = torch.einsum("pi,oi,qi->pqo", flat, sigma.double().square(), flat)
    i, j = torch.triu_indices(len(flat), len(flat), 1)
    one_draw = gram[i, j]
    assert one_draw.abs().max() > 1
    shares = {"shared": torch.ones_like(same_utterance), "flipout": same_utterance}.get(
        name, torch.zeros_like(same_utterance)
    )
    assert z_scores(products, one_draw * shares[:, None]).abs().max() < 4.5


@NAMES
def test_equal_inputs_get_equal_outputs_only_where_the_draw_is_shared(name, factor):
    _, mean, sigma = factor
    x = torch.randn(IN).expand(UTTERANCES, TOKENS, IN)
    y = outputs(name, x, mean, sigma, copies=20)
    across_tokens = (y - y[:, :, :1]).abs().amax((0, 2, 3))[1:]
    across_utterances = (y[:, 1] - y[:, 0]).abs().amax((0, 2))
    if name in PER_TOKEN:
        assert across_tokens.min() > 0.1
    else:
        assert across_tokens.max() < 1e-5
    if name == "shared":
        assert across_utterances.max() < 1e-5
    else:
        assert across_utterances.min() > 0.1
    sizes = (y - x @ mean.mT).abs().flatten(1, 2)  # other weights, not the other sign alone
    other = (sizes[:, -1] - sizes[:, 0]).abs().mean()
    assert other < 1e-5 if name == "shared" else other > 0.1


@NAMES
def test_rows_of_a_matrix_are_utterances_of_one_token(name, factor):
    _, mean, sigma = factor
    x = torch.randn(2, IN)
    y = outputs(name, x, mean, sigma)
    assert y.shape == (COPIES, 2, OUT)
    expected, variance = mean_and_variance(x, mean, sigma)
    assert z_scores((y - expected).square(), variance).abs().max() < 4.5
    noise = (y - expected).double()
    together = (x[0] * x[1] * sigma.square()).sum(1) if name == "shared" else 0.0
    assert z_scores(noise[:, 0] * noise[:, 1], together).abs().max() < 4.5


@NAMES
def test_inputs_of_more_dimensions_keep_their_shape(name, factor):
    _, mean, sigma = factor
    x = torch.randn(1, IN).expand(2, 2, 2, IN)
    y = outputs(name, x, mean, sigma, copies=5)
    assert y.shape == (5, 2, 2, 2, OUT)
    within = (y - y[:, :, :1, :1]).abs().max()
    assert within > 0.1 if name in PER_TOKEN else within < 1e-5


@NOISY
def test_a_factor_without_noise_is_projected_as_ever(name, factor):
    x, mean, _ = factor
    with build_estimator(name):
        point = pyro.sample("point", dist.Delta(mean[None], event_dim=3))
        heavy = pyro.sample("heavy", dist.StudentT(5.0, mean[None]).to_event(3))
        data = pyro.sample("data", dist.Normal(0.0, 1.0).expand((1, OUT, IN)), obs=mean[None] + 1)
        unseen = torch.randn(1, OUT, IN)
        for factor in (point, heavy, data, unseen):
            (project,) = projections(factor)
            assert torch.equal(project(x), linear(x, factor[0]))


@NOISY
def test_the_inputs_of_a_factor_of_zero_width_come_out_as_its_mean(name, factor):
    x, mean, sigma = factor
    y = outputs(name, x, mean, 1e-20 * sigma, copies=2)
    torch.testing.assert_close(y, (x @ mean.mT).expand_as(y))
    nothing = outputs(name, torch.zeros_like(x), mean, sigma, copies=2)
    assert nothing.abs().max() < 1e-15


@NOISY
def test_zero_inputs_have_finite_gradients(name, factor):
    x, mean, sigma = (value.clone().requires_grad_() for value in factor)
    with torch.no_grad():
        x[0] = 0
    outputs(name, x, mean, sigma, copies=2).square().sum().backward()
    for value in (x, mean, sigma):
        assert value.grad.isfinite().all()
        assert value.grad.abs().max() > 0


# ---- a regression in which nothing mixes tokens: expected loss and gradient are known exactly

LAYERS, RANK, ALPHA, NOISE, SCALE = 40, 2, 3.0, 0.7, 0.4


class Regression(FactorPrior):
    """y ~ N(x (W0 + s B A)ᵀ, NOISE²), once for every layer: LAYERS independent copies of it all."""

    def __init__(self, net, prior):
        self.net = net.requires_grad_(False)
        self.adapters = Adapters(net, group_by_shape(dict(net.named_children()), RANK), ALPHA)
        super().__init__(self.adapters.groups, prior, torch.device("cpu"))

    def __call__(self, x, y):
        self.adapters.put(self.draw())
        means = torch.stack([layer(x) for layer in self.net.values()])
        pyro.sample("y", dist.Normal(means, NOISE).to_event(means.dim()), obs=y.expand_as(means))


@pytest.fixture
def regression():
    """Model, guide with the same numbers for every layer, x (2, 3, in) and y (2, 3, out)."""
    layer = nn.Linear(IN, OUT)
    net = nn.ModuleDict({f"layer{i:02d}": copy.deepcopy(layer) for i in range(LAYERS)})
    model = Regression(net, build_prior("normal", scale=SCALE))
    guide = build_guide("normal", model)
    with torch.no_grad():
        for name, mean in guide.means.items():
            mean.copy_(0.5 * torch.randn(mean.shape[1:]))
            guide.rhos[name].copy_(0.6 * torch.randn(mean.shape[1:]) - 0.7)
    return model, guide, torch.randn(2, 3, IN), torch.randn(2, 3, OUT)


def exact_loss(model, guide, x, y):
    """E_q[-log p(y | A, B)] + KL(q || p) of one layer, and its gradients, in closed form."""
    (group,) = model.groups
    leaves = {
        name: value[0].detach().double().requires_grad_()
        for name, value in guide.named_parameters()
    }
    (mean_a, mean_b), (var_a, var_b) = (
        [leaves[f"{part}.{site.name}"] for site in group.sites] for part in ("means", "rhos")
    )
    var_a, var_b = softplus(var_a).square(), softplus(var_b).square()
    s, layer, x = ALPHA / RANK, next(iter(model.net.values())), x.double()
    z, var_z = x @ mean_a.mT, x.square() @ var_a.mT
    mean = x @ layer.weight.double().mT + layer.bias.double() + s * z @ mean_b.mT
    variance = s**2 * (z.square() @ var_b.mT + var_z @ (mean_b.square() + var_b).mT)
    nll = ((y - mean).square() + variance) / (2 * NOISE**2) + math.log(NOISE * (2 * math.pi) ** 0.5)
    loss = nll.sum()
    for m, v in ((mean_a, var_a), (mean_b, var_b)):
        loss = loss + ((v + m.square()) / SCALE**2 - 1 - (v / SCALE**2).log()).sum() / 2
    loss.backward()
    return loss.item(), {name: leaf.grad for name, leaf in leaves.items()}


@NAMES
def test_expected_loss_and_gradient_are_the_exact_ones(name, regression):
    model, guide, x, y = regression
    loss, gradients = exact_loss(*regression)
    losses, samples = [], {key: [] for key in gradients}
    for _ in range(30):
        guide.zero_grad()
        with build_estimator(name):
            drawn = TraceMeanField_ELBO().differentiable_loss(model, guide, x, y)
        drawn.backward()
        losses.append(drawn.item() / LAYERS)
        for key, parameter in guide.named_parameters():
            samples[key].append(parameter.grad.clone())  # of every layer: as many samples
    losses = torch.tensor(losses)
    assert z_scores(losses, loss).abs() < 4
    assert losses.std() / len(losses) ** 0.5 < 0.03 * loss  # a check worth its name
    for key, expected in gradients.items():
        assert z_scores(torch.cat(samples[key]), expected).abs().max() < 4.5, key


# ---- Whisper


@pytest.fixture
def whisper(net, batch):
    """Builds a program and its guide, away from the start; `noise` is rho, where there is one."""

    def build(family="normal", guide=None, noise=-2.0, **options):
        model = BLoRA(net, build_prior(family), rank=2, alpha=4.0, **options)
        built = build_guide(guide or family, model)
        built(batch)  # Pyro's own make their parameters here
        pyro.clear_param_store()
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if name.startswith("rhos."):
                    parameter.fill_(noise)
                else:
                    parameter += 0.1 * torch.randn_like(parameter)
        return model, built

    return build


def loss_of(name, model, guide, batch, beta=0.0, elbo=TraceMeanField_ELBO):
    temper = Temper(beta)
    with build_estimator(name):
        return elbo().differentiable_loss(temper(model), temper(guide), batch)


def step_of(name, model, guide, batch, beta=0.0, seed=5):
    """Loss and gradients, always with the same draw."""
    pyro.set_rng_seed(seed)
    guide.zero_grad()
    loss = loss_of(name, model, guide, batch, beta)
    loss.backward()
    return loss.item(), {key: parameter.grad for key, parameter in guide.named_parameters()}


@torch.no_grad()
def losses(name, model, guide, batch, count):
    return torch.tensor([loss_of(name, model, guide, batch).item() for _ in range(count)])


def test_expected_loss_is_that_of_shared_or_less_where_noise_is_by_token(whisper, batch):
    """Targets are what the mean says, so that noise of any kind costs."""
    model, guide = whisper()
    logits = poutine.condition(model, data=guide.mean())(batch)
    likely = torch.where(batch.labels == IGNORED, IGNORED, logits.argmax(-1))
    batch = Batch(batch.input_features, batch.decoder_input_ids, likely)
    noiseless = cross_entropy(logits.flatten(0, 1), likely.flatten(), ignore_index=IGNORED)

    costs, errors = {}, {}
    for name, count in (("shared", 60), ("flipout", 30), ("flipout-token", 15), ("local", 15)):
        drawn = losses(name, model, guide, batch, count) - noiseless
        costs[name], errors[name] = drawn.mean(), drawn.std() / math.sqrt(count)
    assert costs["shared"] > 10 * errors["shared"]
    difference = costs["flipout"] - costs["shared"]
    assert abs(difference) < 4 * math.hypot(errors["shared"], errors["flipout"])
    for name in PER_TOKEN:  # attention averages some of the noise out
        assert 0.5 * costs["shared"] < costs[name] < costs["shared"]


@NAMES
def test_equal_utterances_get_equal_logits_only_under_shared(name, whisper, batch):
    model, guide = whisper()
    twice = Batch(
        batch.input_features[:1].repeat(2, 1, 1),
        batch.decoder_input_ids[:1].repeat(2, 1),
        batch.labels[:1].repeat(2, 1),
    )
    with torch.no_grad(), build_estimator(name):
        logits = poutine.replay(model, trace=poutine.trace(guide).get_trace(twice))(twice)
    difference = (logits[0] - logits[1]).abs().max()
    assert difference < 1e-4 if name == "shared" else difference > 0.1


@NAMES
def test_the_tokens_of_an_utterance_share_their_weights_unless_noise_is_by_token(
    name, whisper, batch
):
    """Under one draw the update of all 50 positions is one map of rank 2 of their inputs."""
    model, guide = whisper(target_modules="encoder.layers.0.fc1")
    seen = []
    layer = model.net.get_submodule(model.groups[0].modules[0])
    layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        loss_of(name, model, guide, batch)
    ((x, y),) = seen
    updates = (y - x @ layer.weight.mT - layer.bias).double()
    ranks = [torch.linalg.matrix_rank(update, rtol=1e-3).item() for update in updates]
    of_all = torch.linalg.matrix_rank(updates.flatten(0, 1), rtol=1e-3)
    if name in PER_TOKEN:
        assert min(ranks) > 10
    else:
        assert ranks == [2, 2, 2]
        assert of_all == 2 if name == "shared" else of_all > 2


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@NAMES
def test_gradient_checkpointing_redraws_the_same_noise(name, whisper, batch):
    model, guide = whisper()
    calls = []
    model.net.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: calls.append(1))
    # Else it is off. Dropout is 0; old versions of transformers draw a number for layerdrop of 0.
    model.net.model.train()
    loss, plain = step_of(name, model, guide, batch)
    model.net.gradient_checkpointing_enable({"use_reentrant": False})
    again, checkpointed = step_of(name, model, guide, batch)
    assert len(calls) == 3  # forward, and once more in backward
    assert again == pytest.approx(loss, rel=1e-6)
    for key, gradient in plain.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(checkpointed[key], gradient)


@NOISY
def test_a_point_has_no_noise(name, whisper, batch):
    model, guide = whisper(guide="point")
    expected, shared = step_of("shared", model, guide, batch, beta=1e-3)
    loss, gradients = step_of(name, model, guide, batch, beta=1e-3)
    assert loss == expected
    assert all(torch.equal(gradients[key], gradient) for key, gradient in shared.items())


@NOISY
def test_the_point_b_of_a_only_has_no_noise_and_its_a_has(name, whisper, batch):
    model, guide = whisper("a-only")
    for group in model.groups:
        with torch.no_grad(), build_estimator(name):
            draws = guide(batch)
            for site in group.sites:
                draw = draws[site.name]
                x = torch.randn(2, 3, draw.shape[-1])
                plain = [
                    torch.equal(f(x), linear(x, w))
                    for f, w in zip(projections(draw), draw, strict=True)
                ]
                assert plain == [site.factor == "B"] * len(draw)


@NOISY
@GUIDES
def test_the_noise_of_every_guide_is_answered(guide, name, whisper, batch):
    """With the factors given, what is random is the handler's."""
    model, guide = whisper(*guide)
    pyro.set_rng_seed(3)
    with torch.no_grad(), build_estimator(name):
        traced = poutine.trace(guide).get_trace(batch)
        first, second = (poutine.replay(model, trace=traced)(batch) for _ in range(2))
    assert not torch.equal(first, second)


@NOISY
@GUIDES
def test_every_parameter_gets_the_gradient_it_gets_under_shared(guide, name, whisper, batch):
    model, guide = whisper(*guide)
    for beta in (0.0, 1e-3):
        _, shared = step_of("shared", model, guide, batch, beta)
        reached = {k for k, g in shared.items() if g is not None and g.abs().max() > 0}
        loss, gradients = step_of(name, model, guide, batch, beta)
        assert math.isfinite(loss)
        for key, gradient in gradients.items():
            assert (gradient is None) == (shared[key] is None), key
            if key in reached:
                assert gradient.isfinite().all(), key
                assert gradient.abs().max() > 0, key
    assert reached == set(shared)  # with the KL, all


@NOISY
@pytest.mark.parametrize(
    ("guide", "elbo"),
    [*((guide, TraceMeanField_ELBO) for guide in FAMILIES), ("normal", Trace_ELBO)],
)
def test_the_kl_is_that_of_shared(guide, elbo, name, whisper, batch):
    model, guide = whisper(*FAMILIES[guide])
    kl = {}
    for estimator in ("shared", name):
        with_kl, without = (
            _seeded_loss(estimator, model, guide, batch, beta, elbo) for beta in (1.0, 0.0)
        )
        kl[estimator] = with_kl - without
    assert abs(kl["shared"]) > 100
    assert kl[name] == pytest.approx(kl["shared"], rel=1e-5)


@torch.no_grad()
def _seeded_loss(name, model, guide, batch, beta, elbo):
    pyro.set_rng_seed(7)
    return loss_of(name, model, guide, batch, beta, elbo).item()


@NOISY
def test_one_handler_serves_step_after_step(name, whisper, batch):
    model, guide = whisper()
    pyro.set_rng_seed(1)
    fresh = [loss_of(name, model, guide, batch).item() for _ in range(3)]
    handler, temper = build_estimator(name), Temper(0.0)
    pyro.set_rng_seed(1)
    reused = []
    for _ in range(3):
        with handler:
            loss = TraceMeanField_ELBO().differentiable_loss(temper(model), temper(guide), batch)
        reused.append(loss.item())
    assert reused == fresh
    assert len(set(fresh)) == 3


@NOISY
def test_an_exception_inside_leaves_nothing_behind(name, whisper, batch):
    model, guide = whisper()
    before, _ = step_of("shared", model, guide, batch)
    handler = build_estimator(name)
    with pytest.raises(RuntimeError, match="inside"), handler:
        guide(batch)
        raise RuntimeError("inside")
    assert step_of("shared", model, guide, batch)[0] == before
    with handler:
        loss_of(name, model, guide, batch)


@NOISY
def test_several_particles_have_noise_of_their_own(name, whisper, batch):
    model, guide = whisper()
    temper = Temper(0.0)
    pyro.set_rng_seed(2)
    with build_estimator(name):
        both = TraceMeanField_ELBO(num_particles=2).differentiable_loss(
            temper(model), temper(guide), batch
        )
    pyro.set_rng_seed(2)
    single = [loss_of(name, model, guide, batch).item() for _ in range(2)]
    assert single[0] != single[1]
    assert both.item() == pytest.approx(sum(single) / 2, rel=1e-6)


@NAMES
def test_autocast_stays_near_float32_and_keeps_float32_gradients(name, whisper, batch):
    exact, guide = whisper(noise=-3.0)
    cast = copy.copy(exact)
    cast.likelihood = WhisperLikelihood(exact.net, autocast=torch.bfloat16)
    (fine_loss, fine), (loss, coarse) = (step_of(name, m, guide, batch) for m in (exact, cast))
    assert loss != fine_loss
    assert loss == pytest.approx(fine_loss, abs=0.05)
    for key, gradient in coarse.items():
        assert gradient.dtype == torch.float32
        assert (gradient - fine[key]).norm() < 0.2 * fine[key].norm(), key


# ---- by name


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match=r"'Shared'.*shared, flipout, flipout-token, local"):
        build_estimator("Shared")


@pytest.fixture
def examples(tones_folder, tiny_base) -> Examples:
    dataset = read_manifest(tones_folder / "train.jsonl")
    return Examples(dataset, tiny_base.feature_extractor, tiny_base.tokenizer)


def fit(net, examples, **options):
    pyro.set_rng_seed(0)
    model = BLoRA(net, build_prior("normal"), rank=2, alpha=4.0)
    settings = {"beta": 1e-4, "lr": 1e-2, "steps": 3, "batch_size": 2} | options
    guide = build_guide("normal", model)
    return [step.loss for step in fit_guide(model, guide, examples, FittingOptions(**settings))]


def test_a_fit_runs_with_each_estimator_and_its_own_noise(net, examples):
    losses = {name: fit(net, examples, estimator=name) for name in ESTIMATORS}
    assert all(len(steps) == 3 and all(map(math.isfinite, steps)) for steps in losses.values())
    assert len({steps[0] for steps in losses.values()}) == len(ESTIMATORS)
    assert losses["shared"] == fit(net, examples)
