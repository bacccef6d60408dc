from blora_pyro.diagnostics import data_check
from blora_pyro.diagnostics.data_check import DataCheck

from .conftest import complaint, parsed, run, well


def test_data_check_exits_with_1_if_a_fit_would_refuse(
    fluent_folder, tones_folder, tmp_path, monkeypatch
):
    base = ("--base", fluent_folder)
    out = well("data", "check", tones_folder, tones_folder / "de.jsonl", *base)
    assert "a fit would take every row" in out
    (tmp_path / "train.jsonl").write_text("?", encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # a long path would break the line
    result = run("data", "check", ".", *base)
    assert result.exit_code == 1 and "not JSON: '?'" in result.stdout
    result = run("data", "check", tmp_path, "--json", *base)
    assert result.exit_code == 1 and parsed(result.stdout)["sets"][0]["refused"] == {"row": 1}
    assert "no data at" in complaint(run("data", "check", tmp_path / "gone", *base))
    assert "no dev.jsonl" in complaint(run("data", "check", tmp_path, "--split", "dev", *base))


def test_data_check_hands_every_option_on(monkeypatch):
    seen = []

    def check(*arguments, **options):
        seen.append((*arguments, options))
        return DataCheck("b", 30, [])

    monkeypatch.setattr(data_check, "check_data", check)
    options = ["--base", "b", "--split", "s", "--language", "German", "--revision", "v1"]
    options += ["--task", "translate", "--language-map", "qu=mi"]
    well(
        "data", "check", "x", "y", *options, "--local-files-only", "--fast", "--column", "text=a,b"
    )
    assert seen[0][:4] == (["x", "y"], "b", "s", "German")
    others = {"fast": True, "columns": {"text": ["a", "b"]}, "task": "translate"}
    others["language_map"] = {"qu": "mi"}
    assert seen[0][5:] == ("v1", True, others)
