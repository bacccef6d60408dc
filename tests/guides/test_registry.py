import importlib.util
import marshal
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO

from blora_pyro.adapters import Group
from blora_pyro.errors import UserError
from blora_pyro.families import FAMILIES, GUIDES
from blora_pyro.guides import build_guide, build_prior, load_family, normal
from blora_pyro.models import BLoRA, Temper

from ..conftest import inform

LAPLACE = '''
"""A Laplace prior, fitted by a Normal guide."""

import pyro.distributions as dist

from blora_pyro.guides.normal import Guide

__all__ = ["Guide", "Prior"]


class Prior:
    def __init__(self, scale=0.05):
        self.scale = scale

    def __call__(self, site):
        return dist.Laplace(0.0, self.scale).expand(site.shape).to_event(2)
'''


@pytest.fixture
def write(tmp_path):
    def write(content, name="mine.py"):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write


def model_of(net, prior):
    model = BLoRA(net, build_prior(prior), rank=2)
    inform(model.prior, model.groups)
    return model


# ---- which guide goes with which prior

HIERARCHICAL = {"horseshoe": ("_global", "_local"), "learned-scale": ("_scale",)}
FLAT = [name for name in FAMILIES if name not in HIERARCHICAL]


@pytest.mark.parametrize("prior", FLAT)
def test_a_guide_goes_with_every_prior_of_the_same_sites(prior, net, batch):
    model = model_of(net, prior)
    for guide in ("point", "normal", "a-only", "laplace"):
        assert build_guide(guide, model)(batch).keys() == {site.name for site in model.sites}


@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        *((prior, guide) for prior in HIERARCHICAL for guide in ("normal", "point")),
        ("normal", "learned-scale"),
        ("learned-scale", "horseshoe"),
    ],
)
def test_a_guide_of_other_sites_than_the_priors_is_refused_with_their_names(prior, guide, net):
    with pytest.raises(UserError, match="auto-normal") as raised:
        build_guide(guide, model_of(net, prior))
    message = str(raised.value)
    assert f"guide {guide} does not fit prior {prior}" in message
    odd = {*HIERARCHICAL.get(prior, ()), *HIERARCHICAL.get(guide, ())}
    assert all(f"A_16x16{end}" in message for end in odd)
    assert "\n" not in message


@pytest.mark.parametrize("name", ["normal", "horseshoe", "auto-normal"])
def test_building_a_guide_leaves_pyros_parameters_alone(name, net):
    mine = pyro.param("mine", torch.tensor(2.0))
    build_guide(name, model_of(net, name if name in FAMILIES else "normal"))
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.param("mine") is mine


def test_the_prior_takes_its_arguments():
    assert build_prior("normal", scale=0.3).scale == 0.3
    assert build_prior("normal").scale == normal.Prior().scale


def test_a_file_of_the_user_is_a_family(write, net, batch):
    path = write(LAPLACE)
    prior = build_prior(path, scale=0.2)
    site = Group(("a", "b"), 3, 4, rank=2).B
    w = torch.randn(site.shape)
    expected = torch.distributions.Laplace(0.0, 0.2).log_prob(w).sum((1, 2))
    torch.testing.assert_close(prior(site).log_prob(w), expected)

    model = BLoRA(net, prior, rank=2)
    guide, temper = build_guide(path, model), Temper(1e-4)
    svi = SVI(temper(model), temper(guide), pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    start = {name: value.clone() for name, value in guide.mean().items()}
    losses = [svi.step(batch) for _ in range(3)]
    assert torch.tensor(losses).isfinite().all()
    assert all((guide.mean()[name] != start[name]).any() for name in start)


def test_a_file_may_use_dataclasses_with_postponed_annotations(write):
    path = write(
        """
from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist


@dataclass
class Prior:
    scale: float = 0.05

    def __call__(self, site):
        return dist.Normal(0.0, self.scale).expand(site.shape).to_event(2)
"""
    )
    assert build_prior(path, scale=0.1).scale == 0.1


def test_two_files_of_one_name_stay_apart(tmp_path):
    priors = []
    for i, folder in enumerate((tmp_path / "one", tmp_path / "two")):
        folder.mkdir()
        file = folder / "mine.py"
        file.write_text(f"class Prior:\n    number = {i}\n", encoding="utf-8")
        priors.append(build_prior(str(file)))
    assert [prior.number for prior in priors] == [0, 1]


@pytest.mark.parametrize("name", ["cauchy", "Normal", "", "missing.py"])
def test_an_unknown_name_lists_the_choices(name, net):
    with pytest.raises(UserError, match=r"\.py file") as raised:
        build_prior(name)
    assert all(known in str(raised.value) for known in FAMILIES)
    with pytest.raises(UserError, match=r"\.py file") as raised:
        build_guide(name, BLoRA(net, normal.Prior(), rank=2))
    assert all(known in str(raised.value) for known in GUIDES)


def test_a_guide_alone_is_no_prior_family():
    with pytest.raises(UserError, match="'point' is none of normal"):
        build_prior("point")


def test_a_folder_or_another_kind_of_file_is_refused(write, tmp_path):
    (tmp_path / "folder.py").mkdir()
    for path in (str(tmp_path / "folder.py"), write(LAPLACE, "prior.txt")):
        with pytest.raises(UserError, match="nor the path"):
            load_family(path)


def test_a_file_without_the_class_is_told(write, net):
    path = write("class Other: pass\n")
    with pytest.raises(UserError, match="has no class Prior"):
        build_prior(path)
    with pytest.raises(UserError, match="has no class Guide"):
        build_guide(path, BLoRA(net, normal.Prior(), rank=2))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("raise RuntimeError('broken on purpose')\n", "RuntimeError: broken on purpose"),
        ("import no_such_module_at_all\n", "ModuleNotFoundError"),
        ("def f(:\n", "SyntaxError"),
    ],
)
def test_a_file_that_fails_on_import_is_told_with_its_reason(write, content, reason):
    path = write(content)
    with pytest.raises(UserError, match=reason) as raised:
        load_family(path)
    assert path in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_argument_of_the_prior_lists_the_known_ones(write):
    with pytest.raises(UserError, match=r"takes no 'width'; it takes scale"):
        build_prior("normal", width=1.0)
    with pytest.raises(UserError, match=r"takes no 'width'; it takes scale"):
        build_prior(write(LAPLACE), width=1.0)


SCALED = """
import pyro
import pyro.distributions as dist

from blora_pyro.guides.normal import Guide


class Prior:
    def __call__(self, site):
        width = pyro.sample(f"{site.name}_width", dist.Gamma(2.0, 20.0))
        return dist.Normal(0.0, width).expand(site.shape).to_event(2)
"""


def test_a_file_whose_prior_samples_what_its_guide_lacks_is_told(write, net, batch):
    path = write(SCALED)
    model = BLoRA(net, build_prior(path), rank=2, target_modules="fc1")
    with pytest.raises(UserError, match="only one of them samples A_32x16_width") as raised:
        build_guide(path, model)
    message = str(raised.value)
    assert message.startswith(f"guide {path} does not fit prior ")
    assert "B_32x16_width; give the family's own guide, or auto-normal" in message
    assert "\n" not in message
    assert "A_32x16_width" in build_guide("auto-normal", model)(batch)


def test_a_file_with_a_prior_alone_goes_with_a_guide_by_name(write, net, batch):
    path = write(LAPLACE.replace("from blora_pyro.guides.normal import Guide", ""))
    model = BLoRA(net, build_prior(path), rank=2, target_modules="fc1")
    with pytest.raises(UserError, match="has no class Guide") as raised:
        build_guide(path, model)
    assert str(raised.value).startswith(path)
    assert "\n" not in str(raised.value)
    for guide in ("normal", "point", "auto-normal"):
        assert build_guide(guide, model)(batch).keys() == {"A_32x16", "B_32x16"}


def test_a_missing_argument_of_the_prior_is_told(write):
    path = write(LAPLACE.replace("scale=0.05", "scale"))
    with pytest.raises(UserError, match="scale"):
        build_prior(path)
    assert build_prior(path, scale=0.1).scale == 0.1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "self.scale = scale",
            "raise OSError('no')",
            r"fails on Prior\(\.\.\.\), line 13: OSError",
        ),
        (
            "return dist.Laplace(0.0, self.scale)",
            "return dist.Laplace(0.0, self.width)",
            r"fails on Prior\(\.\.\.\)\(site\), line 16: AttributeError",
        ),
        (
            ".to_event(2)",
            "",
            r"event shape \(\) for A_16x16; give \(24,\) and \(2, 16\), by .expand",
        ),
        ("import pyro.dist", "import sys; sys.exit()\nimport pyro.dist", "fails on import, line 4"),
        (
            "from blora_pyro.guides.normal import Guide",
            "def Guide(model):\n    return 1 / 0",
            r"fails on Guide\(model\), line 7: ZeroDivisionError",
        ),
        (
            "from blora_pyro.guides.normal import Guide",
            "from torch.nn import Linear\ndef Guide(model):\n    return Linear(1, 1)",
            r"has no method mean\(\)",
        ),
    ],
)
def test_what_goes_wrong_in_a_users_file_is_one_line_with_its_place(write, net, old, new, words):
    assert old in LAPLACE
    path = write(LAPLACE.replace(old, new))
    with pytest.raises(UserError, match=words):
        build_guide(path, model_of(net, path))


@pytest.mark.parametrize("value", [None, [1]])
def test_an_argument_that_is_no_number_is_refused(value):
    with pytest.raises(UserError, match="normal"):
        build_prior("normal", scale=value)


def test_a_prior_may_take_arguments_that_it_does_not_name(write):
    path = write(LAPLACE.replace("scale=0.05", "scale=0.05, **rest"))
    assert build_prior(path, scale="0.1").scale == 0.1


def test_the_text_of_a_file_is_run_and_no_bytecode_beside_it(write, tmp_path):
    path = write("kind = 'written'\n")
    compiled = compile("kind = 'compiled elsewhere'\n", path, "exec")
    cached = Path(importlib.util.cache_from_source(path))
    cached.parent.mkdir()
    source = Path(path).stat()
    head = [0, int(source.st_mtime), source.st_size]  # by which Python takes it for the file's
    numbers = b"".join(number.to_bytes(4, "little") for number in head)
    cached.write_bytes(importlib.util.MAGIC_NUMBER + numbers + marshal.dumps(compiled))
    loaded: dict = {}
    exec(SourceFileLoader("mine", path).get_code("mine"), loaded)
    assert loaded["kind"] == "compiled elsewhere"
    assert load_family(path).kind == "written"
    assert [*cached.parent.iterdir()] == [cached]
