import json
import secrets
import signal
import socket
import time
from pathlib import Path

import pytest

from blora_pyro.errors import Interrupted, UserError
from blora_pyro.fitting.checkpoints import stored_step
from blora_pyro.fitting.processes import Processes
from blora_pyro.runs.fits import fit

from .. import forks
from .fit_in_processes import Stops, become


class Pair:
    """Two processes; with "fit" as its first word, a command is one of the command line."""

    def __init__(self, logs: Path, command: list[str]) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        self.logs = [[Path(f"{logs}-{i}-{k}") for k in (1, 2)] for i in range(2)]
        self.processes = [
            forks.start(become, rank, port, command, streams=self.logs[rank]) for rank in range(2)
        ]

    def ended(self) -> list[tuple[int, str, str]]:
        """Exit code, output and errors of each."""
        codes = forks.ended(*self.processes)
        texts = [[path.read_text() for path in paths] for paths in self.logs]
        return [(code, *both) for code, both in zip(codes, texts, strict=True)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts pairs, one after the other."""
    logs = tmp_path_factory.mktemp("logs")
    return lambda command: Pair(logs / secrets.token_hex(4), command)


@pytest.fixture(scope="module")
def output(start, fluent_folder, tones_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    command = [str(fluent_folder), str(tones_folder / "train.jsonl"), str(folder)]
    codes, _, errors = zip(*start(command).ended(), strict=True)
    assert codes == (0, 0), "\n".join(errors)
    return folder


@pytest.fixture(scope="module")
def found(output):
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(2)]


def test_with_shared_noise_two_are_as_one_with_the_joint_batch(found):
    for one in found:
        assert one["distances"]["joint"] < 1e-5
        mine, expected = one["figures"]
        assert mine == pytest.approx(expected, rel=1e-5)


def test_one_that_has_no_utterance_of_a_batch_changes_nothing(found):
    assert all(one["distances"]["lone"] < 1e-5 for one in found)


def test_with_noise_of_their_own_the_gradient_varies_less(found):
    for one in found:
        assert one["spread"]["own"] < 0.8 * one["spread"]["shared"]
    assert found[0]["spread"] == pytest.approx(found[1]["spread"], rel=1e-5)


def test_what_the_main_process_says_all_hear(found):
    for one in found:
        assert (one["told"], one["empty"]) == ({"text": "ä", "rank": 0}, 0)
        assert one["all"] == [{"rank": 0}, {"rank": 1}]
    assert [one["rank"] for one in found] == [0, 1]


def test_sums_a_signal_and_a_wish_reach_all(found):
    for one in found:
        assert one["wanted"]
        assert one["sums"] == [[1.0], [2.0, 4.0]]
    assert found[0]["stops"] == [True, signal.SIGTERM]
    assert found[1]["stops"] == [True, signal.SIGINT]


def test_a_whole_fit_is_the_same_in_both_and_one_of_them_measures(output):
    main, other = (json.loads((output / f"fit{rank}.json").read_text()) for rank in range(2))
    assert main["sum"] == pytest.approx(other["sum"], rel=1e-6)
    assert main["steps"] == other["steps"] and len(main["steps"]) == 5
    assert main["dev"] == other["dev"]
    assert [one["step"] for one in main["dev"]["errors"]] == [2, 4, 5]
    assert "new_domain" in main["metrics"] and "new_domain" not in other["metrics"]
    assert json.loads((output / "run" / "run.json").read_text())["state"] == "finished"
    (told,) = (output / "run" / "tracking").glob("rank*")  # by the tracker of one process
    assert (told.name, told.read_text().split()) == ("rank0", ["1", "2", "3", "4", "5"])


def test_a_stream_is_shared_out_and_goes_on_where_each_process_was(output):
    main, other = (json.loads((output / f"streams{rank}.json").read_text()) for rank in range(2))
    straight, resumed = main
    assert straight == resumed and len(straight) == 6
    assert main == other


def test_domains_are_pooled_alike_in_both(output):
    main, other = (json.loads((output / f"pooled{rank}.json").read_text()) for rank in range(2))
    assert main == pytest.approx(other, rel=1e-6) and any(main.values())


def test_a_contract_is_kept_in_both_and_measured_by_one(output):
    main, other = (json.loads((output / f"kept{rank}.json").read_text()) for rank in range(2))
    assert main["sum"] == pytest.approx(other["sum"], rel=1e-6)
    assert main["dev"] == other["dev"]
    expected = [one["within_contract"] for one in main["dev"]["errors"]]
    assert len(expected) == 2 and None not in expected
    assert main["dev"]["best_step"] == [2, 4][expected.index(min(expected))]
    about = json.loads((output / "kept" / "run.json").read_text())
    assert about["kept"]["strength"] == main["strength"]
    assert other["strength"] == 1.0  # it went before strengths were scored


def test_a_fit_outlives_its_processes_and_goes_on_in_another_number(start, fit_options, tmp_path):
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoint.safetensors"
    options = {**fit_options, "steps": 100_000, "backward": (), "batch_size": 3}
    command = ["fit", "--output", str(folder), "--checkpoint-every", "1"]
    named = ("base", "data", "beta", "rank", "lr", "batch_size", "steps")
    for name in named:
        command += [f"--{name.replace('_', '-')}", str(options[name])]
    command += ["--backward", "none"]

    # of two the second is killed: the first says so in one line
    pair = start(command)
    wait_for(lambda: checkpoint.exists(), pair)
    pair.processes[1].kill()
    (code, out, errors), _ = pair.ended()
    assert (code, out) == (2, "")
    (line,) = [one for one in errors.splitlines() if one.startswith("blora-pyro: ")]
    assert line.startswith("blora-pyro: a process of 2 is gone; the checkpoint of step ")
    assert f"go on with: blora-pyro fit --resume --output {folder}" in line

    # one goes on alone
    left = stored_step(checkpoint)
    with pytest.raises(Interrupted):
        fit(output=folder, resume=True, checkpoint_every=1, progress=Stops(left + 3))
    later = stored_step(checkpoint)
    assert later > left

    # and two again; a signal to the second ends both, and the first reports
    pair = start(["fit", "--resume", "--output", str(folder), "--checkpoint-every", "1"])
    wait_for(lambda: (stored_step(checkpoint) or 0) > later + 1, pair)
    pair.processes[1].terminate()
    (code, out, errors), (other, *silent) = pair.ended()
    assert (code, other, out) == (143, 143, "")
    assert "blora-pyro: interrupted; the checkpoint of step" in errors
    assert silent == ["", ""]


def wait_for(done, pair, seconds=200):
    for _ in range(10 * seconds):
        if done():
            return
        assert all(process.is_alive() for process in pair.processes)
        time.sleep(0.1)
    raise TimeoutError


def test_a_device_with_a_number_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^device is 'cuda:1' in 2 processes; give cuda, and each"):
        Processes.join("cuda:1")


def test_alone_nothing_is_sent():
    alone = Processes()
    assert alone.is_main and alone.share([1, 2]) == [1, 2]
    assert alone.broadcast(b"x") == b"x" and alone.from_main(lambda: 2.5) == 2.5
