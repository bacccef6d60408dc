import copy
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import blora_pyro
from blora_pyro.errors import UserError
from blora_pyro.models import Pooling
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.combining import combine
from blora_pyro.posterior.pruning import prune
from blora_pyro.posterior.storage import POSTERIOR_FILE
from blora_pyro.posterior.strength import at_strength

from .conftest import adapted, fitted, logits, posterior_of

# ---- export: three ways to the same logits


# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_stock_peft_computes_the_logits_of_the_posterior_mean(net, batch, posterior, tmp_path):
    posterior.save(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path)).eval()
    ours = adapted(posterior, net, batch)
    torch.testing.assert_close(logits(stock, batch), ours, atol=1e-5, rtol=0)
    assert (ours - logits(net, batch)).abs().max() > 1e-2  # it does something


def test_transformers_load_adapter_computes_the_logits_of_the_posterior_mean(
    net, batch, posterior, tmp_path
):
    posterior.save(tmp_path)
    theirs = copy.deepcopy(net)
    theirs.load_adapter(str(tmp_path))
    ours = adapted(posterior, net, batch)
    torch.testing.assert_close(logits(theirs.eval(), batch), ours, atol=1e-5, rtol=0)


SHAPED = [
    {"use_rslora": True},
    {"rank_pattern": {"fc1": 3, r"decoder.*v_proj": 1}},
    {"rank_pattern": {"fc1": 3, r"decoder.*v_proj": 1}, "use_rslora": True},
]


@pytest.mark.parametrize("shaped", SHAPED)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_rslora_and_ranks_by_pattern_are_written_as_peft_has_them(net, batch, shaped, tmp_path):
    posterior = posterior_of(net, **shaped)
    posterior.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {name: len(a) for name, a, _ in posterior.layer_means()}
    largest = max(ranks.values())
    assert config["use_rslora"] is shaped.get("use_rslora", False)
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (largest, 5.0, {})
    assert config["rank_pattern"] == {name: r for name, r in ranks.items() if r != largest}
    ours = adapted(posterior, net, batch)
    stock = PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path)).eval()
    torch.testing.assert_close(logits(stock, batch), ours, atol=1e-5, rtol=0)
    merged = copy.deepcopy(net)
    Posterior.load(tmp_path).merge(merged)
    torch.testing.assert_close(logits(merged, batch), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shaped", SHAPED)
def test_what_is_made_of_such_an_adapter_keeps_its_updates(net, shaped, tmp_path):
    posterior, plain = posterior_of(net, **shaped), posterior_of(net, rank=1)
    updates = dict(posterior.delta_weights())
    made = {
        "whole": (posterior, 1.0),
        "half": (at_strength(posterior, 0.5), 0.5),
        "pruned": (prune(posterior, rank=posterior.rank), 1.0),
        "combined": (combine([posterior, plain], "weighted", weights=(1, 0))[0], 1.0),
    }
    for how, (one, factor) in made.items():
        one.save(tmp_path / how)
        for name, delta in Posterior.load(tmp_path / how).delta_weights():
            torch.testing.assert_close(delta, factor * updates[name], atol=1e-5, rtol=1e-4)


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


def test_tokens_that_may_be_said_are_kept_and_allowed(net, posterior, tmp_path):
    net.generation_config.suppress_tokens = [3, 5, 7]
    allowing = replace(posterior, unsuppressed=(3, 7))
    allowing.save(tmp_path)
    loaded = Posterior.load(tmp_path)
    assert loaded.unsuppressed == (3, 7)
    with loaded.applied(net):
        assert net.generation_config.suppress_tokens == [5]
    assert net.generation_config.suppress_tokens == [3, 5, 7]
    loaded.merge(net)
    assert net.generation_config.suppress_tokens == [5]


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


def first(tensors, name, value):
    changed = tensors[name].clone()
    changed[0, 0, 0] = value
    return {**tensors, name: changed}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: first(t, "A_16x16.mean", float("nan")),
            r"A_16x16\.mean has values .* not finite",
        ),
        (
            lambda t: first(t, "B_16x16.mean", float("inf")),
            r"B_16x16\.mean has values .* not finite",
        ),
        (lambda t: first(t, "A_16x16.stddev", float("nan")), r"A_16x16\.stddev has values"),
        (lambda t: first(t, "B_16x16.mean", -1e7), r"B_16x16\.mean has values beyond 1,000,000"),
        (lambda t: first(t, "A_16x16.stddev", 3e38), r"A_16x16\.stddev has values beyond"),
        (lambda t: first(t, "B_16x16.stddev", -1e-9), r"B_16x16\.stddev has deviations"),
        (lambda t: {**t, "A_16x16.mean": t["A_16x16.mean"].half()}, r"A_16x16\.mean is .*float16"),
        (lambda t: {**t, "A_16x16.mean": t["A_16x16.mean"].int()}, r"A_16x16\.mean is .*int32"),
        (lambda t: {**t, "guide.rho": torch.tensor([float("nan")])}, r"guide\.rho has values"),
        (lambda t: {**t, "prior.scale": torch.tensor([float("inf")])}, r"prior\.scale has values"),
    ],
)
def test_tensors_that_cannot_be_are_refused_by_name(net, tmp_path, change, words):
    posterior_of(net).save(tmp_path)
    rewrite(tmp_path, lambda tensors, about: (change(tensors), about))
    assert re.search(words, refusal(tmp_path))


def test_deviations_are_0_where_a_site_is_a_point_alone(tmp_path):
    for guide in ("normal", "a-only", "point"):
        whole = fitted("normal", guide)
        whole.save(tmp_path / guide)
        assert Posterior.load(tmp_path / guide).family.guide == guide
    whole = fitted("normal")
    partly = first(dict(whole.stddev), "A_4x4", 0.0)
    replace(whole, stddev=partly).save(tmp_path)
    assert "A_4x4.stddev has deviations that are not above 0" in refusal(tmp_path)
    replace(whole, stddev=partly, state={}).save(tmp_path)  # as after pruning
    assert Posterior.load(tmp_path).stddev["A_4x4"][0, 0, 0] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alpha": -1}, "'alpha' is -1, no number above 0"),
        ({"alpha": float("nan")}, "'alpha' is nan"),
        ({"alpha": True}, "'alpha' is True"),
        ({"alpha": 1e308}, r"'alpha' is 1e\+308, no number above 0 and below 1e\+15"),
        ({"base": 3}, "'base' is 3, no text"),
        ({"revision": ["v1"]}, "'revision' is .*, no text"),
        ({"prior": ["normal"]}, "'prior' is .*, no text"),
        ({"guide": None}, "'guide' is None"),
        ({"prior_args": [1]}, "'prior_args' or 'code_sha256'"),
        ({"code_sha256": "x"}, "'prior_args' or 'code_sha256'"),
        ({"prior": "previous-posterior", "prior_args": {"groups": 1}}, "'prior_args' has groups"),
        ({"prior": "previous-posterior", "prior_args": {"inflation": "1"}}, "'inflation' is '1'"),
        ({"pooling": 3}, "damaged"),
        ({"pooling": {"kind": "none", "domains": [], "scale": 1}}, "'domains' or 'kind'"),
        ({"pooling": {"kind": "all", "domains": ["a"], "scale": 1}}, "'domains' or 'kind'"),
        ({"pooling": {"kind": "none", "domains": ["a", "a"], "scale": 1}}, "'domains' or 'kind'"),
        ({"pooling": {"kind": "none", "domains": ["a"], "scale": 0}}, "'scale' is 0"),
        ({"pooling": {"kind": "none", "domains": "ab", "scale": 1}}, "'domains' is 'ab'"),
    ],
)
def test_a_description_of_wrong_types_is_refused_by_name(net, tmp_path, change, words):
    posterior_of(net).save(tmp_path)
    rewrite(tmp_path, lambda tensors, about: (tensors, {**about, **change}))
    assert re.search(words, refusal(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 10**9},
        {"rank": 0},
        {"rank": 2.0},
        {"rank": True},
        {"out_features": "16"},
        {"modules": []},
        {"modules": "ab"},
        {"modules": [1]},
        {"modules": ["\ud800"]},
        {"modules": ["a\nb"]},
        {"weight_stddevs": [1.0]},
        {"weight_stddevs": "a"},
        {"suffix": "/../x"},
        {"suffix": None},
    ],
)
def test_a_group_that_cannot_be_is_refused(net, tmp_path, change):
    posterior_of(net).save(tmp_path)

    def with_first(tensors, about):
        return tensors, {
            **about,
            "groups": [{**about["groups"][0], **change}, *about["groups"][1:]],
        }

    rewrite(tmp_path, with_first)
    assert "damaged" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["/elsewhere/x", "../../../x", "..", ".", ".x", "", "a/b", "a\\b", "a\0b", "a\n", "x" * 300],
)
def test_a_domain_whose_name_is_a_path_is_neither_read_nor_written(net, tmp_path, name):
    whole = posterior_of(net)
    pooling = Pooling("none", (name, "b"))
    groups = pooling.stack(whole.groups)
    sites = [site for group in groups for site in group.sites]
    moments = [{site.name: torch.ones(site.shape) for site in sites} for _ in range(2)]
    pooled = Posterior("tiny", groups, 4.0, *moments, pooling=pooling)
    with pytest.raises(UserError, match=r"a domain is called .*give a name of letters"):
        pooled.save(tmp_path / "a/b/c/run")
    assert "a domain is called" in refusal(tmp_path / "a/b/c/run")  # the posterior was written
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "b", "c", "run", POSTERIOR_FILE}


def test_a_description_that_is_nested_deeply_is_refused(net, tmp_path):
    posterior_of(net).save(tmp_path)
    deep = {"blora_pyro": "[" * 100_000}
    save_file(load_file(tmp_path / POSTERIOR_FILE), tmp_path / POSTERIOR_FILE, metadata=deep)
    assert "nested too deeply" in refusal(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"other": "{}"}, {"blora_pyro": "no JSON"}])
def test_a_file_without_our_description_is_refused(net, tmp_path, metadata):
    posterior_of(net).save(tmp_path)
    save_file(load_file(tmp_path / POSTERIOR_FILE), tmp_path / POSTERIOR_FILE, metadata=metadata)
    assert "damaged" in refusal(tmp_path)
