"""The Hub in these tests is a few files behind a server on this machine."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from blora_pyro.checking import load_processor
from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.models.folders import check_folder, find_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {  # status and error code, as the Hub has them
    "someone/nothing": (401, "RepoNotFound"),
    "someone/gated": (403, "GatedRepo"),
    "someone/down": (500, None),
}


class Hub(BaseHTTPRequestHandler):
    """One repository, `someone/whisper`, whose only revisions are `main` and a tag, `v1`."""

    folder: Path
    requests: list[str]

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.requests.append(path)
        for name, (status, code) in REFUSALS.items():
            if f"/{name}/" in path:
                return self.answer(status, X_Error_Code=code or "")
        files = {file.name: file for file in self.folder.iterdir()}
        if "/revision/" in path:
            if path.rpartition("/")[2] not in ("main", "v1", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            info = {"id": "someone/whisper", "sha": COMMIT, "siblings": []}
            return self.answer(200, json.dumps(info).encode())
        if "/tree/" in path:
            rows = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": name}
                for name, file in files.items()
            ]
            return self.answer(200, json.dumps(rows).encode())
        content = files[path.rpartition("/")[2]].read_bytes()
        return self.answer(200, content, ETag=f'"{len(content)}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def repository(fluent_folder, tmp_path) -> Path:
    """What the Hub holds: a checkpoint, and much that no one needs."""
    folder = shutil.copytree(fluent_folder, tmp_path / "repository")
    for name in ("pytorch_model.bin", "model.fp32-00001-of-00002.safetensors", "README.md"):
        (folder / name).write_text("not wanted")
    return folder


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    """The Hub within reach, and an empty cache."""
    handler = type("Handler", (Hub,), {"folder": repository, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()


def test_a_hub_id_is_downloaded_with_what_is_needed_and_no_more(hub, repository):
    folder = find_folder("someone/whisper")
    wanted = {path.name for path in repository.iterdir()}
    wanted -= {"pytorch_model.bin", "model.fp32-00001-of-00002.safetensors", "README.md"}
    assert {path.name for path in folder.iterdir()} == wanted
    for name in wanted:
        assert (folder / name).read_bytes() == (repository / name).read_bytes()
    assert load_base("someone/whisper").folder == folder


def test_weights_are_left_where_they_are_not_wanted(hub):
    _, extractor, max_tokens = load_processor("someone/whisper")
    assert (extractor.feature_size, max_tokens) == (8, 24)
    folder = find_folder("someone/whisper", local_files_only=True)
    assert "config.json" in {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.safetensors*"))
    assert load_base("someone/whisper").folder == folder  # what lacked has come


def test_a_downloaded_base_is_there_when_the_hub_is_not(hub, monkeypatch):
    folder = find_folder("someone/whisper")
    hub.requests.clear()
    assert find_folder("someone/whisper", local_files_only=True) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_folder("someone/whisper") == folder
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no one listens
    assert find_folder("someone/whisper") == folder


def test_a_cache_that_lacks_only_what_is_not_needed_will_do(hub):
    folder = find_folder("someone/whisper")
    (folder / "vocab.json").unlink()
    assert find_folder("someone/whisper", local_files_only=True) == folder
    check_folder("someone/whisper", folder)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    for revision in (None, "main", "v1", COMMIT):
        assert find_folder("someone/whisper", revision).name == COMMIT
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


def test_a_run_folder_is_no_base(finished_run):
    with pytest.raises(UserError, match="holds an adapter"):
        load_base(str(finished_run.output))
