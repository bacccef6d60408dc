import json

import pytest
import torch

from blora_pyro.adapters import find_targets, group_by_shape
from blora_pyro.data import Batch
from blora_pyro.errors import UserError
from blora_pyro.fitting.elastic import ElasticPenalty, fisher_information
from blora_pyro.options import FitConfig
from blora_pyro.runs.fits import fit


def test_the_penalty_is_quadratic_in_the_update_and_weighted_by_the_information():
    layer = torch.nn.Linear(3, 2)
    net = torch.nn.Sequential(layer)
    net.get_output_embeddings = lambda: None
    groups = group_by_shape(find_targets(net, "all-linear"), rank=1)
    fisher = {"2x3": torch.arange(6.0).reshape(1, 2, 3)}
    a, b = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0], [-1.0]]])
    factors = {"A_2x3": a, "B_2x3": b}
    delta = 0.5 * b[0] @ a[0]
    expected = 0.5 * 7.0 * (fisher["2x3"][0] * delta**2).sum()
    assert ElasticPenalty(groups, {"2x3": 0.5}, fisher, 7.0)(factors) == pytest.approx(
        expected.item()
    )


def test_the_information_is_the_mean_squared_score(net, batch):
    """Against the exact expectation over the tokens drawn, of one layer's weight."""
    targets = find_targets(net, r"model.decoder.layers.1.fc2")
    groups = group_by_shape(targets, rank=1)
    weight = next(iter(targets.values())).weight
    net.requires_grad_(False)
    weight.requires_grad_(True)
    logits = net(
        input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
    ).logits
    expected = torch.zeros_like(weight)
    # scores of different positions are independent and have mean 0, so their squares add up
    for row in logits[batch.labels >= 0].log_softmax(-1):
        for token in range(len(row)):
            (score,) = torch.autograd.grad(row[token], weight, retain_graph=True)
            expected += row[token].exp().detach() * score**2
    expected /= batch.num_tokens
    weight.requires_grad_(False)
    draws = [fisher_information(net, groups, [OneBatch(batch)], seed) for seed in range(50)]
    found = torch.stack([draw[groups[0].key][0] for draw in draws]).mean(0)
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.95
    assert found.sum() == pytest.approx(expected.sum().item(), rel=0.3)
    assert not any(parameter.requires_grad for parameter in net.parameters())


class OneBatch:
    """Stands for `Examples`: the utterances of a batch, one by one."""

    def __init__(self, batch):
        self.whole = batch

    def __len__(self):
        return len(self.whole.input_features)

    def batch(self, indices):
        parts = self.whole.input_features, self.whole.decoder_input_ids, self.whole.labels
        return Batch(*(part[indices] for part in parts))


def test_a_fit_with_it_moves_less_where_it_matters(fit_options, tones_folder, tmp_path):
    for split in ("train", "test"):
        lines = (tones_folder / "de.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["audio"] = str(tones_folder / row["audio"])
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    backward = {"de": str(tmp_path)}
    options = {**fit_options, "backward": backward, "guide": "point", "beta": 0.0, "steps": 15}
    moved = {}
    for strength in (0.0, 1e4):
        run = fit(FitConfig(**options, ewc=strength), evaluate=False)
        moved[strength] = sum(d.square().sum() for _, d in run.posterior.delta_weights())
        assert (run.history[-1].regularizer > 0) == (strength > 0)
    assert moved[1e4] < moved[0.0]


def test_it_needs_backward_sets_with_training_data(fit_options):
    with pytest.raises(UserError, match="no backward set"):
        fit(FitConfig(**{**fit_options, "backward": ()}, ewc=1.0))


def test_a_set_that_is_scored_is_not_learned_from(fit_options):
    with pytest.raises(UserError, match=r"^backward set .*de.jsonl has no train split"):
        fit(FitConfig(**fit_options, ewc=1.0))


def test_the_model_has_no_penalty_without_it(fit_options):
    run = fit(FitConfig(**{**fit_options, "steps": 2}), evaluate=False)
    assert all(step.regularizer == 0 for step in run.history)
    assert FitConfig(**fit_options).ewc == 0
