import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.posterior.strength import at_strength
from blora_pyro.runs import keeping
from blora_pyro.runs.finished import evaluate_run
from blora_pyro.runs.folders import read_run
from blora_pyro.runs.keeping import keep_adapter
from blora_pyro.runs.strength_curves import used_directions

from .conftest import Notes


@pytest.fixture(scope="module")
def lora(kept_run, tmp_path_factory):
    """The whole fit of `kept_run` as an adapter of PEFT's, and nothing else."""
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    at_strength(kept_run[0].posterior, 1).save(folder)
    (folder / "posterior.safetensors").unlink()
    return folder


def test_an_adapter_of_others_is_turned_down_as_a_fit_is(
    lora, kept_run, keep_options, tones_folder, tmp_path
):
    run, _ = kept_run
    sets = {name: keep_options[name] for name in ("data", "backward")}
    found = keep_adapter(lora, {"average": 80}, tmp_path / "out", **sets)
    assert found["kept"]["strength"] == run.posterior.strength
    assert found["kept"]["losses"] == read_run(run.output)[1].kept["losses"]
    assert found["metrics"]["contract"] == run.metrics["contract"]
    assert found["metrics"]["new_domain"]["adapted"] == run.metrics["new_domain"]["adapted"]
    out = tmp_path / "out"
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_alpha"] == pytest.approx(8 * run.posterior.strength)
    assert config["base_model_name_or_path"] == keep_options["base"]
    assert load_file(out / "adapter_model.safetensors").keys()
    kept = json.loads((out / "keep.json").read_text(encoding="utf-8"))
    assert kept == {"adapter": lora.as_posix(), **json.loads(json.dumps(found["kept"]))}
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8")) == found["metrics"]
    assert (out / "strength.png").is_file()

    # and as base or as adapter of the next look it is what was written
    again = keep_adapter(out, 100, **sets)
    ends = {one["strength"]: one["new_domain"]["rate"] for one in again["kept"]["curve"]["points"]}
    assert ends[1.0] == found["metrics"]["new_domain"]["adapted"]["wer"]["rate"]


def test_by_base_the_adapter_of_others_has_another_a(
    lora, kept_run, keep_options, fluent_folder, always_chosen, tmp_path
):
    sets = {name: keep_options[name] for name in ("data", "backward")}
    out = tmp_path / "out"
    kept = keep_adapter(lora, 100, out, strength_by="base", **sets)["kept"]
    assert (kept["strength"], kept["curve"]["strength_by"]) == (always_chosen, "base")
    before, after = (load_file(one / "adapter_model.safetensors") for one in (lora, out))
    for name, value in before.items():
        assert torch.equal(after[name], value) == ("lora_B" in name)
    config, given = ((one / "adapter_config.json").read_text() for one in (out, lora))
    assert config == given
    whole = at_strength(kept_run[0].posterior, 1)
    base, fit = load_base(str(fluent_folder)), kept_run[0].config
    directions = used_directions(base, fit, whole, Notes())
    expected = at_strength(whole, kept["strength"], "base", directions)
    expected.merge(base.net)
    merged = load_base(str(out)).net.state_dict()  # by PEFT
    torch.testing.assert_close(merged, base.net.state_dict(), rtol=1e-3, atol=1e-3)

    copy = tmp_path / "run"
    again = keep_adapter(kept_run[0].output, 100, copy, strength_by="base")
    assert evaluate_run(copy) == again["metrics"]


def test_a_run_keeps_another_contract_by_the_sets_of_its_fit(kept_run, tmp_path):
    run, _ = kept_run
    found = keep_adapter(run.output, {"each": 40}, tmp_path / "out")
    assert found["kept"]["limits"] == {"each": 0.4}
    assert found["kept"]["curve"]["adapter"] == at_strength(run.posterior, 1).fingerprint
    points = found["kept"]["curve"]["points"]
    assert found["kept"]["strength"] < points[-1]["strength"]  # at which more is lost of each
    posterior, record = read_run(tmp_path / "out")
    assert posterior.strength == found["kept"]["strength"]
    assert record.resolved.keep == {"each": 40.0}
    assert record.resolved.data == run.config.data
    assert evaluate_run(tmp_path / "out") == found["metrics"]


def test_old_audio_without_texts_keeps_a_contract_by_its_drift(kept_run, tones_folder, tmp_path):
    for split in ("dev", "test"):
        (tmp_path / "old" / split).mkdir(parents=True)
        for wav in tones_folder.glob("de*.wav"):
            shutil.copy(wav, tmp_path / "old" / split)
    found = keep_adapter(kept_run[0].output, 40, backward={"de": str(tmp_path / "old")})
    both = found["metrics"]["backward"]["de"]
    assert both["drift"] and both["base"]["wer"]["rate"] == 0
    points = found["kept"]["curve"]["points"]
    assert points[0]["backward"]["de"]["rate"] == 0 < points[-1]["backward"]["de"]["rate"]
    assert found["metrics"]["contract"]["holds"]


def test_it_says_what_is_missing(lora, kept_run, keep_options, tones_folder, tmp_path):
    with pytest.raises(UserError, match="fitted here, and data and backward is not given"):
        keep_adapter(lora, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is neither a run folder nor a PEFT adapter"):
        keep_adapter(tmp_path / "empty", 1)
    sets = {name: keep_options[name] for name in ("data", "backward")}
    copy = shutil.copytree(lora, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None
    (copy / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="does not name its base; give base"):
        keep_adapter(copy, 1, **sets)
    with pytest.raises(UserError, match="keep needs the dev and the test split"):
        keep_adapter(lora, 1, data=sets["data"], backward=(str(tones_folder / "de.jsonl"),))
    with pytest.raises(UserError, match="the limit 'average' of keep is '-1'"):
        keep_adapter(kept_run[0].output, -1, progress=Notes())
    with pytest.raises(TypeError, match="has no option 'steps'"):
        keep_adapter(lora, 1, steps=3)


def test_a_folder_that_holds_something_is_refused_before_anything_is_scored(
    kept_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(keeping, "base_of", lambda config: pytest.fail("loaded"))
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="is not empty; give another, or --overwrite"):
        keep_adapter(kept_run[0].output, 1, tmp_path)
    with pytest.raises(UserError, match="is the run's own folder"):
        keep_adapter(kept_run[0].output, 1, kept_run[0].output, overwrite=True)
