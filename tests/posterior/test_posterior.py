import copy
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

import blora_pyro
from blora_pyro.adapters import Group, find_targets, group_by_shape
from blora_pyro.errors import UserError
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import BLoRA
from blora_pyro.posterior import Family, Posterior
from blora_pyro.posterior.storage import POSTERIOR_FILE

TARGETS = {
    "all-linear": "all-linear",
    "decoder q and v": r".*\.decoder\..*\.(q_proj|v_proj)",
}


def posterior_of(net, target_modules="all-linear", rank=2, alpha=5.0) -> Posterior:
    """A posterior of random moments, none of them zero; alpha / rank is no integer."""
    groups = group_by_shape(find_targets(net, target_modules), rank)
    generator = torch.Generator().manual_seed(3)
    sites = [site for group in groups for site in group.sites]
    mean = {s.name: 0.3 * torch.randn(s.shape, generator=generator) for s in sites}
    stddev = {s.name: 0.01 + 0.1 * torch.rand(s.shape, generator=generator) for s in sites}
    return Posterior("tiny", groups, alpha, mean, stddev)


@pytest.fixture(params=TARGETS.values(), ids=TARGETS.keys())
def posterior(request, net) -> Posterior:
    return posterior_of(net, request.param)


@torch.no_grad()
def logits(net, batch) -> torch.Tensor:
    return net(
        input_features=batch.input_features,
        decoder_input_ids=batch.decoder_input_ids,
        use_cache=False,
    ).logits


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


# ---- export: three ways to the same logits


# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_stock_peft_computes_the_logits_of_the_posterior_mean(net, batch, posterior, tmp_path):
    posterior.save(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path)).eval()
    with posterior.applied(net):
        ours = logits(net, batch)
    torch.testing.assert_close(logits(stock, batch), ours, atol=1e-5, rtol=0)
    assert (ours - logits(net, batch)).abs().max() > 1e-2  # it does something


def test_transformers_load_adapter_computes_the_logits_of_the_posterior_mean(
    net, batch, posterior, tmp_path
):
    posterior.save(tmp_path)
    theirs = copy.deepcopy(net)
    theirs.load_adapter(str(tmp_path))
    with posterior.applied(net):
        ours = logits(net, batch)
    torch.testing.assert_close(logits(theirs.eval(), batch), ours, atol=1e-5, rtol=0)


def test_merging_gives_the_logits_of_the_posterior_mean(net, batch, posterior):
    merged = copy.deepcopy(net)
    posterior.merge(merged)
    with posterior.applied(net):
        ours = logits(net, batch)
    torch.testing.assert_close(logits(merged, batch), ours, atol=1e-5, rtol=0)
    assert hooks(merged) == 0


def test_merging_adds_the_delta_weights_and_touches_nothing_else(net, posterior):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    posterior.merge(net)
    deltas = {f"{name}.weight": delta for name, delta in posterior.delta_weights()}
    for name, value in net.state_dict().items():
        expected = before[name] + deltas[name] if name in deltas else before[name]
        assert torch.equal(value, expected), name


def test_the_adapter_holds_one_factor_a_layer_and_names_its_base(net, posterior, tmp_path):
    posterior.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    layers = [name for name, _, _ in posterior.layer_means()]
    assert config["peft_type"] == "LORA"
    assert config["task_type"] is None
    assert config["base_model_name_or_path"] == "tiny"
    assert config["revision"] is None
    assert config["r"] == 2
    assert config["lora_alpha"] == 5.0
    assert sorted(config["target_modules"]) == sorted(layers)
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == sorted(
        f"base_model.model.{name}.lora_{factor}.weight" for name in layers for factor in "AB"
    )


def test_the_revision_of_the_base_is_kept(posterior, tmp_path):
    replace(posterior, revision="v1").save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v1"
    assert Posterior.load(tmp_path).revision == "v1"


# ---- save and load


def test_save_and_load_return_every_bit(posterior, tmp_path):
    posterior.save(tmp_path / "new" / "run")
    loaded = Posterior.load(tmp_path / "new" / "run")
    assert (loaded.base, loaded.groups, loaded.alpha) == (
        posterior.base,
        posterior.groups,
        posterior.alpha,
    )
    for ours, theirs in ((posterior.mean, loaded.mean), (posterior.stddev, loaded.stddev)):
        assert list(ours) == list(theirs)
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype
            assert torch.equal(value, theirs[name])


def test_a_loaded_posterior_saves_the_same_tensor_files(posterior, tmp_path):
    posterior.save(tmp_path / "a")
    Posterior.load(str(tmp_path / "a")).save(tmp_path / "b")
    for name in (POSTERIOR_FILE, "adapter_model.safetensors"):
        first, second = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
        assert list(first) == list(second)
        assert all(torch.equal(value, second[key]) for key, value in first.items())


def refusal(folder: Path) -> str:
    """What the UserError of loading from `folder` says, in one line."""
    with pytest.raises(UserError) as caught:
        Posterior.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_a_posterior_is_refused_by_name(tmp_path):
    assert str(tmp_path) in refusal(tmp_path)
    assert "nowhere" in refusal(tmp_path / "nowhere")


def test_a_truncated_file_is_refused_wherever_it_was_cut(net, tmp_path):
    posterior_of(net).save(tmp_path)
    whole = (tmp_path / POSTERIOR_FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = np.random.default_rng(0).integers(0, len(whole), 30)
    for cut in (0, 1, 7, 8, header - 1, header, len(whole) - 1, *cuts.tolist()):
        (tmp_path / POSTERIOR_FILE).write_bytes(whole[:cut])
        assert "damaged" in refusal(tmp_path)


def test_a_flipped_byte_in_the_header_is_refused_or_harmless(net, tmp_path):
    posterior_of(net).save(tmp_path)
    whole = (tmp_path / POSTERIOR_FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(1)
    refused = 0
    for place in rng.integers(0, header, 150).tolist():
        flipped = bytearray(whole)
        flipped[place] ^= int(rng.integers(1, 256))
        (tmp_path / POSTERIOR_FILE).write_bytes(bytes(flipped))
        try:
            Posterior.load(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("content", [b"garbage", b"\0" * 64, b"\xff" * 64, b"{}", b"PK\x03\x04"])
def test_garbage_is_refused(tmp_path, content):
    (tmp_path / POSTERIOR_FILE).write_bytes(content)
    assert "damaged" in refusal(tmp_path)


def test_a_pickle_is_refused_and_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    torch.save(Bomb(), tmp_path / POSTERIOR_FILE)
    assert "damaged" in refusal(tmp_path)
    assert not (tmp_path / "boom").exists()


def test_nothing_in_the_package_unpickles():
    for path in Path(blora_pyro.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for word in ("torch.load(", "import pickle", "pickle.load", "joblib", "weights_only"):
            assert word not in source, path


def rewrite(folder: Path, change) -> None:
    """Save again what `change` makes of the tensors and of the description."""
    tensors = load_file(folder / POSTERIOR_FILE)
    posterior = Posterior.load(folder)
    about = {
        "base": posterior.base,
        "alpha": posterior.alpha,
        "groups": [vars(group) for group in posterior.groups],
        "prior": posterior.family.prior,
        "prior_args": posterior.family.prior_args,
        "guide": posterior.family.guide,
    }
    tensors, about = change(tensors, about)
    save_file(tensors, folder / POSTERIOR_FILE, metadata={"blora_pyro": json.dumps(about)})


def test_a_file_that_is_saved_again_as_it_was_is_read(net, tmp_path):
    posterior_of(net).save(tmp_path)
    rewrite(tmp_path, lambda tensors, about: (tensors, about))
    assert Posterior.load(tmp_path).alpha == 5.0


def without(mapping, *names):
    return {name: value for name, value in mapping.items() if name not in names}


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: ({**tensors, "A_16x16.mean": torch.zeros(1, 2, 3)}, about),
        lambda tensors, about: ({**tensors, "B_16x16.stddev": torch.zeros(5)}, about),
        lambda tensors, about: (without(tensors, "A_16x16.mean"), about),
        lambda tensors, about: (without(tensors, "B_16x16.stddev"), about),
        lambda tensors, about: (tensors, without(about, "alpha")),
        lambda tensors, about: (tensors, without(about, "base")),
        lambda tensors, about: (tensors, without(about, "groups")),
        lambda tensors, about: (tensors, without(about, "prior")),
        lambda tensors, about: (tensors, without(about, "prior_args")),
        lambda tensors, about: (tensors, without(about, "guide")),
        lambda tensors, about: (tensors, {**about, "groups": []}),
        lambda tensors, about: (tensors, {**about, "groups": 7}),
        lambda tensors, about: (tensors, {**about, "groups": [{"rank": 2}]}),
        lambda tensors, about: (tensors, {**about, "groups": [{**about["groups"][0], "more": 1}]}),
        lambda tensors, about: (tensors, [about]),
        lambda tensors, about: (tensors, "text"),
    ],
)
def test_a_file_of_another_content_is_refused(net, tmp_path, change):
    posterior_of(net).save(tmp_path)
    rewrite(tmp_path, change)
    assert "damaged" in refusal(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"other": "{}"}, {"blora_pyro": "no JSON"}])
def test_a_file_without_our_description_is_refused(net, tmp_path, metadata):
    posterior_of(net).save(tmp_path)
    save_file(load_file(tmp_path / POSTERIOR_FILE), tmp_path / POSTERIOR_FILE, metadata=metadata)
    assert "damaged" in refusal(tmp_path)


# ---- a run with the user's own prior

MINE = """
from pathlib import Path

import pyro.distributions as dist

from blora_pyro.guides.normal import Guide

(Path(__file__).parent / "ran").touch()


class Prior:
    def __init__(self, scale: float = 0.05):
        self.scale = scale

    def __call__(self, site):
        return dist.Cauchy(0.0, self.scale).expand(site.shape).to_event(2)
"""


@pytest.fixture
def own_file(tmp_path) -> Path:
    """A prior and a guide that leave a mark beside them, `ran`, wherever they are run."""
    path = tmp_path / "own" / "prior.py"
    path.parent.mkdir()
    path.write_text(MINE, encoding="utf-8")
    return path


@pytest.fixture
def own_run(net, own_file, tmp_path) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """The folder of a run with that file, and draws of its guide with the seed 5."""
    model = BLoRA(net, build_prior(str(own_file), scale=0.2), rank=2, target_modules="fc1")
    guide = build_guide(str(own_file), model)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    family = Family(str(own_file), {"scale": 0.2}, str(own_file))
    posterior = Posterior.from_guide("tiny", model, guide, family)
    posterior.save(tmp_path / "run")
    torch.manual_seed(5)
    draws = [{name: value.detach() for name, value in guide().items()} for _ in range(2)]
    assert (own_file.parent / "ran").exists()
    (own_file.parent / "ran").unlink()
    return tmp_path / "run", draws


def test_loading_a_run_does_not_run_its_file(net, batch, own_file, own_run, tmp_path):
    folder, _ = own_run
    loaded = Posterior.load(folder)
    with loaded.applied(net):
        logits(net, batch)
    loaded.merge(net)
    loaded.sparsity()
    loaded.save(tmp_path / "again")
    for part in (
        lambda: next(loaded.draws(1)),
        lambda: loaded.prior,
        lambda: loaded.guide,
        lambda: loaded.to_arviz(draws=1),
    ):
        with pytest.raises(UserError, match="name it with --prior") as caught:
            part()
        assert str(own_file) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (own_file.parent / "ran").exists()


def test_the_file_is_run_where_it_is_named(own_file, own_run):
    folder, expected = own_run
    loaded = Posterior.load(folder, prior=str(own_file))
    for draw, ours in zip(loaded.draws(2, seed=5), expected, strict=True):
        assert draw.keys() == ours.keys()
        assert all(torch.equal(value, ours[name]) for name, value in draw.items())
    assert loaded.prior.prior.scale == 0.2
    assert (own_file.parent / "ran").exists()


def test_the_file_may_have_moved(own_file, own_run, tmp_path):
    moved = own_file.rename(tmp_path / "elsewhere.py")
    folder, expected = own_run
    (draw,) = Posterior.load(folder, prior=str(moved)).draws(1, seed=5)
    assert all(torch.equal(value, expected[0][name]) for name, value in draw.items())
    with pytest.raises(UserError, match="nor the path of a"):
        next(Posterior.load(folder, prior=str(own_file)).draws(1))


def test_a_file_of_another_guide_is_refused(own_file, own_run):
    own_file.write_text(MINE.replace("guides.normal", "guides.point"), encoding="utf-8")
    loaded = Posterior.load(own_run[0], prior=str(own_file))
    with pytest.raises(UserError, match="is not the fitted one") as caught:
        next(loaded.draws(1))
    assert "\n" not in str(caught.value)


def test_a_file_named_for_a_run_of_built_in_names_is_refused_and_not_run(net, own_file, tmp_path):
    posterior_of(net).save(tmp_path)
    with pytest.raises(UserError, match="prior is normal, not one file; leave --prior out"):
        Posterior.load(tmp_path, prior=str(own_file))
    assert not (own_file.parent / "ran").exists()


@pytest.mark.parametrize(
    ("prior", "guide", "files"),
    [
        ("normal", "normal", ()),
        ("a.py", "a.py", ("a.py",)),
        ("a.py", "point", ("a.py",)),
        ("normal", "b.py", ("b.py",)),
        ("a.py", "b.py", ("a.py", "b.py")),
    ],
)
def test_a_family_knows_its_files_and_takes_one_for_one(prior, guide, files):
    family = Family(prior, {"scale": 1.0}, guide, runs_code=False)
    assert family.files == files
    if len(files) != 1:
        with pytest.raises(UserError, match="not one file"):
            family.with_file("new.py")
    else:
        named = family.with_file("new.py")
        assert (named.prior, named.guide) == tuple(
            "new.py" if name in files else name for name in (prior, guide)
        )
        assert named.runs_code
        assert named.prior_args == family.prior_args


# ---- applied


def test_applied_leaves_the_base_exactly_as_it_was(net, batch, posterior):
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    before = logits(net, batch)
    with posterior.applied(net):
        assert not torch.equal(logits(net, batch), before)
    assert torch.equal(logits(net, batch), before)
    assert hooks(net) == 0
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_applied_leaves_the_base_exactly_as_it_was_after_an_exception(net, batch, posterior):
    before = logits(net, batch)
    with pytest.raises(RuntimeError, match="inside"), posterior.applied(net):
        raise RuntimeError("inside")
    assert torch.equal(logits(net, batch), before)
    assert hooks(net) == 0


def test_applied_takes_a_draw_instead_of_the_mean(net, batch, posterior):
    (draw,) = posterior.draws(1)
    moved = Posterior("tiny", posterior.groups, posterior.alpha, draw, posterior.stddev)
    with posterior.applied(net, draw):
        drawn = logits(net, batch)
    with moved.applied(net):
        assert torch.equal(drawn, logits(net, batch))
    with posterior.applied(net):
        assert not torch.equal(drawn, logits(net, batch))


@pytest.mark.parametrize("difference", [{"d_model": 8}, {"decoder_layers": 1}])
def test_a_net_of_another_geometry_is_refused_and_left_alone(net, tmp_path, difference):
    config = WhisperConfig(**{**net.config.to_dict(), **difference})
    other = WhisperForConditionalGeneration(config).eval()
    weights = {name: value.clone() for name, value in other.state_dict().items()}
    posterior = posterior_of(net)
    with pytest.raises(UserError, match="base model"), posterior.applied(other):
        pass
    with pytest.raises(UserError, match="base model"):
        posterior.merge(other)
    assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())
    assert hooks(other) == 0


# ---- draws, delta weights, sparsity


def test_draws_have_the_sites_shapes_and_depend_on_the_seed_alone(posterior):
    state = torch.get_rng_state()
    first, again, other = (list(posterior.draws(3, seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first) == 3
    for group in posterior.groups:
        for site in group.sites:
            assert all(draw[site.name].shape == site.shape for draw in first)
            for one, two, three in zip(first, again, other, strict=True):
                assert torch.equal(one[site.name], two[site.name])
                assert not torch.equal(one[site.name], three[site.name])
            assert not torch.equal(first[0][site.name], first[1][site.name])


def test_draws_have_the_posteriors_mean_and_deviation(net):
    posterior = posterior_of(net, "fc1")
    count = 1000
    draws = list(posterior.draws(count))
    for name, mean in posterior.mean.items():
        stacked = torch.stack([draw[name] for draw in draws]).double()
        stddev = posterior.stddev[name]
        # About 400 elements each: six standard errors hold for all but one seed in a million.
        z = (stacked.mean(0) - mean) / stddev * math.sqrt(count)
        assert z.abs().max() < 6
        assert abs(float(z.square().mean()) - 1) < 0.5
        ratio = stacked.std(0) / stddev
        assert (ratio - 1).abs().max() < 6 / math.sqrt(2 * count)


def test_draws_of_a_point_are_the_mean(net):
    posterior = posterior_of(net)
    zero = {name: torch.zeros_like(value) for name, value in posterior.stddev.items()}
    point = Posterior("tiny", posterior.groups, posterior.alpha, posterior.mean, zero)
    (draw,) = point.draws(1)
    assert all(torch.equal(draw[name], mean) for name, mean in posterior.mean.items())


def test_delta_weights_are_alpha_over_rank_times_b_a(net, posterior):
    deltas = dict(posterior.delta_weights())
    assert posterior.scaling == 2.5
    assert len(deltas) == sum(len(group.modules) for group in posterior.groups)
    for group in posterior.groups:
        for place, name in enumerate(group.modules):
            a, b = posterior.mean[group.A.name][place], posterior.mean[group.B.name][place]
            assert deltas[name].shape == net.get_submodule(name).weight.shape
            torch.testing.assert_close(deltas[name], 2.5 * torch.einsum("or,ri->oi", b, a))


def test_rank_and_number_of_weights(net):
    posterior = posterior_of(net, "fc1,q_proj", rank=3)
    fc1, q_proj = 4 * 3 * (16 + 32), 6 * 3 * (16 + 16)  # 2 + 2 layers, and 2 + 2 · 2 attentions
    assert posterior.rank == 3
    assert posterior.num_weights == fc1 + q_proj


def test_sparsity_of_hand_made_values():
    groups = (Group(("one", "two"), 2, 3, 1), Group(("three",), 1, 2, 1))
    mean = {
        "A_2x3": torch.tensor([[[0.0, 0.5, -2e-3]], [[1e-4, 2.0, -9e-4]]]),  # 3 of 6 are small
        "B_2x3": torch.tensor([[[0.0], [1.0]], [[1e-3], [-1.0]]]),  # 1 of 4: 1e-3 itself is not
        "A_1x2": torch.tensor([[[5.0, 5.0]]]),  # 0 of 2
        "B_1x2": torch.tensor([[[1e-5]]]),  # 1 of 1
    }
    stddev = {name: torch.ones_like(value) for name, value in mean.items()}
    posterior = Posterior("made", groups, 2.0, mean, stddev)
    # ΔW = 2 B A. one: [0, 0, 0], [0, 1, -4e-3]: 4 of 6; two: [2e-7, 4e-3, -1.8e-6] and
    # [-2e-4, -4, 1.8e-3]: 3 of 6; three: [1e-4, 1e-4]: 2 of 2.
    assert posterior.sparsity() == {"A": 3 / 8, "B": 2 / 5, "delta_w": 9 / 14}
    assert posterior.sparsity(threshold=10) == {"A": 1, "B": 1, "delta_w": 1}
    assert posterior.sparsity(threshold=0) == {"A": 0, "B": 0, "delta_w": 0}
