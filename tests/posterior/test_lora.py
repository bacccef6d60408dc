import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from blora_pyro.errors import UserError
from blora_pyro.posterior.lora import read_lora, write_weaker
from blora_pyro.posterior.strength import at_strength

from .conftest import adapted, logits

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def stored(net, tmp_path):
    """Write an adapter of `net` as PEFT does, with B that is not zero; return its folder."""

    def store(**options):
        config = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "fc1"], **options}
        model = get_peft_model(net, LoraConfig(**config))
        torch.manual_seed(3)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.normal_(std=0.3)
        model.save_pretrained(str(tmp_path / "lora"))
        model.unload()
        return tmp_path / "lora"

    return store


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc1": 7, "encoder.layers.0.fc1": 1}},
        {"target_modules": ".*decoder.*(k|v)_proj", "layers_to_transform": None},
    ],
)
def test_any_lora_of_linear_layers_is_a_point_that_changes_the_net_as_peft_does(
    net, batch, stored, tmp_path, options
):
    folder = stored(**options)
    base = logits(net, batch)
    posterior = read_lora("mine", folder, net, "tiny", "v1")
    assert (posterior.base, posterior.revision) == ("tiny", "v1")
    assert not any(stddev.any() for stddev in posterior.stddev.values())
    assert posterior.strength == 1
    half = adapted(at_strength(posterior, 0.5), net, batch)
    full = adapted(posterior, net, batch)
    assert not torch.allclose(full, base, atol=0.05)
    (tmp_path / "weaker").mkdir()
    write_weaker("mine", folder, tmp_path / "weaker", 0.5)
    for place, expected in ((folder, full), (tmp_path / "weaker", half)):
        model = PeftModel.from_pretrained(net, str(place)).eval()
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-4, rtol=0)
        net = model.unload()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "has use_dora, which no strength can scale"),
        ({"bias": "all"}, "has bias all"),
        ({"modules_to_save": ["proj_out"]}, "has modules_to_save"),
        ({"target_modules": ["conv1"]}, "conv1, which is no linear layer"),
    ],
)
def test_what_a_strength_cannot_scale_is_refused(net, stored, options, words):
    with pytest.raises(UserError, match=words):
        read_lora("mine", stored(**options), net, "tiny")


def test_damaged_tensors_are_refused(net, stored):
    folder = stored()
    whole = load_file(folder / WEIGHTS)
    first = min(name for name in whole if "lora_B" in name)
    for tensors, words in (
        ({name: one for name, one in whole.items() if name != first}, "has no A or B for"),
        ({**whole, first: whole[first][:-1]}, "has A and B of"),
        ({**whole, "more": torch.ones(2)}, "has 1 tensors more, such as 'more'"),
    ):
        save_file({name: one.contiguous() for name, one in tensors.items()}, folder / WEIGHTS)
        with pytest.raises(UserError, match=words):
            read_lora("mine", folder, net, "tiny")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"'mine' is an adapter without adapter_model\.saf"):
        read_lora("mine", folder, net, "tiny")


def test_a_config_without_alpha_has_that_of_peft(stored, tmp_path):
    folder = stored()
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    write_weaker("mine", folder, tmp_path / "out", 0.25)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 2
