import pytest

from blora_pyro.transcription import safeguards


@pytest.fixture
def two_temperatures(monkeypatch):
    """Greedy, and else the wildest of the samples, without those between."""
    monkeypatch.setattr(safeguards, "TEMPERATURES", (0.0, 1.0))
