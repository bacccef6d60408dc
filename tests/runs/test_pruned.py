import json

import pytest
from peft import PeftModel
from transformers import WhisperForConditionalGeneration

from blora_pyro.errors import UserError
from blora_pyro.posterior import Posterior
from blora_pyro.runs.pruned import prune_run


def test_the_whole_rank_costs_nothing(finished_run, tmp_path):
    metrics = prune_run(finished_run.output, tmp_path / "pruned", rank=4)
    assert metrics["size"]["full"] == metrics["size"]["pruned"]
    for one in (metrics["new_domain"], metrics["backward_error"]):
        change = one["change"] if "difference" in one["change"] else one["change"]["wer"]
        assert change["difference"] == 0


def test_a_pruned_run_is_smaller_and_scored_against_the_full_one(finished_run, tmp_path):
    out = tmp_path / "pruned"
    metrics = prune_run(finished_run.output, out, rank=1)
    size = metrics["size"]
    assert size["pruned"]["adapter_weights"] * 4 == size["full"]["adapter_weights"]
    assert size["pruned"]["directions"] == size["pruned"]["layers"]
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8")) == metrics
    full = finished_run.metrics["new_domain"]["adapted"]
    assert metrics["new_domain"]["base"] == full
    about = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert about["pruned"]["from"] == str(finished_run.output)
    assert about["pruned"]["rank"] == 1
    whisper = WhisperForConditionalGeneration.from_pretrained(about["config"]["base"])
    PeftModel.from_pretrained(whisper, str(out))


def test_a_sparse_run_tells_how_many_weights_are_not_zero(finished_run, tmp_path):
    out = tmp_path / "sparse"
    size = prune_run(finished_run.output, out, sparsity=0.75, evaluate=False)["size"]
    count = size["full"]["adapter_weights"]
    assert size["pruned"]["adapter_weights"] == count
    assert size["pruned"]["nonzero_weights"] == count - round(0.75 * count)
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["pruned"]["sparsity"] == 0.75
    means = Posterior.load(out).mean.values()
    assert sum(int(mean.count_nonzero()) for mean in means) == size["pruned"]["nonzero_weights"]


def test_nothing_is_written_over_unless_asked(finished_run, tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(UserError, match="not empty"):
        prune_run(finished_run.output, tmp_path, rank=1, evaluate=False)
    prune_run(finished_run.output, tmp_path, rank=1, evaluate=False, overwrite=True)
    assert (tmp_path / "adapter_model.safetensors").is_file()
