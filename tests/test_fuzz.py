"""Whatever a stored file holds, it is read, or refused in one line; nothing is run.

A good file's JSON is changed in one to three places. The cases are always the same few; many more
are tried by hand, others every time:

    BLORA_PYRO_FUZZ_CASES=10000 pytest -p no:xdist tests/test_fuzz.py

Another kind of file is another entry of `TARGETS`.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from blora_pyro.adapters import Group
from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.models.base import _merged
from blora_pyro.models.folders import ADAPTER_CONFIG, check_folder, weight_files
from blora_pyro.models.peft_adapters import lora_config
from blora_pyro.models.stored_config import (
    check_sizes,
    read_config,
    read_extractor,
    read_generation,
)
from blora_pyro.posterior import Family, Posterior
from blora_pyro.posterior.storage import POSTERIOR_FILE

CASES = int(os.environ.get("BLORA_PYRO_FUZZ_CASES", "0"))


class World(NamedTuple):
    """A folder for one file after another, the files that stay, and a net."""

    folder: Path
    checkpoint: Path
    net: Any


class Target(NamedTuple):
    """A kind of stored JSON: a good one, and what writes a changed one and reads it."""

    good: Callable[[World], Any]
    read: Callable[[World, Any], object]


# ---- the kinds


def posterior(pooled: bool) -> Posterior:
    """Of two layers of a shape of their own, of one domain or two."""
    kind = {"kind": "hierarchical", "domains": ("a", "b"), "scale": 0.5} if pooled else None
    layers = ("model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1")
    group = Group(layers, 32, 16, 2, (0.1, 0.2))
    groups: tuple[Group, ...] = (group,)
    pooling = None
    if kind is not None:
        from blora_pyro.models import Pooling

        pooling = Pooling(**kind)  # type: ignore[arg-type]
        groups = pooling.stack(groups)
    sites = [site for one in groups for site in one.sites]
    moments = [{site.name: torch.full(site.shape, value) for site in sites} for value in (0.0, 0.1)]
    return Posterior(
        "tiny", groups, 4.0, *moments, Family("normal", {"scale": 0.5}), pooling=pooling
    )


TENSORS: dict[bool, dict[str, torch.Tensor]] = {}


def good_posterior(pooled: bool) -> Callable[[World], Any]:
    def make(world: World) -> Any:
        from safetensors import safe_open

        posterior(pooled).save(world.folder / "good")
        with safe_open(world.folder / "good" / POSTERIOR_FILE, framework="pt") as file:
            TENSORS[pooled] = {name: file.get_tensor(name) for name in file.keys()}
            return json.loads(file.metadata()["blora_pyro"])

    return make


def read_posterior(pooled: bool) -> Callable[[World, Any], object]:
    def read(world: World, content: Any) -> None:
        run = world.folder / "run"
        run.mkdir(exist_ok=True)
        about = {"blora_pyro": json.dumps(content)}
        save_file(TENSORS[pooled], run / POSTERIOR_FILE, metadata=about)
        loaded = Posterior.load(run)
        loaded.sparsity()
        domain = loaded.pooling.domains[0] if loaded.pooling else None
        one = loaded.for_domain(domain)
        list(one.delta_weights())
        loaded.save(world.folder / "saved")
        for part in (lambda: loaded.prior, lambda: next(loaded.draws(1))):
            try:
                part()
            except UserError as error:
                assert "\n" not in str(error)

    return read


def good_adapter(world: World) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], rank_pattern={"fc1": 3})
    peft.get_peft_model(copy.deepcopy(world.net), config).save_pretrained(world.folder / "adapter")
    return json.loads((world.folder / "adapter" / ADAPTER_CONFIG).read_text())


def read_adapter(world: World, content: Any) -> None:
    folder = world.folder / "adapter"
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content))
    lora_config("x", folder, world.net)
    if CASES:
        _merged("x", copy.deepcopy(world.net), folder)


def checkpoint_file(name: str) -> Target:
    """A JSON file of a checkpoint; by hand now and then a whole base is loaded with it."""

    def good(world: World) -> Any:
        shutil.copytree(world.checkpoint, world.folder / name)
        path = world.folder / name / name
        return json.loads(path.read_text()) if path.exists() else {"weight_map": {}}

    def read(world: World, content: Any) -> None:
        folder = world.folder / name
        (folder / name).write_text(json.dumps(content))
        check_folder("x", folder)
        weight_files("x", folder)
        check_sizes("x", folder, read_config("x", folder))
        read_generation("x", folder)
        read_extractor("x", folder)
        if CASES and sum(json.dumps(content).encode()) % 20 == 0:
            load_base(str(folder))

    return Target(good, read)


TARGETS = {
    "posterior": Target(good_posterior(False), read_posterior(False)),
    "posterior of two domains": Target(good_posterior(True), read_posterior(True)),
    "adapter_config": Target(good_adapter, read_adapter),
    "config": checkpoint_file("config.json"),
    "generation_config": checkpoint_file("generation_config.json"),
    "preprocessor_config": checkpoint_file("preprocessor_config.json"),
}


# ---- changed content

ODD = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 10**9, 10**30, 0.5, 1e308, float("nan"), float("inf")),
        *("", "x", "normal", "../../../x", "/etc/x", "evil.py", "evil.py/", "evil", "\x1b]0;x\x07"),
        *("(.*.*)*x", "(", "all-linear", "\ud800", "a\nb", [], {}, [[]], [{}], {"a": {}}, ["x"]),
    ]
)
# Copies: what is drawn is changed further.
VALUES = ODD.map(copy.deepcopy) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def places(content: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in JSON, the whole among them."""
    inner = content.items() if isinstance(content, dict) else ()
    inner = enumerate(content[:3]) if isinstance(content, list) else inner
    return [at, *(place for key, one in inner for place in places(one, (*at, key)))]


@st.composite
def changed(draw: Any, good: Any) -> Any:
    content = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(content))) or (None,)
        if last is None:
            if draw(st.booleans()):  # else it is seldom anything else than no object
                return draw(VALUES)
            continue
        parent = content
        for key in way:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "delete", "add"]))
        if how == "delete":
            del parent[last]
        elif how == "replace" or isinstance(parent, list):
            parent[last] = draw(VALUES)
        else:
            parent[draw(st.text(max_size=5) | st.sampled_from(["auto_map", "name"]))] = draw(VALUES)
    return content


@pytest.fixture(scope="module")
def world(tmp_path_factory, fluent_folder) -> World:
    from transformers import WhisperForConditionalGeneration

    net = WhisperForConditionalGeneration.from_pretrained(fluent_folder)
    return World(tmp_path_factory.mktemp("fuzz"), fluent_folder, net)


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, about odd values
@pytest.mark.parametrize("kind", TARGETS)
def test_whatever_a_file_holds_it_is_read_or_refused_in_one_line(world, kind, monkeypatch):
    monkeypatch.chdir(world.folder)
    monkeypatch.syspath_prepend(world.folder)
    Path("evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    good, read = TARGETS[kind]
    content, refused = good(world), []
    read(world, content)

    @settings(
        derandomize=not CASES,
        max_examples=CASES or 100,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changed(content))
    def try_one(case: Any) -> None:
        try:
            read(world, case)
        except UserError as error:
            refused.append(str(error))
            assert "\n" not in str(error) and len(str(error)) < 1000
        assert not Path("ran").exists()

    try_one()
    assert len(refused) > 20
    outside = {path.name for path in world.folder.parent.iterdir()} - {world.folder.name}
    assert "x" not in outside
