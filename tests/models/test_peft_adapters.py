"""An adapter_config.json is read as anyone's, and means what it means to PEFT."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from blora_pyro.models.peft_adapters import lora_config


@pytest.fixture
def make(net, tmp_path):
    """Writes a stock adapter of the net with weights of its own; returns its folder."""

    def make(**options) -> Path:
        config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
        adapted = peft.get_peft_model(copy.deepcopy(net), config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 + 0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def change(folder: Path, **content) -> None:
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | content))


def merged(net, folder: Path, config=None) -> dict[str, torch.Tensor]:
    given = {} if config is None else {"config": config}
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(folder), **given)
    return adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*decoder.*\.(fc1|v_proj)"},
        {"target_modules": ["self_attn.q_proj", "fc1"], "exclude_modules": ["layers.0.fc1"]},
        {"target_modules": ["fc2"], "exclude_modules": r".*encoder.*", "use_rslora": True},
        {"target_modules": ["q_proj", "fc1"], "rank_pattern": {"fc1": 3}, "lora_alpha": 5},
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 4},
            "alpha_pattern": {r"encoder.*q_proj": 7, "q_proj": 9},
        },
        {"alpha_pattern": {"self_attn.q_proj": 7, "q_proj": 9, "1.self_attn.q_proj": 3}},
        {"layers_to_transform": [1]},
        {"use_dora": True, "bias": "lora_only"},
        {"target_modules": ["conv1", "out_proj"], "modules_to_save": ["layer_norm"]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.3, "task_type": "SEQ_2_SEQ_LM"},
    ],
)
def test_an_adapter_merges_as_it_does_by_peft_itself(net, make, options):
    folder = make(**options)
    ours = merged(net, folder, lora_config("x", folder, net))
    theirs = merged(net, folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert any(not torch.equal(value, ours[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_an_adapter_without_the_biases_that_it_trained_is_refused(net, make, kind):
    folder = make(bias=kind)
    assert lora_config("x", folder, net).bias == kind
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    last = max(name for name in tensors if "bias" in name and "lora_" not in name)
    save_file(
        {name: one for name, one in tensors.items() if name != last}, folder / ADAPTER_WEIGHTS
    )
    with pytest.raises(UserError, match=f"biases that bias {kind} trains"):
        lora_config("x", folder, net)


def test_what_names_code_reaches_no_import(net, make, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(
        "import pathlib; pathlib.Path(__file__).with_name('ran').touch()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = make()
    change(
        folder,
        megatron_core="evil",
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"},
        task_type="evil",
        runtime_config={"evil": "evil"},
        eva_config={"evil": 1},
        loftq_config={"evil": 1},
    )
    config = lora_config("x", folder, net)
    assert "evil" not in str(config.to_dict())
    merged(net, folder, config)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "has megatron_config"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "has layer_replication"),
        ({"trainable_token_indices": [1]}, "has trainable_token_indices"),
        ({"target_parameters": ["weight"]}, "has target_parameters"),
        ({"a_key_of_tomorrow": {"module": "evil"}}, "has a_key_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa', which changes the base"),
        ({"init_lora_weights": ["a"]}, "has init_lora_weights"),
        ({"peft_type": "LOHA"}, "is of type 'LOHA'; only LoRA"),
        ({"peft_type": ["LORA"]}, "is of type"),
        ({"r": 10**6}, "asks for rank 1000000 of model.encoder.layers.0.self_attn.q_proj"),
        ({"rank_pattern": {".*": 10**9}}, "has 1000000000 as rank_pattern"),
        ({"rank_pattern": [1]}, r"has rank_pattern \[1\]"),
        ({"alpha_pattern": {"q_proj": "1"}}, "has '1' as alpha_pattern"),
        ({"lora_alpha": float("nan")}, "has nan as alpha_pattern or lora_alpha"),
        ({"lora_alpha": None}, "has None as"),
        ({"target_modules": {"a": 1}}, "has target_modules"),
        ({"target_modules": []}, "adapts no layer"),
        ({"target_modules": "(" * 900}, "is no regex"),
        ({"target_modules": "a" * 5000}, "too large a regex"),
        ({"exclude_modules": "((a{99}){99}){99}"}, "too large a regex"),
        ({"modules_to_save": "all"}, "has modules_to_save 'all'"),
        ({"use_dora": "yes"}, "has use_dora 'yes'"),
        ({"bias": "some"}, "has bias 'some'"),
        ({"alpha_pattern": {f"a*{n}": 1 for n in range(30)}}, "has 30 regular expressions"),
    ],
)
def test_what_can_not_be_or_changes_more_is_refused(net, make, content, words):
    folder = make()
    change(folder, **content)
    with pytest.raises(UserError, match=words) as caught:
        lora_config("x", folder, net)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "alpha_pattern"])
def test_a_regex_of_an_adapter_is_stopped(net, make, monkeypatch, key):
    monkeypatch.setattr("blora_pyro.adapters.PATTERN_SECONDS", 0.05)
    folder, pattern = make(), r"(?:(?:\w|.)+)+[!?]"
    change(folder, **{key: {pattern: 1} if key == "alpha_pattern" else pattern})
    with pytest.raises(UserError, match="takes too long; give a simpler regex"):
        lora_config("x", folder, net)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_factors_that_are_not_finite_or_no_floats_are_refused_by_name(net, make, value):
    folder = make()
    weights = load_file(folder / ADAPTER_WEIGHTS)
    name = next(iter(weights))
    weights[name] = weights[name].int() if value is None else weights[name] + value
    save_file(weights, folder / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match=f"values that are not finite in {name}"):
        lora_config("x", folder, net)


def test_adapters_that_name_each_other_are_refused(make, tmp_path):
    one = make()
    other = one.with_name("other")
    other.mkdir()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        (other / name).write_bytes((one / name).read_bytes())
    change(one, base_model_name_or_path=str(other))
    change(other, base_model_name_or_path=str(one))
    with pytest.raises(UserError, match="leads back to itself through 2 adapters"):
        load_base(str(one))
