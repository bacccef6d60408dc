import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blora_pyro.diagnostics.explanations import Shrinkage, how_it_shrinks
from blora_pyro.diagnostics.summaries import summarise
from blora_pyro.errors import UserError
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import BLoRA
from blora_pyro.posterior import Family, Posterior
from blora_pyro.posterior.storage import POSTERIOR_FILE

from .conftest import fitted, logits, posterior_of

MINE = """
from pathlib import Path

import pyro.distributions as dist

from blora_pyro.guides.normal import Guide

(Path(__file__).parent / "ran").touch()


class Prior:
    def __init__(self, scale: float = 0.05):
        self.scale = scale

    def __call__(self, site):
        return dist.Cauchy(0.0, self.scale).expand(site.shape).to_event(2)
"""


@pytest.fixture
def own_file(tmp_path) -> Path:
    """A prior and a guide that leave a mark beside them, `ran`, wherever they are run."""
    path = tmp_path / "own" / "prior.py"
    path.parent.mkdir()
    path.write_text(MINE, encoding="utf-8")
    return path


@pytest.fixture
def own_run(net, own_file, tmp_path) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """The folder of a run with that file, and draws of its guide with the seed 5."""
    model = BLoRA(net, build_prior(str(own_file), scale=0.2), rank=2, target_modules="fc1")
    guide = build_guide(str(own_file), model)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    family = Family.of(str(own_file), {"scale": 0.2}, str(own_file))
    posterior = Posterior.from_guide("tiny", model, guide, family)
    posterior.save(tmp_path / "run")
    torch.manual_seed(5)
    draws = [{name: value.detach() for name, value in guide().items()} for _ in range(2)]
    assert (own_file.parent / "ran").exists()
    (own_file.parent / "ran").unlink()
    return tmp_path / "run", draws


def test_loading_a_run_does_not_run_its_file(net, batch, own_file, own_run, tmp_path):
    folder, _ = own_run
    loaded = Posterior.load(folder)
    with loaded.applied(net):
        logits(net, batch)
    loaded.merge(net)
    loaded.sparsity()
    loaded.save(tmp_path / "again")
    for part in (
        lambda: next(loaded.draws(1)),
        lambda: loaded.prior,
        lambda: loaded.guide,
        lambda: loaded.to_arviz(draws=1),
    ):
        with pytest.raises(UserError, match="name it with --prior") as caught:
            part()
        assert str(own_file) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (own_file.parent / "ran").exists()


def test_the_file_is_run_where_it_is_named(own_file, own_run):
    folder, expected = own_run
    loaded = Posterior.load(folder, prior=str(own_file))
    for draw, ours in zip(loaded.draws(2, seed=5), expected, strict=True):
        assert draw.keys() == ours.keys()
        assert all(torch.equal(value, ours[name]) for name, value in draw.items())
    assert loaded.prior.prior.scale == 0.2
    assert (own_file.parent / "ran").exists()


def test_the_file_may_have_moved(own_file, own_run, tmp_path):
    moved = own_file.rename(tmp_path / "elsewhere.py")
    folder, expected = own_run
    (draw,) = Posterior.load(folder, prior=str(moved)).draws(1, seed=5)
    assert all(torch.equal(value, expected[0][name]) for name, value in draw.items())
    with pytest.raises(UserError, match="nor the path of a"):
        next(Posterior.load(folder, prior=str(own_file)).draws(1))


def test_the_files_that_a_run_names_may_be_trusted(own_file, own_run):
    folder, expected = own_run
    (draw,) = Posterior.load(folder, trust_prior_file=True).draws(1, seed=5)
    assert all(torch.equal(value, expected[0][name]) for name, value in draw.items())


def describe_anew(folder: Path, **changes) -> None:
    """Change the description of a posterior."""
    path = folder / POSTERIOR_FILE
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["blora_pyro"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, path, metadata={"blora_pyro": json.dumps({**about, **changes})})


@pytest.mark.parametrize("role", ["prior", "guide"])
@pytest.mark.parametrize("spelling", ["{}/", "{}/.", "./{}", "link", "LINK.PY", "package", "prior"])
def test_no_spelling_of_a_file_is_run_unless_it_is_named(
    own_file, tmp_path, monkeypatch, role, spelling
):
    monkeypatch.chdir(own_file.parent)
    monkeypatch.syspath_prepend(own_file.parent)
    Path("link").symlink_to(own_file)
    Path("LINK.PY").symlink_to(own_file)
    Path("package").mkdir()
    Path("package/__init__.py").write_text(MINE, encoding="utf-8")
    fitted("normal").save(tmp_path / "run")
    describe_anew(tmp_path / "run", **{role: spelling.format(own_file.name)})
    loaded = Posterior.load(tmp_path / "run")
    for part in (
        lambda: next(loaded.draws(1)),
        lambda: loaded.prior,
        lambda: loaded.guide,
        lambda: loaded.to_arviz(draws=1),
        lambda: how_it_shrinks(summarise(loaded), Shrinkage.of(loaded, summarise(loaded)), 1.0),
    ):
        with pytest.raises(UserError, match="name it with --prior"):
            part()
    assert not Path("ran").exists() and not Path("package/ran").exists()


@pytest.mark.parametrize("named", [True, False])
def test_a_file_that_is_not_the_fitted_one_is_refused_and_not_run(own_file, own_run, named):
    own_file.write_text(MINE.replace("guides.normal", "guides.point"), encoding="utf-8")
    given = {"prior": str(own_file)} if named else {"trust_prior_file": True}
    with pytest.raises(UserError, match="is not the file that the run was fitted with") as caught:
        Posterior.load(own_run[0], **given)
    assert "\n" not in str(caught.value)
    assert not (own_file.parent / "ran").exists()


def test_a_file_of_another_guide_is_refused_where_there_is_no_hash(own_file, own_run):
    describe_anew(own_run[0], code_sha256=None)  # as earlier versions wrote it
    own_file.write_text(MINE.replace("guides.normal", "guides.point"), encoding="utf-8")
    loaded = Posterior.load(own_run[0], prior=str(own_file))
    with pytest.raises(UserError, match="is not the fitted one") as caught:
        next(loaded.draws(1))
    assert "\n" not in str(caught.value)


def test_a_file_named_for_a_run_of_built_in_names_is_refused_and_not_run(net, own_file, tmp_path):
    posterior_of(net).save(tmp_path)
    with pytest.raises(UserError, match="prior is normal, not one file; leave --prior out"):
        Posterior.load(tmp_path, prior=str(own_file))
    assert not (own_file.parent / "ran").exists()


@pytest.mark.parametrize(
    ("prior", "guide", "files"),
    [
        ("normal", "normal", ()),
        ("a.py", "a.py", ("a.py",)),
        ("a.py", "point", ("a.py",)),
        ("normal", "b.py", ("b.py",)),
        ("a.py", "b.py", ("a.py", "b.py")),
    ],
)
def test_a_family_knows_its_files_and_takes_one_for_one(prior, guide, files):
    family = Family(prior, {"scale": 1.0}, guide, runs_code=False)
    assert family.files == files
    if len(files) != 1:
        with pytest.raises(UserError, match="not one file"):
            family.with_file("new.py")
    else:
        named = family.with_file("new.py")
        assert (named.prior, named.guide) == tuple(
            "new.py" if name in files else name for name in (prior, guide)
        )
        assert named.runs_code
        assert named.prior_args == family.prior_args
