"""Packing a corpus for the package."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from blora_pyro.data import load_split

RECIPE = Path(__file__).parents[2] / "recipes" / "pocket"


@pytest.fixture(scope="module")
def ship():
    sys.path.insert(0, str(RECIPE))
    yield importlib.import_module("ship")
    sys.path.remove(str(RECIPE))


def test_a_packed_split_has_the_bytes_and_rows_of_its_manifest(ship, tmp_path):
    corpus = tmp_path / "de-en"
    (corpus / "test").mkdir(parents=True)
    rows = [{"audio": f"test/{n}.ogg", "text": f"x {n}", "voice": {"pitch": n}} for n in range(3)]
    for row in rows:
        (corpus / row["audio"]).write_bytes(row["text"].encode())
    lines = [json.dumps(row) for row in rows]
    (corpus / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    packed = [ship.pack(corpus / "test.jsonl", 2) for _ in range(2)]
    for number, one in enumerate(packed):
        one.to_parquet(tmp_path / f"{number}.parquet")
    assert (tmp_path / "0.parquet").read_bytes() == (tmp_path / "1.parquet").read_bytes()
    dataset = load_split(tmp_path / "0.parquet", "test")
    assert dataset["text"][:] == ["x 0", "x 1"]
    assert dataset[1]["audio"] == {"bytes": b"x 1", "path": "de-en/test/1.ogg"}
