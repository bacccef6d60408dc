import gzip
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from real.manifests import main

from blora_pyro.data import read_manifest


def audio(seconds, file=None):
    wave = 0.1 * np.sin(np.arange(int(8000 * seconds)))
    content = io.BytesIO()
    soundfile.write(content, wave, 8000, format="WAV")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.getvalue())
    return content.getvalue()


def test_manifests_are_made_from_the_files_of_the_public_sources(tmp_path):
    chapters = [f"Chapter{number}_1_1.wav" for number in (1, 12, 13, 16)]
    rows = [{"bytes": audio(2), "path": name} for name in (*chapters, "Chapter1_2_2.wav")]
    rows[-1]["bytes"] = audio(1)  # too short
    table = pa.table({"audio": rows, "sentence": [f"shuk {one['path']}" for one in rows]})
    (tmp_path / "killkan").mkdir()
    pq.write_table(table, tmp_path / "killkan" / "train.parquet")
    for code, voice in (
        ("en", "en_US_f_Allison"),
        ("es", "es_MX_f_Allison"),
        ("fr", "fr_CA_f_June"),
    ):
        folder = tmp_path / "share" / "doc" / f"asterisk-core-sounds-{code}"
        folder.mkdir(parents=True)
        lines = ["; a comment", "one: three words here", "two: [a tone of it]", "short: hello"]
        with gzip.open(folder / f"core-sounds-{code}.txt.gz", "wt") as file:
            file.write("\n".join(lines))
        for name in ("one", "two", "short"):
            audio(2, tmp_path / "share" / "asterisk" / "sounds" / voice / f"{name}.wav")
    names = [f"de-{number}" for number in range(70)]
    (tmp_path / "kerstin").mkdir()
    text = "\n".join(f"{name}|drei Worte hier" for name in names)
    (tmp_path / "kerstin" / "metadata.csv").write_text(text)
    for name in names:
        audio(2, tmp_path / "kerstin" / "wav" / f"{name}.wav")
    given = [f"--{name}={tmp_path / name}" for name in ("killkan", "kerstin", "output")]
    main([*given, f"--asterisk={tmp_path / 'share'}"])

    def content(name):
        lines = (tmp_path / "output" / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    assert {row["source"] for row in content("train")} == {f"killkan/{one}" for one in chapters[:2]}
    assert [row["source"] for row in content("test")] == [f"killkan/{chapters[3]}"]
    assert [row["text"] for row in content("back-fr")] == ["three words here"]
    splits = [row["split"] for row in content("back-de")]
    assert (splits.count("test"), splits.count("dev"), splits.count("train")) == (60, 10, 0)
    assert len(read_manifest(tmp_path / "output" / "train.jsonl")) == 2
