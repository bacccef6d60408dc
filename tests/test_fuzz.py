"""Whatever a stored file holds, it is read, or refused in one line; nothing is run.

A good file's JSON is changed in one to three places; a Parquet file is made of JSON that is. The
cases are always the same few; many more are tried by hand, others every time:

    BLORA_PYRO_FUZZ_CASES=10000 pytest -p no:xdist tests/test_fuzz.py

Another kind of file is another entry of `TARGETS`.
"""

import copy
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pyarrow
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import save_file

from blora_pyro.adapters import Group
from blora_pyro.data import Encoder, Examples, Stream, load_mixture, stream_split
from blora_pyro.diagnostics.data_check import check_data
from blora_pyro.errors import UserError
from blora_pyro.fitting.history import Step
from blora_pyro.models import Base, load_base
from blora_pyro.models.base import _merged
from blora_pyro.models.folders import ADAPTER_CONFIG, check_folder, weight_files
from blora_pyro.models.peft_adapters import lora_config
from blora_pyro.models.stored_config import (
    check_sizes,
    read_config,
    read_extractor,
    read_generation,
    read_tokenizer,
)
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Family, Posterior
from blora_pyro.posterior.storage import POSTERIOR_FILE
from blora_pyro.publishing.uploads import write_public_run
from blora_pyro.runs.conversion import Which
from blora_pyro.runs.fit_folders import FitFolder
from blora_pyro.runs.folders import RUN, UTTERANCES, read_run
from blora_pyro.runs.listing import list_runs, run_tables
from blora_pyro.runs.record import METRICS, RunRecord, versions
from blora_pyro.runs.report_page import write_report
from blora_pyro.runs.shown import ShownRun, show_run, side_by_side
from blora_pyro.tables import report_text

CASES = int(os.environ.get("BLORA_PYRO_FUZZ_CASES", "0"))


class World(NamedTuple):
    """A folder for one file after another, the files that stay, and the base that they are."""

    folder: Path
    checkpoint: Path
    base: Base


class Target(NamedTuple):
    """A kind of stored JSON: a good one, what writes a changed one and reads it, and how often."""

    good: Callable[[World], Any]
    read: Callable[[World, Any], object]
    cases: int = 100


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
    peft.get_peft_model(copy.deepcopy(world.base.net), config).save_pretrained(
        world.folder / "adapter"
    )
    return json.loads((world.folder / "adapter" / ADAPTER_CONFIG).read_text())


def read_adapter(world: World, content: Any) -> None:
    folder = world.folder / "adapter"
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content))
    lora_config("x", folder, world.base.net)
    if CASES:
        _merged("x", copy.deepcopy(world.base.net), folder)


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
        config = read_config("x", folder)
        check_sizes("x", folder, config)
        read_generation("x", folder, config)
        read_extractor("x", folder)
        if CASES and sum(json.dumps(content).encode()) % 20 == 0:
            load_base(str(folder))

    return Target(good, read)


# Of a column of Parquet; 0 is what pyarrow makes of the values.
TYPES = [
    None,
    *(pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.binary(4)),
    *(pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), pyarrow.null(), pyarrow.bool_()),
    *(pyarrow.int8(), pyarrow.uint64(), pyarrow.float16(), pyarrow.float64()),
    *(pyarrow.decimal128(5, 2), pyarrow.timestamp("ns", "Mars/Olympus"), pyarrow.duration("us")),
    *(pyarrow.date32(), pyarrow.time64("ns"), pyarrow.list_(pyarrow.string())),
    *(pyarrow.list_(pyarrow.float32(), 2), pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    pyarrow.struct({"path": pyarrow.string(), "bytes": pyarrow.binary()}),
    pyarrow.struct({"array": pyarrow.list_(pyarrow.float64()), "sampling_rate": pyarrow.int64()}),
]


def good_rows(form: str) -> Callable[[World], Any]:
    """A row, what differs in a second one, types of columns, and what `datasets` notes of them."""
    wave, file = np.sin(np.arange(1600)) / 2, io.BytesIO()
    soundfile.write(file, wave, 16_000, format="FLAC")
    sound: Any = {"bytes": file.getvalue().decode("latin-1")}
    if form == "array":
        sound = {"array": wave[:400].tolist(), "sampling_rate": 16_000}
    row = {"audio": {"path": "x.flac", **sound}, "text": "the red bicycle", "language": "en"}
    more = {"word_languages": ["en", "en", "de"], "duration": 0.1, "start": 0.0, "end": 0.02}
    value = {"dtype": "string", "_type": "Value"}
    features = {"text": value, "word_languages": {"feature": value, "_type": "List"}}
    about = {"info": {"features": features}}
    content = {"row": row | more, "second": {"text": "das rote fahrrad"}, "damage": 0}
    return lambda world: content | {"about": about, "types": dict.fromkeys(row | more, 0)}


def column(values: list[Any], kind: Any) -> pyarrow.Array:
    """Return values as a column of this type, or of another that can hold them."""
    for one in (kind, None):
        try:
            return pyarrow.array(values, one)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):
            pass
    return pyarrow.array([json.dumps(value) for value in values])


def write_rows(path: Path, content: Any) -> None:
    """Write a Parquet file, or raise what pyarrow or Python raises where it cannot be one."""
    rows, columns = [content["row"], content["row"] | content["second"]], {}
    for row in rows:
        if isinstance(sound := row["audio"], dict) and isinstance(sound.get("bytes"), str):
            sound["bytes"] = sound["bytes"].encode("latin-1")
    for name in rows[1]:
        kind = TYPES[content["types"].get(name, 0) % len(TYPES)]
        columns[name] = column([row.get(name) for row in rows], kind)
    about = {"huggingface": json.dumps(content["about"])}
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(about), path)
    if damage := content["damage"]:
        data = bytearray(path.read_bytes())
        data[damage % len(data)] ^= damage % 255 + 1
        path.write_bytes(data)


def read_rows(world: World, content: Any) -> None:
    path = str(world.folder / "rows.parquet")
    try:
        write_rows(Path(path), copy.deepcopy(content))
    except Exception:  # it is no file then
        return
    base, bad = world.base, list[UserError]()
    arguments = (base.feature_extractor, base.tokenizer)
    refusal = None
    for way in (
        lambda: check_data(path, str(world.checkpoint)),
        lambda: Examples(load_mixture(path, "train", bad.append), *arguments, on_bad=bad.append),
        lambda: Stream(stream_split(path, "train"), *arguments, on_bad=bad.append),
    ):
        try:
            way()
        except UserError as error:
            refusal = error
    for error in bad:
        assert "\n" not in str(error)
    if refusal:
        raise refusal


def tokenizer_file(name: str) -> Target:
    """A JSON file of a tokenizer, which then encodes a text."""

    def good(world: World) -> Any:
        folder = shutil.copytree(world.checkpoint, world.folder / name)
        tokens = world.base.tokenizer
        if name == "special_tokens_map.json":  # which tells nothing beside the other
            (folder / "tokenizer_config.json").unlink()
        path = folder / name
        return json.loads(path.read_text()) if path.exists() else {"pad_token": tokens.pad_token}

    def read(world: World, content: Any) -> None:
        folder = world.folder / name
        (folder / name).write_text(json.dumps(content))
        tokenizer = read_tokenizer("x", folder)
        Encoder(tokenizer).encode("the red bicycle", "en")

    return Target(good, read, 20)


def good_run(world: World) -> Any:
    """The `run.json` of a fit that is done, beside its posterior."""
    posterior(False).save(world.folder / "fitted")
    config = FitConfig(data="de-en", backward={"en": "en"}, keep=1, steps=2, target_modules="fc1")
    rates = {"new_domain": RATE, "backward_error": RATE, "forgetting": CHANGE}
    points = [{"strength": 0.0, **rates}, {"strength": 1.0, **rates}]
    record = RunRecord(
        state="finished",
        options=config.to_json(),
        config=config,
        language="en",
        training_utterances=6,
        training_tokens=60,
        temperature=0.006,
        adapter_weights=192,
        versions=versions(),
        seconds={"fit": 1.0, "total": 2.0},
        skipped_steps=0,
        history=[Step(step, 2.0, 1.5, 5.0, 1e-3, 60, 0.0, 1.0) for step in (1, 2)],
        kept={
            "limits": {"average": 0.01},
            "confidence": 0.9,
            "strength": 1.0,
            "losses": {"average": 0.0},
            "curve": {"split": "dev", "metric": "wer", "points": points},
        },
    )
    return record.to_json()


RATE = {"rate": 0.1, "interval": [0.05, 0.2]}
CHANGE = {"difference": 0.1, "interval": [0.05, 0.2]}
BOTH = {
    "base": {"metric": "wer", "wer": RATE},
    "adapted": {"metric": "wer", "wer": RATE, "loops": 1},
    "change": {"wer": CHANGE},
}


MEASURED = {
    **{"normalizer": "unicode", "heard": "x", "split": "test", "sets": {"en": "5e7"}},
    "new_domain": {"name": "de-en", **BOTH},
    "domains": {"calls": BOTH},
    "backward": {"en": {"drift": True, **BOTH}},
    "backward_error": {"base": RATE, "adapted": RATE, "change": CHANGE},
    "contract": {
        **{"limits": {"en": 0.1}, "strength": 1.0, "holds": True},
        "losses": {"average": 0.0, "en": 0.0},
    },
    "sparsity": {"A": 0.1, "B": 0.1, "delta_w": 0.1},
    "alarm": {"step": 2, "kept_step": 1, "reason": "x"},
}
HEARD = {
    **{"set": "en", "set_fingerprint": "5e7", "state": "adapted", "utterance": 0, "origin": "x"},
    **{"audio": "x.wav", "start": 0.0, "end": 1.0, "language": "en", "metric": "wer"},
    **{"edits": 1, "length": 2, "pier": {"edits": 0, "length": 1}},
    "alignment": [["=", "the", "the", "pier"], ["S", "red", "bed"]],
}


def reported(name: str, good: Any) -> Target:
    """Another file of a run, which its report shows."""

    def make(world: World) -> Any:
        (world.folder / name).mkdir()
        content = good_run(world)
        shutil.copytree(world.folder / "fitted", world.folder / name, dirs_exist_ok=True)
        (world.folder / name / RUN).write_text(json.dumps(content))
        (world.folder / name / METRICS).write_text(json.dumps(MEASURED))
        return good

    def read(world: World, content: Any) -> None:
        rows = content if isinstance(content, list) else [content]
        text = "\n".join(map(json.dumps, rows)) if name == UTTERANCES else json.dumps(content)
        (world.folder / name / name).write_text(text)
        write_report([world.folder / name])

    return Target(make, read, 20)


def read_one(world: World, content: Any) -> None:
    folder, public = world.folder / "fitted", world.folder / "public"
    (folder / RUN).write_text(json.dumps(content))
    public.mkdir(exist_ok=True)
    refusal = None
    for way in (
        lambda: FitFolder.reopen(folder, FitConfig()).fitted(),
        lambda: read_run(folder),
        lambda: Which(folder, None, None, True, None, "scale", None).fingerprint,
        lambda: write_public_run(folder, public, "me/adapter", base="someone/base"),
        lambda: report_text(run_tables(folder, list_runs(folder))),
        lambda: report_text(show_run(ShownRun.read(folder))[1]),
        lambda: report_text(side_by_side(*2 * [ShownRun.read(folder)])[1]),
        lambda: (not CASES and len(json.dumps(content)) % 4) or write_report([folder]),
    ):
        try:
            way()
        except UserError as error:
            refusal = error
            assert "\n" not in str(error)
    if refusal:
        raise refusal


TARGETS = {
    "run": Target(good_run, read_one),
    METRICS: reported(METRICS, MEASURED),
    UTTERANCES: reported(UTTERANCES, [HEARD, {**HEARD, "state": "base"}]),
    "Parquet rows": Target(good_rows("bytes"), read_rows, 40),
    "Parquet rows of arrays": Target(good_rows("array"), read_rows, 40),
    "posterior": Target(good_posterior(False), read_posterior(False)),
    "posterior of two domains": Target(good_posterior(True), read_posterior(True)),
    "adapter_config": Target(good_adapter, read_adapter),
    "config": checkpoint_file("config.json"),
    "generation_config": checkpoint_file("generation_config.json"),
    "preprocessor_config": checkpoint_file("preprocessor_config.json"),
    "tokenizer": tokenizer_file("tokenizer.json"),
    "tokenizer_config": tokenizer_file("tokenizer_config.json"),
    "special_tokens_map": tokenizer_file("special_tokens_map.json"),
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
    return World(tmp_path_factory.mktemp("fuzz"), fluent_folder, load_base(str(fluent_folder)))


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, about odd values
@pytest.mark.parametrize("kind", TARGETS)
def test_whatever_a_file_holds_it_is_read_or_refused_in_one_line(world, kind, monkeypatch):
    monkeypatch.chdir(world.folder)
    monkeypatch.syspath_prepend(world.folder)
    Path("evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    good, read, cases = TARGETS[kind]
    content, refused = good(world), []
    read(world, content)

    @settings(
        derandomize=not CASES,
        max_examples=CASES or cases,
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
    assert len(refused) > cases / 5
    outside = {path.name for path in world.folder.parent.iterdir()} - {world.folder.name}
    assert "x" not in outside
