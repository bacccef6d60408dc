import pytest

from blora_pyro.data import pocket
from blora_pyro.errors import UserError


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    monkeypatch.setattr(pocket, "POCKET_DIR", tmp_path / "shipped")
    monkeypatch.setenv("BLORA_PYRO_CACHE", str(tmp_path / "cache"))


def test_shipped_then_cache(tmp_path):
    cached = tmp_path / "cache" / "pocket" / "tr"
    cached.mkdir(parents=True)
    assert pocket.corpus_dir("tr") == cached
    shipped = tmp_path / "shipped" / "tr"
    shipped.mkdir(parents=True)
    assert pocket.corpus_dir("tr") == shipped


def test_cache_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("BLORA_PYRO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    cached = tmp_path / ".cache" / "blora-pyro" / "pocket" / "zh-en"
    cached.mkdir(parents=True)
    assert pocket.corpus_dir("zh-en") == cached


def test_errors_say_what_to_do():
    with pytest.raises(UserError, match=r"python recipes/pocket/build.py"):
        pocket.corpus_dir("de")
    with pytest.raises(UserError, match=r"'\.\./de'; choose from de-en, es-en, zh-en, en, de"):
        pocket.corpus_dir("../de")


def test_no_cache_where_it_is_switched_off_or_there_is_no_home(monkeypatch):
    monkeypatch.setenv("BLORA_PYRO_CACHE", "")
    assert pocket.cache_dir() is None
    with pytest.raises(UserError, match=r"'de' is not in .*shipped; make it"):
        pocket.corpus_dir("de")
    monkeypatch.setenv("BLORA_PYRO_CACHE", "~nobody-of-that-name/x")
    assert pocket.cache_dir() is None
