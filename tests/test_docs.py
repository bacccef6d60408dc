"""The code in docs/ is code that runs."""

import re
from pathlib import Path

import pytest
import torch

from blora_pyro import BLoRA, Posterior, fit
from blora_pyro.declarations import reference
from blora_pyro.guides import build_prior, check_family, checks
from blora_pyro.options import GROUPS, REFERENCE, FitConfig

DOCS = Path(__file__).parents[1] / "docs"
FILES = {
    name: code
    for page in sorted(DOCS.glob("*.md"))
    for name, code in re.findall(
        r"<!-- file: (\S+) -->\n```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
    )
}


def test_the_pages_hold_files():
    assert set(FILES) == {"by_activation.py", "by_depth.py", "rank_width.py", "shared_deviation.py"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_docs_is_a_family_that_fits(name, fit_options, tmp_path):
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    options = {**fit_options, "steps": 5}
    run = fit(FitConfig(prior=str(path), **options), tmp_path / "run", evaluate=False)
    assert run.history[-1].kl > 0
    posterior = Posterior.load(tmp_path / "run", prior=str(path))
    draws = [draw["B_16x16"] for draw in posterior.draws(50)]
    spread = torch.stack(draws).std(0)
    assert (spread / posterior.stddev["B_16x16"]).mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_docs_passes_the_checks_of_a_family(name, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "DRAWS", 60)  # for the sake of time; standard errors allow for it
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    assert [check for check in check_family(str(path)).checks if not check.passed] == []


def test_the_prior_of_the_docs_holds_the_encoder_tighter(net, tmp_path):
    path = tmp_path / "by_depth.py"
    path.write_text(FILES["by_depth.py"], encoding="utf-8")
    model = BLoRA(net, build_prior(str(path), encoder_scale="0.001"), rank=2)
    group = model.groups[0]
    spread = model.prior(group.A).stddev.amax((1, 2))
    for name, stddev in zip(group.modules, spread.tolist(), strict=True):
        assert stddev == pytest.approx(0.001 if "encoder.layers" in name else 0.05)


def test_the_reference_of_options_is_made_from_their_declarations():
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    made = REFERENCE + reference(GROUPS)
    assert text == made, "run: python -m blora_pyro.options > docs/options.md"


def test_the_readme_is_one_that_is_read_and_its_links_lead_somewhere():
    root = DOCS.parent
    text = (root / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.encode()) <= 8192
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) > 15
    for link in links:
        path, _, heading = link.partition("#")
        assert (root / path).exists(), link
        heads = re.findall(r"^#+ (.*)", (root / path).read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in heads}
        assert not heading or heading in anchors, link


def test_every_promise_of_security_names_a_test_that_is_there():
    root = DOCS.parent
    text = (root / "SECURITY.md").read_text(encoding="utf-8")
    promises = re.findall(r"^- (.*?)(?=^- |^$|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(promises) >= 12
    for promise in promises:
        tests = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", promise)
        assert tests, promise
        for file, name in tests:
            assert f"def {name}(" in (root / file).read_text(encoding="utf-8"), name
