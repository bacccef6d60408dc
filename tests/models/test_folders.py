"""The Hub in these tests is a stand-in on this machine, see `hub_stand_in.py`."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from blora_pyro.diagnostics.data_check import load_processor
from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.models.folders import check_folder, find_folder
from blora_pyro.runs.finished import merge_run
from blora_pyro.runs.folders import ADAPTER


@pytest.fixture
def repository(fluent_folder, tmp_path) -> Path:
    """What the Hub holds: a checkpoint, and much that no one needs."""
    folder = shutil.copytree(fluent_folder, tmp_path / "repository")
    for name in ("pytorch_model.bin", "model.fp32-00001-of-00002.safetensors", "README.md"):
        (folder / name).write_text("not wanted")
    return folder


@pytest.fixture
def commit(hub, repository) -> str:
    """Of `someone/whisper`, whose only revisions are `main` and a tag, `v1`."""
    return hub.add("someone/whisper", repository)


def test_a_hub_id_is_downloaded_with_what_is_needed_and_no_more(commit, repository):
    folder = find_folder("someone/whisper")
    wanted = {path.name for path in repository.iterdir()}
    wanted -= {"pytorch_model.bin", "model.fp32-00001-of-00002.safetensors", "README.md"}
    assert {path.name for path in folder.iterdir()} == wanted
    for name in wanted:
        assert (folder / name).read_bytes() == (repository / name).read_bytes()
    assert load_base("someone/whisper").folder == folder


def test_weights_are_left_where_they_are_not_wanted(commit):
    _, extractor, max_tokens, *_ = load_processor("someone/whisper")
    assert (extractor.feature_size, max_tokens) == (8, 24)
    folder = find_folder("someone/whisper", local_files_only=True)
    assert "config.json" in {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.safetensors*"))
    assert load_base("someone/whisper").folder == folder  # what lacked has come


def test_a_downloaded_base_is_there_when_the_hub_is_not(hub, commit, monkeypatch):
    folder = find_folder("someone/whisper")
    hub.requests.clear()
    assert find_folder("someone/whisper", local_files_only=True) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_folder("someone/whisper") == folder
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no one listens
    assert find_folder("someone/whisper") == folder


def test_a_cache_that_lacks_only_what_is_not_needed_will_do(commit):
    folder = find_folder("someone/whisper")
    (folder / "vocab.json").unlink()
    assert find_folder("someone/whisper", local_files_only=True) == folder
    check_folder("someone/whisper", folder)


def test_a_revision_is_a_branch_a_tag_or_a_commit(commit):
    for revision in (None, "main", "v1", commit):
        assert find_folder("someone/whisper", revision).name == commit
    with pytest.raises(UserError, match=r"no revision 'v2'.*branch, tag or commit"):
        find_folder("someone/whisper", "v2")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("someone/nothing", "no such repository, or a private one"),
        ("someone/gated", "gated; ask for access"),
        ("someone/down", "can't be reached"),
        ("/nowhere", "does not exist"),
        ("./nowhere", "does not exist"),
        ("no/such/folder", "does not exist"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line_after_one_request(hub, name, words):
    with pytest.raises(UserError, match=words) as caught:
        find_folder(name)
    assert "\n" not in str(caught.value)
    assert f"'{name}'" in str(caught.value)
    assert len(hub.requests) <= 1


def test_a_hub_out_of_reach_is_asked_once(hub, monkeypatch):
    tries = []
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    session = huggingface_hub.get_session()
    send = session.send
    monkeypatch.setattr(session, "send", lambda *a, **b: tries.append(1) or send(*a, **b))
    with pytest.raises(
        UserError, match=r"not in the Hub's cache, and the Hub can't be reached \(Conn"
    ):
        find_folder("someone/whisper")
    assert len(tries) == 1


def test_offline_says_so(hub, monkeypatch):
    with pytest.raises(UserError, match=r"'someone/whisper' at revision 'v1'.*local-files-only"):
        find_folder("someone/whisper", "v1", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; leave that out to download it"):
        find_folder("someone/whisper")
    assert hub.requests == []


def test_a_local_folder_has_no_revision_and_is_no_file(fluent_folder):
    assert find_folder(str(fluent_folder)) == fluent_folder
    with pytest.raises(UserError, match="revision 'v1' is given with a local folder"):
        find_folder(str(fluent_folder), "v1")
    with pytest.raises(UserError, match=r"config\.json' is a file; give the folder"):
        find_folder(str(fluent_folder / "config.json"))


# ---- what a folder lacks


@pytest.fixture
def checkpoint(fluent_folder, tmp_path) -> Path:
    return shutil.copytree(fluent_folder, tmp_path / "checkpoint")


def without(*names):
    def take_out(folder):
        for name in names:
            (folder / name).unlink()

    return take_out


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shards(*names):
    def split(folder):
        (folder / "model.safetensors").unlink()
        index = {"weight_map": dict.fromkeys(names, names[0]) | {"w": names[-1]}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return split


TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (without("config.json"), "no config.json; give a folder with a Whisper checkpoint"),
        (written("config.json", "{"), "damaged config.json"),
        (written("config.json", "[]"), "damaged config.json"),
        (written("config.json", '{"model_type": "wav2vec2"}'), "no Whisper but a 'wav2vec2' model"),
        (written("adapter_config.json", "{}"), "holds an adapter.*blora-pyro merge"),
        (without(*TOKENIZER), "lacks its tokenizer: tokenizer.json, or vocab.json and merges.txt"),
        (without("tokenizer.json", "merges.txt"), "lacks its tokenizer"),
        (without("preprocessor_config.json"), "lacks preprocessor_config.json"),
        (without("model.safetensors"), "no safetensors weights"),
        (pickled, "pytorch_model.bin, which is pickled, is never read.*save_pretrained"),
        (shards("model-00001-of-00002.safetensors"), "lacks model-00001-of-00002.safetensors"),
        (shards("a.safetensors", "pytorch_model.bin"), "damaged model.safetensors.index.json"),
    ],
)
def test_a_folder_says_what_it_lacks(checkpoint, harm, words):
    harm(checkpoint)
    with pytest.raises(UserError, match=words) as caught:
        load_base(str(checkpoint))
    assert "\n" not in str(caught.value)
    assert str(checkpoint) in str(caught.value)


# ---- an adapter as a base


def test_an_adapter_is_a_base_that_it_is_merged_into(finished_run, tmp_path):
    merge_run(finished_run.output, tmp_path)
    merged, base = load_base(str(tmp_path)), load_base(str(finished_run.output))
    assert base.name == str(finished_run.output)
    for name, weight in merged.net.state_dict().items():
        torch.testing.assert_close(base.net.state_dict()[name], weight, msg=name)
    half = load_base(str(finished_run.output), dtype="bfloat16").net.state_dict()
    assert all(torch.equal(half[k], one.bfloat16()) for k, one in base.net.state_dict().items())
    base.save_pretrained(tmp_path / "again")  # a checkpoint as any other
    assert load_base(str(tmp_path / "again")).net.config.model_type == "whisper"
    assert load_processor(str(finished_run.output))[2] == merged.net.config.max_target_positions


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (written("adapter_config.json", "{}"), "does not name its base"),
        (written("adapter_config.json", "{"), "damaged adapter_config.json"),
        (without("adapter_model.safetensors"), "an adapter without adapter_model.safetensors"),
        (written("adapter_model.safetensors", "no tensors"), "an adapter that can't be merged"),
    ],
)
def test_an_adapter_that_is_no_base_says_why(finished_run, tmp_path, harm, words):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ADAPTER:
        shutil.copyfile(finished_run.output / name, folder / name)
    harm(folder)
    with pytest.raises(UserError, match=words) as caught:
        load_base(str(folder))
    assert "\n" not in str(caught.value)


def renamed(old: str, new: str):
    """Give tensors of an adapter other names, as a net inside another module has them."""

    def harm(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors")

    return harm


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "base_model.model.",
            "base_model.model.module.",
            r"layer for \(base_model.model.module.*,",
        ),
        ("decoder.layers.1.", "decoder.layers.9.", r"layer for \(base_model.*layers\.9\."),
        ("lora_A", "lora_C", r"layer for \(base_model.*lora_C"),
    ],
)
def test_an_adapter_whose_tensors_do_not_fit_the_base_is_refused_by_their_names(
    finished_run, tmp_path, old, new, words
):
    for name in ADAPTER:
        shutil.copyfile(finished_run.output / name, tmp_path / name)
    renamed(old, new)(tmp_path)
    with pytest.raises(
        UserError, match=r"with \d+ tensors that the base has no " + words
    ) as caught:
        load_base(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_adapter_that_lacks_tensors_is_refused_by_their_names(finished_run, tmp_path):
    for name in ADAPTER:
        shutil.copyfile(finished_run.output / name, tmp_path / name)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lost = next(iter(tensors))
    del tensors[lost]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"1 tensors missing \({lost}\)"):
        load_base(str(tmp_path))


def test_an_adapter_of_tied_weights_is_refused_where_it_would_be_merged(fluent_folder, tmp_path):
    net = load_base(str(fluent_folder)).net
    config = LoraConfig(
        base_model_name_or_path=str(fluent_folder), target_modules=["proj_out"], r=2
    )
    adapted = get_peft_model(net, config)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"can't be merged: its logits would change by"):
        load_base(str(tmp_path))
