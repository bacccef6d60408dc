from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from blora_pyro.data import Examples, read_manifest
from blora_pyro.errors import UserError
from blora_pyro.fitting.encoder_cache import EncoderCache
from blora_pyro.guides import build_prior
from blora_pyro.models import BLoRA, encoder_states
from blora_pyro.options import FitConfig
from blora_pyro.runs.fits import fit

DECODER = r".*decoder.*"
LATER = r".*(encoder\.layers\.1|decoder).*"  # of two layers of the encoder


@pytest.fixture
def examples(fluent_base, tones_folder):
    rows = read_manifest(tones_folder / "train.jsonl")
    return Examples(rows, fluent_base.feature_extractor, fluent_base.tokenizer)


def program(base, targets=DECODER, **options):
    return BLoRA(base.net, build_prior("normal"), rank=4, target_modules=targets, **options)


KNOBS = [
    {"target_modules": DECODER, "distillation": 0.5, "distillation_languages": ("en",)},
    {"target_modules": LATER, "gradient_accumulation": 2, "estimator": "flipout"},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_a_fit_is_the_same_with_it_and_without(fit_options, knobs):
    options = {**fit_options, "steps": 5, **knobs}
    plain, cached = (
        fit(FitConfig(**options, cache_encoder=cache), evaluate=False).history
        for cache in (False, True)
    )
    assert [step.loss for step in cached] == pytest.approx([step.loss for step in plain], rel=1e-4)
    assert abs(plain[-1].nll - plain[0].nll) > 0.01 * plain[0].nll


@pytest.mark.parametrize(("targets", "calls"), [(DECODER, (2, 2)), (LATER, (2, 4))])
def test_every_utterance_is_heard_once(fluent_base, examples, targets, calls):
    model = program(fluent_base, targets)
    cache = EncoderCache(model, len(examples))
    counts = [0, 0]

    def count(layer):
        def hook(*_):
            counts[layer] += 1

        return fluent_base.net.model.encoder.layers[layer].register_forward_hook(hook)

    hooks = [count(0), count(1)]
    for number in range(4):
        model(cache(examples.batch([0, 1]), [0, 1], number))
    for hook in hooks:
        hook.remove()
    assert tuple(counts) == calls


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
        (torch.float16, None),
    ],
)
def test_states_are_the_same_to_the_bit_whatever_the_batches(
    fluent_base, examples, dtype, autocast
):
    fluent_base.net.to(dtype)
    model = program(fluent_base, LATER, autocast=autocast)
    one, other = (EncoderCache(model, len(examples)) for _ in range(2))
    first = one(examples.batch([1, 0, 1]), [1, 0, 1], 0).encoder_states
    other(examples.batch([0]), [0], 0)
    second = other(examples.batch([0, 1]), [0, 1], 1).encoder_states
    assert torch.equal(first[[1, 0]], second) and torch.equal(first[0], first[2])
    assert first.shape == (3, 50, 16) and first.dtype == dtype
    assert one.states.size == 2 * 50 * 16 * dtype.itemsize
    expected = model.likelihood.frozen_states(examples.batch([0, 1]).input_features)
    assert expected.dtype == dtype and not torch.equal(expected[0], expected[1])
    assert torch.allclose(second.float(), expected.float(), atol=1e-5, rtol=1e-2)


def test_batches_on_a_device_keep_the_states(fluent_base, examples):
    batch = EncoderCache(program(fluent_base), 2)(examples.batch([0, 1]), [0, 1], 0)
    assert torch.equal(batch.to("cpu").encoder_states, batch.encoder_states)


def test_nothing_of_an_adapted_first_layer_can_be_kept(fit_options):
    with pytest.raises(UserError, match="target_modules adapts the encoder's first layer"):
        fit(FitConfig(**fit_options, cache_encoder=True))


def test_too_small_a_disk_is_refused_before_the_fit(fluent_base, monkeypatch, cache_dir):
    free = namedtuple("usage", "free")(10_000)
    monkeypatch.setattr(encoder_states.shutil, "disk_usage", lambda folder: free)
    model = program(fluent_base)
    EncoderCache(model, 3)  # of 3,200 bytes each
    with pytest.raises(UserError, match=r"needs 0\.0 GB for 4 utterances.*has 0\.0 GB.*_CACHE"):
        EncoderCache(model, 4)
    assert list(cache_dir.iterdir()) == []  # the files have no names


def test_a_folder_that_can_not_be_written_is_named(fluent_base, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BLORA_PYRO_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(UserError, match=r"can't write into .*folder \("):
        EncoderCache(program(fluent_base), 2)


def test_a_disk_that_fills_up_is_told_in_one_line(fluent_base, examples):
    cache = EncoderCache(program(fluent_base), 2)
    cache.states._file = open("/dev/full", "r+b", buffering=0)
    with cache.states._file, pytest.raises(UserError, match=r"No space left on device.*resume"):
        cache(examples.batch([0]), [0], 0)


@pytest.mark.parametrize("other", ["spec_augment", "trim_audio"])
def test_it_is_refused_where_no_two_batches_hear_the_same(other):
    with pytest.raises(UserError, match=f"cache_encoder and {other} are given.*leave one out"):
        FitConfig(cache_encoder=True, **{other: True})


def test_without_a_cache_folder_it_is_among_the_temporary_files(fluent_base, examples, monkeypatch):
    monkeypatch.setenv("BLORA_PYRO_CACHE", "")
    cache = EncoderCache(program(fluent_base), 2, lambda batch, *_: replace(batch, sources=None))
    batch = cache(examples.batch([1]), [1], 0)
    assert batch.encoder_states is not None and batch.sources is None


def test_two_fits_to_the_same_data_share_the_states(fluent_base, examples):
    model, heard = program(fluent_base), []
    hook = fluent_base.net.model.encoder.conv1.register_forward_hook(lambda *_: heard.append(1))
    for fingerprint in ("a", "a", "b"):
        cache = EncoderCache(model, len(examples), fingerprint=fingerprint)
        cache(examples.batch([0, 1]), [0, 1], 0)
    hook.remove()
    assert len(heard) == 4  # two utterances, of two data sets
