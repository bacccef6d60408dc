import copy
import json
from dataclasses import replace

import pytest

from blora_pyro.errors import UserError
from blora_pyro.runs.folders import read_run
from blora_pyro.runs.measurements import SIZES, check_metrics, read_metrics
from blora_pyro.runs.report import fit_tables, prune_tables
from blora_pyro.tables import report_markdown


def test_metrics_are_those_of_the_adapter_beside_them(finished_run):
    posterior, record = read_run(finished_run.output)
    metrics = read_metrics(finished_run.output, record)
    assert metrics["adapter"] == posterior.fingerprint
    assert metrics["sets"].keys() == {"new_domain", *metrics["backward"]}
    assert len({*metrics["sets"].values()}) == 3
    other = replace(posterior, alpha=1.0)
    with pytest.raises(UserError, match=r"was not measured with the adapter beside it; remove it"):
        read_metrics(finished_run.output, record, other)


def test_metrics_of_an_older_version_are_a_runs_own_unless_it_is_combined(finished_run, tmp_path):
    posterior, record = read_run(finished_run.output)
    (tmp_path / "metrics.json").write_text('{"backward": {}}')
    assert read_metrics(tmp_path, record, posterior) == {"backward": {}}
    combined = replace(record, combined={"from": ["a", "b"]})
    with pytest.raises(UserError, match="was not measured with the adapter"):
        read_metrics(tmp_path, combined, posterior)


def test_every_key_of_the_metrics_is_shown_or_refused_in_one_line(old_runs):
    whole = json.loads((old_runs / "normal" / "metrics.json").read_text(encoding="utf-8"))
    whole |= {"adapter": "0", "sets": {"de": "1"}}
    sizes = dict.fromkeys(SIZES, 3)
    whole["size"] = {"full": sizes, "pruned": sizes}
    refused = 0
    for path in paths_of(whole):
        for value in (None, [], {}, "x", -1, 2**70, [[None]], MISSING):
            content = copy.deepcopy(whole)
            place = content
            for key in path[:-1]:
                place = place[key]
            if value is MISSING:
                del place[path[-1]]
            else:
                place[path[-1]] = value
            try:
                check_metrics(content)
            except ValueError:
                refused += 1
                continue
            report_markdown(fit_tables(content))
            if "size" in content:
                report_markdown(prune_tables(content))
    assert refused > 100


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rate", -5.0),
        ("interval", [0.1]),
        ("interval", []),
        ("interval", [0.1, 0.2, 0.3]),
        ("interval", [0.9, 0.1]),
        ("interval", [None, 0.1]),
    ],
)
def test_figures_that_cannot_be_are_refused(old_runs, key, value):
    metrics = json.loads((old_runs / "normal" / "metrics.json").read_text(encoding="utf-8"))
    check_metrics(metrics)
    metrics["new_domain"]["adapted"]["wer"][key] = value
    with pytest.raises(ValueError, match="a set has"):
        check_metrics(metrics)


def test_a_set_has_one_measure_before_and_after(old_runs):
    metrics = json.loads((old_runs / "normal" / "metrics.json").read_text(encoding="utf-8"))
    metrics["new_domain"]["base"]["metric"] = "cer"
    with pytest.raises(ValueError, match="a set has"):
        check_metrics(metrics)


MISSING = object()


def paths_of(content, below=()):
    """Every key in JSON content, but for those inside raw rates and lists."""
    for key, value in content.items():
        yield (*below, key)
        if isinstance(value, dict) and key not in ("raw", "pier", "cer"):
            yield from paths_of(value, (*below, key))
