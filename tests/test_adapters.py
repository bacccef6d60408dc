import copy

import peft
import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from blora_pyro.adapters import Adapters, Group, find_targets, group_by_shape, is_finite
from blora_pyro.errors import UserError

quick = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# PEFT asks transformers 5.23 for a deprecated attribute when it wraps a net.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
SUFFIXES = (*ATTENTION, "fc1", "fc2")


@pytest.fixture
def groups(net):
    return group_by_shape(find_targets(net, "all-linear"), rank=4)


def random_factors(groups, scale=0.3):
    return {site.name: scale * torch.randn(site.shape) for group in groups for site in group.sites}


def logits(net, batch):
    with torch.no_grad():
        return net(
            input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
        ).logits


def peft_names(net, target_modules):
    """Names of the layers that PEFT adapts on a copy of the net."""
    return peft_names_of(net, peft.LoraConfig(r=2, target_modules=target_modules))


def peft_names_of(net, config):
    adapted = peft.get_peft_model(copy.deepcopy(net), config)
    return {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def test_all_linear_is_every_linear_layer_but_the_output(net):
    linear = {name for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    assert "proj_out" in linear
    assert set(find_targets(net, "all-linear")) == linear - {"proj_out"}


def test_the_output_layer_is_no_target_by_suffix_or_regex(net):
    with pytest.raises(UserError):
        find_targets(net, "proj_out")
    assert find_targets(net, ".*") == find_targets(net, "all-linear")


def test_targets_are_the_layers_themselves_in_the_order_of_the_net(net):
    targets = find_targets(net, "v_proj,q_proj")
    names = [name for name, _ in net.named_modules() if name in targets]
    assert list(targets) == names
    assert all(net.get_submodule(name) is module for name, module in targets.items())


def test_a_single_suffix_matches_whole_name_parts_only(net):
    assert {name.rpartition(".")[2] for name in find_targets(net, "q_proj")} == {"q_proj"}
    with pytest.raises(UserError):
        find_targets(net, "proj")


def test_suffixes_with_commas_and_spaces(net):
    together = find_targets(net, "q_proj, v_proj")
    assert together == find_targets(net, "q_proj") | find_targets(net, "v_proj")
    assert len(together) == 2 * (2 + 2 * 2)


def test_a_suffix_may_hold_dots_and_a_full_name_works(net):
    assert all("encoder_attn.q_proj" in name for name in find_targets(net, "encoder_attn.q_proj"))
    full = "model.decoder.layers.1.fc2"
    assert list(find_targets(net, full)) == [full]


def test_a_regex_matches_the_whole_name(net):
    found = find_targets(net, r".*decoder.*\.fc[12]")
    assert set(found) == {f"model.decoder.layers.{i}.fc{j}" for i in (0, 1) for j in (1, 2)}
    with pytest.raises(UserError):
        find_targets(net, r"fc[12]")


def test_no_match_lists_the_choices(net):
    with pytest.raises(UserError, match="query") as raised:
        find_targets(net, "query")
    assert all(choice in str(raised.value) for choice in ("all-linear", "regex", *SUFFIXES))


@pytest.mark.parametrize("pattern", ["(q_proj", "[", "*q_proj"])
def test_a_bad_regex_is_told_as_one(net, pattern):
    with pytest.raises(UserError, match="no regex"):
        find_targets(net, pattern)


@pytest.mark.parametrize("empty", ["", ",", " "])
def test_an_empty_specification_matches_nothing(net, empty):
    with pytest.raises(UserError, match="match no linear layer"):
        find_targets(net, empty)


@pytest.mark.parametrize(
    "target_modules", ["all-linear", r".*decoder.*\.fc[12]", r".*\.(q|v)_proj", r".*encoder.*proj"]
)
def test_a_string_selects_what_it_selects_in_peft(net, target_modules):
    assert set(find_targets(net, target_modules)) == peft_names(net, target_modules)


@quick
@given(chosen=st.sets(st.sampled_from((*SUFFIXES, "self_attn.q_proj", "0.fc1")), min_size=1))
def test_suffixes_select_what_the_list_selects_in_peft(net, chosen):
    assert set(find_targets(net, ",".join(chosen))) == peft_names(net, sorted(chosen))


sizes = st.tuples(st.integers(2, 4), st.integers(2, 4))


@quick
@given(shapes=st.lists(sizes, min_size=1, max_size=8))
def test_groups_part_the_layers_by_shape(shapes):
    targets = {f"layer{i}": nn.Linear(*shape) for i, shape in enumerate(shapes)}
    groups = group_by_shape(targets, rank=2)
    assert sorted(name for group in groups for name in group.modules) == sorted(targets)
    assert len({group.key for group in groups}) == len(groups) == len(set(shapes))
    for group in groups:
        assert list(group.modules) == [name for name in targets if name in group.modules]
        for name in group.modules:
            assert targets[name].weight.shape == (group.out_features, group.in_features)
    assert [group.modules[0] for group in groups] == sorted(group.modules[0] for group in groups)


def test_sites_have_the_documented_names_shapes_and_dims():
    group = Group(("a", "b", "c"), out_features=5, in_features=7, rank=2)
    assert group.sites == (group.A, group.B)
    assert (group.A.name, group.A.shape) == ("A_5x7", (3, 2, 7))
    assert (group.B.name, group.B.shape) == ("B_5x7", (3, 5, 2))
    assert (group.A.factor, group.B.factor) == ("A", "B")
    assert group.A.dims == ("module", "rank", "in_feature")
    assert group.B.dims == ("module", "out_feature", "rank")
    assert group.A.modules == group.B.modules == group.modules
    with group.plate() as index:
        assert len(index) == 3
        assert pyro.sample("x", pyro.distributions.Normal(0, 1)).shape == (3,)


@quick
@given(shapes=st.lists(sizes, min_size=1, max_size=4))
def test_rank_goes_from_one_to_the_smallest_dimension(shapes):
    targets = {f"layer{i}": nn.Linear(*shape) for i, shape in enumerate(shapes)}
    smallest = min(min(shape) for shape in shapes)
    for rank in (1, smallest):
        assert {group.rank for group in group_by_shape(targets, rank)} == {rank}
    for rank in (-1, 0, smallest + 1):
        with pytest.raises(UserError, match=f"rank {rank} .* from 1 to {smallest}"):
            group_by_shape(targets, rank)


@pytest.mark.parametrize(
    "chosen",
    [
        {"exclude_modules": "fc1,encoder_attn.q_proj"},
        {"exclude_modules": r".*decoder.*"},
        {"layers": (1,)},
        {"target_modules": "q_proj,fc2", "layers": (0,), "exclude_modules": "self_attn.q_proj"},
    ],
)
def test_layers_are_left_out_as_peft_leaves_them_out(net, chosen):
    options = {"target_modules": "q_proj,v_proj,fc1,fc2", **chosen}
    out, layers = options.get("exclude_modules"), options.get("layers")
    theirs = peft.LoraConfig(
        target_modules=options["target_modules"].split(","),
        exclude_modules=out if out is None or "*" in out else out.split(","),
        layers_to_transform=layers and list(layers),
    )
    found = find_targets(net, **options)
    assert set(found) == peft_names_of(net, theirs)
    assert 0 < len(found) < len(find_targets(net, options["target_modules"]))


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"exclude_modules": "q_prj"}, "exclude modules 'q_prj' match none of .*mean q_proj"),
        ({"exclude_modules": "("}, r"exclude modules '\(' is no regex"),
        ({"exclude_modules": ".*"}, "leave none of the target modules 'all-linear'"),
        ({"layers": (0, 7)}, "layers has 7, and the target modules are in layers 0, 1; give some"),
    ],
)
def test_leaving_out_what_is_not_there_or_everything_is_refused(net, chosen, words):
    with pytest.raises(UserError, match=words):
        find_targets(net, "all-linear", **chosen)


def test_the_first_rank_pattern_that_matches_counts_and_groups_differ_by_rank(net):
    targets = find_targets(net, "q_proj,k_proj")
    pattern = {r"decoder\..*self_attn.q_proj": 3, "q_proj": 5}
    groups = group_by_shape(targets, 2, pattern)
    ranks = {name: group.rank for group in groups for name in group.modules}
    assert {name.rpartition(".")[2]: rank for name, rank in ranks.items() if rank != 3} == {
        "q_proj": 5,
        "k_proj": 2,
    }
    assert {name for name, rank in ranks.items() if rank == 3} == {
        name for name in targets if "decoder" in name and "self_attn.q_proj" in name
    }
    assert len({group.key for group in groups}) == len(groups) == 3
    names = [site.name for group in groups for site in group.sites]
    assert len({*names}) == len(names)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ({"q_prj": 2}, "rank pattern 'q_prj' matches none of the .*did you mean q_proj"),
        ({"q_proj": 99}, "rank 99 of .*q_proj is not possible here; give one from 1 to 16"),
        ({"(": 2}, r"rank pattern '\(' is no regex"),
    ],
)
def test_a_rank_pattern_that_cannot_be_is_refused(net, pattern, words):
    with pytest.raises(UserError, match=words):
        group_by_shape(find_targets(net, "all-linear"), 2, pattern)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("pattern", [{}, {"fc1": 3, r"encoder.*q_proj": 5}])
def test_updates_are_scaled_as_in_peft(net, use_rslora, pattern):
    targets = find_targets(net, "all-linear")
    groups = group_by_shape(targets, 2, pattern, use_rslora)
    ours = Adapters(net, groups, alpha=5.0).scaling_of_layer
    theirs = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=[*targets], rank_pattern=pattern, use_rslora=use_rslora
    )
    layers = peft.get_peft_model(copy.deepcopy(net), theirs).base_model.model
    expected = {name: layers.get_submodule(name).scaling["default"] for name in targets}
    assert ours == pytest.approx(expected)


def test_an_adapted_layer_computes_the_updated_weight(net, batch, groups):
    adapters = Adapters(net, groups, alpha=6.0)
    assert set(adapters.scaling_of_layer.values()) == {6.0 / 4}
    factors = random_factors(groups)
    for group in groups:
        for i, name in enumerate(group.modules):
            layer = net.get_submodule(name)
            x = torch.randn(3, 5, group.in_features)
            delta = 6.0 / 4 * factors[group.B.name][i] @ factors[group.A.name][i]
            with adapters.using(factors):
                output = layer(x)
            expected = functional.linear(x, layer.weight + delta, layer.bias)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_factors_get_gradients_and_the_base_none(net, batch, groups):
    net.requires_grad_(False)
    factors = {name: value.requires_grad_() for name, value in random_factors(groups).items()}
    with Adapters(net, groups, alpha=8.0).using(factors):
        net(
            input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
        ).logits.square().sum().backward()
    for value in factors.values():
        assert value.grad.shape == value.shape
        assert (value.grad.flatten(1).abs().sum(-1) > 0).all()  # every layer took part
    assert all(parameter.grad is None for parameter in net.parameters())


def test_factors_are_cast_to_the_dtype_of_the_input(net, batch, groups):
    net.bfloat16()
    with Adapters(net, groups, alpha=8.0).using(random_factors(groups)):
        output = net(
            input_features=batch.input_features.bfloat16(),
            decoder_input_ids=batch.decoder_input_ids,
        ).logits
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


def test_using_clear_and_remove_restore_the_base_exactly(net, batch, groups):
    base = logits(net, batch)
    names = [name for name, _ in net.named_parameters()]
    adapters = Adapters(net, groups, alpha=8.0)
    assert torch.equal(logits(net, batch), base)  # hooks are idle until factors come

    with adapters.using(random_factors(groups)):
        inside = logits(net, batch)
    assert not torch.allclose(inside, base, atol=1e-2)
    assert torch.equal(logits(net, batch), base)

    adapters.put(random_factors(groups))
    assert not torch.equal(logits(net, batch), base)
    adapters.clear()
    assert torch.equal(logits(net, batch), base)

    adapters.put(random_factors(groups))
    adapters.remove()
    assert torch.equal(logits(net, batch), base)
    assert not any(module._forward_hooks for module in net.modules())
    assert [name for name, _ in net.named_parameters()] == names


def test_using_clears_after_an_error(net, batch, groups):
    base = logits(net, batch)
    with (
        pytest.raises(RuntimeError, match="inside"),
        Adapters(net, groups, alpha=8.0).using(random_factors(groups)),
    ):
        raise RuntimeError("inside")
    assert torch.equal(logits(net, batch), base)


def test_new_factors_take_the_place_of_old_ones(net, batch, groups):
    adapters = Adapters(net, groups, alpha=8.0)
    first, second = random_factors(groups), random_factors(groups)
    with adapters.using(second):
        expected = logits(net, batch)
    adapters.put(first)
    adapters.put(second)
    assert torch.equal(logits(net, batch), expected)


@pytest.mark.parametrize(
    ("name", "out_features"),
    [
        ("model.decoder.layers.7.fc1", 32),  # not there
        ("model.decoder.layers.0.fc1", 16),  # of another shape
        ("model.encoder.conv1", 16),  # not linear
    ],
)
def test_a_net_without_the_layer_is_refused(net, name, out_features):
    good = Group(("model.decoder.layers.0.fc2",), 16, 32, rank=2)
    with pytest.raises(UserError, match=rf"no linear layer {name} of shape {out_features}x16"):
        Adapters(net, (good, Group((name,), out_features, 16, rank=2)), alpha=4.0)


def test_a_refused_net_is_left_without_hooks(net):
    good = Group(("model.decoder.layers.0.fc2",), 16, 32, rank=2)
    with pytest.raises(UserError):
        Adapters(net, (good, Group(("nowhere",), 16, 16, rank=2)), alpha=4.0)
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"(?:(?:\w|.)+)+[!?]", "takes too long; give a simpler regex"),
        (r"([a-z0-9_.]+)+!", "match no linear layer"),  # nor as part of a name, without end
        ("a*" * 501, "is too large a regex"),
        ("(?:(?:a{99}){99}){99}", "is too large a regex"),
        ("(" * 450 + ")" * 450, "is no regex"),
        ("(?R)", "is no regex"),
    ],
)
def test_a_regex_beyond_the_bounds_is_refused(net, monkeypatch, pattern, words):
    monkeypatch.setattr("blora_pyro.adapters.PATTERN_SECONDS", 0.05)
    with pytest.raises(UserError, match=words) as caught:
        find_targets(net, pattern)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_finite_is_what_has_neither_nan_nor_infinity():
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        values = torch.zeros(3, 4, dtype=dtype)
        assert is_finite(values) and is_finite(values[:0])
        for bad in (float("nan"), float("inf"), -float("inf")):
            values[1, 2] = bad
            assert not is_finite(values)
    assert is_finite(torch.arange(3)) and is_finite(torch.tensor([True]))
    assert not is_finite(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (
            "decoder.*q_proj",
            r"no linear layer by its whole name, but part of 4, such as mo",
        ),
        ("decoder.*q_proj", r"did you mean '\.\*decoder\.\*q_proj\.\*'"),
        ("q_prj,v_proj2", r"no linear layer \(did you mean q_proj, v_proj\?\)"),
        ("nothing.*", r"no linear layer; give 'all-linear', a regex of whole names"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_what_is_near(net, pattern, words):
    with pytest.raises(UserError, match=words):
        find_targets(net, pattern)
