from dataclasses import replace
from itertools import product

import pytest
import torch
from peft import PeftModel

from blora_pyro.errors import UserError
from blora_pyro.models.pooling import Pooling
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.pruning import prune
from blora_pyro.posterior.spectra import spectra

from .conftest import adapted, logits

RANK = 5


@pytest.fixture
def posterior(uneven_posterior) -> Posterior:
    return uneven_posterior


def deltas(posterior):
    return dict(posterior.delta_weights())


@pytest.mark.parametrize("rank", [1, 3, RANK])
def test_a_lower_rank_is_the_best_approximation_of_every_update(posterior, rank):
    pruned = prune(posterior, rank=rank)
    kept = deltas(pruned)
    for name, delta in deltas(posterior).items():
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        assert (kept[name] - best).norm() < 1e-5 * s[0]
    assert {group.rank for group in pruned.groups} == {rank}


def test_a_bar_keeps_just_the_directions_above_it(posterior):
    bar, kept = 2.0, {}
    pruned = prune(posterior, snr=bar)
    for group, spectrum in zip(posterior.groups, spectra(posterior).values(), strict=True):
        for i, name in enumerate(group.modules):
            above = spectrum.values[i] > bar * spectrum.stddevs[i]
            part = spectrum.left[i] * (spectrum.values[i] * above) @ spectrum.right[i].mT
            kept[name] = int(above.sum()), part
    assert {count for count, _ in kept.values()} >= {0, 1, RANK}  # else this tests little
    ranks = {name: group.rank for group in pruned.groups for name in group.modules}
    assert ranks == {name: count for name, (count, _) in kept.items() if count}
    for name, delta in deltas(pruned).items():
        torch.testing.assert_close(delta, kept[name][1], atol=1e-5, rtol=1e-4)


def test_elements_go_first_without_which_the_update_changes_least(posterior):
    pruned = prune(posterior, sparsity=0.6)
    masks = {name: mean == 0 for name, mean in pruned.mean.items()}
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.6 * total)
    whole = deltas(posterior)
    changes = {True: [], False: []}
    for group in posterior.groups:
        for (i, layer), factor in product(enumerate(group.modules), group.sites):
            for element in [(0, 0), (1, 3), (4, 2)]:
                mean = {**posterior.mean, factor.name: posterior.mean[factor.name].clone()}
                mean[factor.name][i, *element] = 0
                change = deltas(replace(posterior, mean=mean))[layer] - whole[layer]
                changes[bool(masks[factor.name][i, *element])].append(float(change.norm()))
    assert min(map(len, changes.values())) > 5  # else this tests little
    assert max(changes[True]) < min(changes[False])


def test_elements_that_stay_and_the_spread_are_as_before(posterior):
    pruned = prune(posterior, sparsity=0.6)
    for name, mean in pruned.mean.items():
        assert torch.equal(mean[mean != 0], posterior.mean[name][mean != 0])
        assert torch.equal(pruned.stddev[name], posterior.stddev[name])
    assert deltas(prune(posterior, sparsity=0.0)).keys() == deltas(posterior).keys()
    draws = torch.stack([draw[posterior.groups[0].A.name] for draw in pruned.draws(200)])
    name = posterior.groups[0].A.name
    bound = 6 * pruned.stddev[name] / 200**0.5
    assert ((draws.mean(0) - pruned.mean[name]).abs() < bound).all()


def test_the_spread_of_what_is_kept_stays(posterior):
    before, after = spectra(posterior), spectra(prune(posterior, rank=2))
    for key, spectrum in after.items():
        whole = before[key.removesuffix("_r2")]
        torch.testing.assert_close(spectrum.values, whole.values[:, :2], rtol=1e-4, atol=1e-6)
        # what is left out of B A took part in the spread, too, so this one may be a little smaller
        ratio = spectrum.stddevs / whole.stddevs[:, :2]
        assert ratio.max() < 1.001
        assert ratio.median() > 0.7


def test_a_pruned_posterior_can_be_pruned_again(posterior):
    again = prune(prune(posterior, snr=2.0), rank=1)
    assert len({group.key for group in again.groups}) == len(again.groups)
    kept = deltas(again)
    once = deltas(prune(posterior, snr=2.0))
    assert kept.keys() == once.keys()
    for name, delta in once.items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        torch.testing.assert_close(kept[name], s[0] * u[:, :1] @ vh[:1], atol=1e-5, rtol=1e-3)


def test_null_directions_are_never_kept(posterior):
    name = posterior.groups[0].B.name
    mean = {**posterior.mean, name: posterior.mean[name].clone()}
    mean[name][0, :, 2:] = 0  # rank 2
    mean[name][1] = 0
    pruned = prune(replace(posterior, mean=mean), rank=4)
    ranks = {layer: group.rank for group in pruned.groups for layer in group.modules}
    assert ranks[posterior.groups[0].modules[0]] == 2
    assert posterior.groups[0].modules[1] not in ranks
    assert all(value.isfinite().all() for value in (*pruned.mean.values(), *pruned.stddev.values()))


def test_a_pruned_posterior_draws_and_is_saved_and_loaded(posterior, tmp_path):
    pruned = prune(posterior, snr=2.0)
    assert pruned.scaling == pytest.approx(posterior.scaling)
    pruned.save(tmp_path)
    loaded = Posterior.load(tmp_path)
    assert loaded.groups == pruned.groups
    (draw,) = loaded.draws(1)
    assert {name: value.shape for name, value in draw.items()} == {
        name: value.shape for name, value in pruned.mean.items()
    }


@pytest.mark.parametrize("stock", ["peft", "transformers"])
def test_stock_loaders_compute_the_logits_of_the_pruned_mean(
    net, batch, posterior, tmp_path, stock
):
    prune(posterior, snr=2.0).save(tmp_path)
    ours = adapted(Posterior.load(tmp_path), net, batch)
    if stock == "peft":
        net = PeftModel.from_pretrained(net, str(tmp_path))
    else:
        net.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(net.eval(), batch), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "one of rank, snr and sparsity"),
        ({"rank": 2, "snr": 1.0}, "one of rank, snr and sparsity"),
        ({"rank": 0}, "1 to 5"),
        ({"rank": 6}, "1 to 5"),
        ({"snr": 0.0}, "above 0"),
        ({"snr": 1e6}, "leaves nothing; give less than"),
        ({"sparsity": 1.0}, "from 0 to below 1"),
        ({"sparsity": float("nan")}, "from 0 to below 1"),
    ],
)
def test_invalid_pruning_options_are_refused(posterior, given, words):
    with pytest.raises(UserError, match=words):
        prune(posterior, **given)


def test_several_domains_are_not_pruned_at_once(posterior):
    pooled = replace(posterior, pooling=Pooling("none", ("a", "b")))
    with pytest.raises(UserError, match="choose one by for_domain"):
        prune(pooled, sparsity=0.5)
