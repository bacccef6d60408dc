import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from blora_pyro.errors import UserError
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.runs import report_transcripts
from blora_pyro.runs.fits import fit
from blora_pyro.runs.folders import read_run
from blora_pyro.runs.record import FINISHED
from blora_pyro.runs.report_page import (
    report_html,
    use_lines,
    write_report,
)
from blora_pyro.runs.shown import ShownRun

from ..chromium import PROGRAM, browser
from .test_report import METRICS
from .test_report_transcripts import both

HOSTILE = '<script>document.title="stolen"</script><img src=x onerror=alert(1)>"\'&</dd>{{ 7*7 }}'
VOID = {"meta", "path", "br"}


class Checked(HTMLParser):
    """Collects what a page holds, and refuses elements that are not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.found, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if not {"style", "script"} & {*self.open}:
            self.text += data

    def having(self, tag, **attributes):
        wanted = attributes.items()
        return [has for name, has in self.found if name == tag and has.items() >= wanted]


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory, old_runs):
    """A run in whose names and texts there is markup, and whose audio can be heard."""
    wav = tmp_path_factory.mktemp("audio") / "tone.wav"
    wave = 0.1 * np.sin(np.arange(8000) / 10, dtype=np.float32)
    soundfile.write(wav, wave, 16_000)
    posterior, record = read_run(old_runs / "normal")
    metrics = {**METRICS, "backward": {HOSTILE: METRICS["backward"]["de"], **METRICS["backward"]}}
    said = "das rote rad ist neu"
    texts = (
        (said, said, "das rad neu", {"set": "de"}),
        (said, "oh", said, {}),
        (HOSTILE, said, f"{HOSTILE} {HOSTILE}", {"set": HOSTILE, "origin": HOSTILE}),
        ("שלום עולם", "\u202eשלום", "עולם \0", {"language": HOSTILE}),
        ("x" * 10_000, "y" * 10_000, "z" * 10_000, {}),
        (said, said, "oh oh", {"set": "fr"}),
    )
    rows = [
        row
        for number, (reference, before, after, more) in enumerate(texts)
        for row in both(reference, before, after, utterance=number, audio=str(wav), **more)
    ]
    record = replace(record, versions={"python": HOSTILE})
    return ShownRun(HOSTILE, FINISHED, record, posterior, metrics, rows)


@pytest.fixture(scope="module")
def hostile_page(hostile_run, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report_html([hostile_run]), encoding="utf-8")
    return file


# ---- what is written


def test_a_fit_leaves_its_report_in_its_folder(finished_run):
    page = Checked((finished_run.output / "report.html").read_text(encoding="utf-8"))
    assert page.text.count("das red") >= 3 and "New domain" in page.text
    assert "By layer" in page.text and "All 6 utterances. Audio is in the page." in page.text
    assert len(page.having("li", **{"class": "utterance"})) == len(page.having("audio")) == 6
    assert f"blora-pyro evaluate {finished_run.output}" in page.text
    assert "--rank 4" in page.text and "torch 2." in page.text


def test_the_same_report_is_written_again_for_one_run(finished_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run.output, folder)
    before = (folder / "report.html").read_text(encoding="utf-8")
    (folder / "report.html").write_text("old")
    assert write_report([folder]) == folder / "report.html"
    after = (folder / "report.html").read_text(encoding="utf-8")
    assert after == before.replace(str(finished_run.output), str(folder))


def test_without_evaluation_there_is_no_report_until_it_is_asked_for(fit_options, tmp_path):
    fit(FitConfig(**{**fit_options, "steps": 2}), tmp_path / "run", evaluate=False)
    assert not (tmp_path / "run/report.html").exists()
    page = Checked(write_report([tmp_path / "run"]).read_text(encoding="utf-8"))
    assert "Nothing was measured" in page.text and "set and no backward sets" in page.text
    assert not page.having("section", id="transcripts")


@pytest.mark.parametrize("name", ["normal", "horseshoe", "pooled", "pruned", "combined", "second"])
def test_a_run_of_any_kind_has_a_report(name, tmp_path, old_runs):
    file = write_report([old_runs / name], tmp_path / "report.html")
    page = Checked(file.read_text(encoding="utf-8"))
    assert "What the posterior says by layer" in page.text and "Every option" in page.text
    if name in ("pruned", "combined"):
        assert f"blora-pyro {name.removesuffix('ned').removesuffix('d')}" in page.text
        assert "--prior-from" not in page.text
    if name == "pooled":
        assert "transcribe talk.wav --adapter" in page.text and " --domain " in page.text


def test_several_runs_stand_beside_each_other_in_one_file(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(finished_run.output, other)
    stored = json.loads((other / "run.json").read_text())
    stored["config"]["lr"] = 0.011
    (other / "run.json").write_text(json.dumps(stored))
    file = write_report([finished_run.output, other])
    assert file == Path("report.html")
    page = Checked(file.read_text(encoding="utf-8"))
    assert "2 runs beside each other" in page.text and "What differs" in page.text
    assert re.findall(r"--lr\s*0.03\s*0.011", page.text) and "B − A" in page.text
    assert page.having("h2", id="setsA") and page.having("h2", id="setsB")
    assert len(page.having("li", **{"class": "utterance"})) == 6  # each once, with a line a run
    with pytest.raises(UserError, match=r"'report.html' is there already; give another, or --over"):
        write_report([finished_run.output, other])
    assert write_report([finished_run.output, other], overwrite=True) == file


def test_the_kept_strength_has_its_curve_and_the_contract(kept_run):
    run, _ = kept_run
    page = Checked((run.output / "report.html").read_text(encoding="utf-8"))
    assert "What each strength gains and forgets" in page.text
    assert "keeps the contract (average at most +80 points)" in page.text
    assert "strength that keeps the contract" in page.text


def test_fewer_utterances_are_shown_if_that_is_asked_for(finished_run, tmp_path):
    file = write_report([finished_run.output], tmp_path / "report.html", top=2)
    page = Checked(file.read_text(encoding="utf-8"))
    assert "The 2 of 6 utterances that adaptation changed the most" in page.text
    assert len(page.having("li", **{"class": "utterance"})) == 2


def test_draws_tell_how_sure_the_model_is_of_each_word(finished_run, tmp_path, old_runs):
    file = write_report([finished_run.output], tmp_path / "report.html", samples=2)
    page = Checked(file.read_text(encoding="utf-8"))
    assert page.text.count("how sure") == 6 and "unsure, of 2 draws" in page.text
    shades = [has["style"] for has in page.having("span", **{"class": "sure"})]
    assert len(shades) > 6 and all(re.fullmatch(r"--sure:\d+%", one) for one in shades)
    with pytest.raises(UserError, match="has factors of its own for every domain; leave samples"):
        write_report([old_runs / "pooled"], tmp_path / "pooled.html", samples=2)


def test_what_cannot_be_read_or_written_is_refused(finished_run, tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        write_report([tmp_path / "nothing"], tmp_path / "report.html")
    (tmp_path / "there.html").touch()
    with pytest.raises(UserError, match="is there already"):
        write_report([finished_run.output], tmp_path / "there.html")
    with pytest.raises(UserError, match="can't be written; give a file in a folder that you own"):
        write_report([finished_run.output], tmp_path / "no/report.html")


def test_results_of_another_adapter_are_not_shown(finished_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run.output, folder)
    posterior = Posterior.load(folder)
    mean = {name: one + 1 for name, one in posterior.mean.items()}
    replace(posterior, mean=mean, state={}).save(folder)
    with pytest.raises(UserError, match="was not measured with the adapter beside it"):
        write_report([folder])


# ---- how to use it


def test_commands_are_those_that_this_run_takes(finished_run):
    posterior, record = read_run(finished_run.output)
    lines = use_lines("runs/a b", posterior, record)
    assert "blora-pyro fit --data more --prior-from 'runs/a b'" in lines
    assert lines[-1].startswith("blora-pyro fit ") and "--lr 0.03" in lines[-1]
    assert "--alpha" not in lines[-1] and "--device" not in lines[-1]  # which was not given
    point = replace(posterior, stddev={name: 0 * one for name, one in posterior.stddev.items()})
    assert not any("--prior-from" in line for line in use_lines("run", point, record))


# ---- what it is made of


def test_the_page_asks_for_nothing_and_lets_one_script_run(hostile_page):
    text = hostile_page.read_text(encoding="utf-8")
    page = Checked(text)
    assert text.count("<script") == 1
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    assert not any(tag in ("img", "link", "iframe", "object", "form") for tag, _ in page.found)
    for tag, has in page.found:
        assert not any(name.startswith("on") for name in has), (tag, has)
        assert has.get("href", "#").startswith("#")
        assert has.get("src", "data:audio/wav").startswith("data:audio/wav")


def test_others_words_are_text(hostile_page):
    text = hostile_page.read_text(encoding="utf-8")
    page = Checked(text)
    assert page.text.count('<script>document.title="stolen"</script>') > 8
    assert "{{ 7*7 }}" in page.text
    assert "\u202e" not in text and "\0" not in text
    assert "\\u202eשלום" in page.text and "\\x00" in page.text
    assert "x" * 301 not in text
    assert len(text) < 200_000


# ---- in a browser


def in_browser(function):
    """Mark a test that opens pages; where there is no Chromium it is skipped with a line."""
    missing = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium to open pages in")
    return pytest.mark.chromium(missing(function))


LISTED = "[...document.querySelectorAll('.utterance')].filter(one => !one.hidden)"
VALUES = f"{LISTED}.map(one => Number(one.dataset.%s))"


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def opened(chrome, hostile_page):
    chrome.show(1280)
    chrome.open(hostile_page)
    return chrome


@in_browser
def test_the_page_opens_and_nothing_of_others_runs(opened):
    assert opened.value("document.title").startswith("<script>")
    assert opened.value("document.querySelectorAll('.utterance').length") == 6
    assert opened.value("document.images.length") == 0
    opened.value(
        "(() => { const one = document.createElement('script'); "
        "one.textContent = 'document.title = \"stolen\"'; document.body.append(one); })()"
    )
    assert opened.value("document.title") != "stolen"  # nor would what escaped the escaping
    assert any("Content Security Policy" in one["text"] for one in opened.messages)


@in_browser
def test_utterances_are_sorted_and_chosen_by_set(opened, hostile_page):
    harm = opened.value(VALUES % "harm")
    assert harm == sorted(harm, reverse=True) and len({*harm}) > 2
    choose = (
        "(() => {{ const one = document.querySelectorAll('select')[{}]; "
        "one.value = {!r}; one.dispatchEvent(new Event('change')); }})()"
    )
    opened.value(choose.format(0, "helped"))
    helped = opened.value(VALUES % "help")
    assert helped == sorted(helped) != harm
    opened.value(choose.format(0, "data"))
    assert opened.value(VALUES % "order") == [0, 1, 2, 3, 4, 5]
    opened.value(choose.format(1, "fr"))
    assert opened.value(VALUES % "order") == [5]
    opened.open(hostile_page, "#sort=wrong&set=new+domain")
    wrong = opened.value(VALUES % "wrong")
    assert wrong == sorted(wrong, reverse=True) and len(wrong) == 3


@in_browser
def test_audio_plays_one_at_a_time(opened):
    state = "[...document.querySelectorAll('audio')].map(one => one.paused)"
    heard = (
        "new Promise(done => { const one = document.querySelectorAll('audio')[%d]; "
        "one.ontimeupdate = () => one.currentTime > 0 && done(one.duration); "
        "one.previousElementSibling.click(); })"
    )
    assert opened.value("document.querySelectorAll('button').length") == 6
    assert opened.value(heard % 0) == pytest.approx(0.5, abs=0.05)
    opened.value("document.querySelectorAll('audio')[0].loop = true")
    opened.value(heard % 1)
    assert opened.value(f"{state}[0]") is True
    assert not opened.messages


@in_browser
def test_audio_that_is_linked_plays_from_its_start_on(chrome, hostile_run, tmp_path, monkeypatch):
    monkeypatch.setattr(report_transcripts, "EMBEDDED", 100)
    rows = [{**row, "start": 0.25} for row in hostile_run.rows]
    html = report_html([replace(hostile_run, rows=rows)])
    assert "Audio is linked where it is on the machine" in html and "data:audio" not in html
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    chrome.open(tmp_path / "report.html")
    begun = (
        "new Promise(done => { const one = document.querySelector('audio'); "
        "one.onplaying = () => done(one.currentTime); one.previousElementSibling.click(); })"
    )
    assert chrome.value(begun) >= 0.25 and not chrome.messages


@in_browser
def test_without_scripts_all_but_sorting_is_there(chrome, hostile_page):
    chrome.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chrome.open(hostile_page)
        visible = "[...document.querySelectorAll('audio')].every(one => one.offsetHeight > 20)"
        assert chrome.value(visible) and chrome.value("document.querySelector('select')") is None
        assert chrome.value(f"{LISTED}.length") == 6
    finally:
        chrome.call("Emulation.setScriptExecutionDisabled", value=False)


@in_browser
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_part_is_wider_than_the_window(chrome, hostile_page, width):
    chrome.show(width)
    chrome.open(hostile_page)
    assert chrome.value("document.documentElement.scrollWidth") <= width
    wide = (
        "[...document.querySelectorAll('body *')].filter(one => !one.closest('.wide, svg') "
        f"&& one.getBoundingClientRect().right > {width} + 1)"
        ".map(one => one.outerHTML.slice(0, 99))"
    )
    assert chrome.value(wide) == []


CONTRAST = """(() => {
    const channels = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const light = text => channels(text).map(one => one / 255)
        .map(one => one <= .04045 ? one / 12.92 : ((one + .055) / 1.055) ** 2.4)
        .reduce((sum, one, place) => sum + one * [.2126, .7152, .0722][place], 0);
    const ground = light(getComputedStyle(document.body).backgroundColor);
    const of = name => {
        const [low, high] = [ground, light(getComputedStyle(document.querySelector(name)).color)]
            .sort((one, other) => one - other);
        return (high + .05) / (low + .05);
    };
    return Object.fromEntries(["body", ".quiet", ".gain", "b.harm", ".S", "del"]
        .map(name => [name, of(name)]));
})()"""


@in_browser
@pytest.mark.parametrize("dark", [False, True])
def test_letters_stand_out_in_light_and_dark(chrome, hostile_page, dark):
    chrome.show(1280, dark=dark)
    chrome.open(hostile_page)
    contrast = chrome.value(CONTRAST)
    assert min(contrast.values()) > 4.5, contrast
    ground = chrome.value("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is not dark


@in_browser
def test_an_error_has_a_shape_beside_its_colour(opened):
    line = "getComputedStyle(document.querySelector('{}')).textDecorationLine"
    assert opened.value(line.format(".S")) == "underline"
    assert opened.value(line.format("del")) == "line-through"
    plus = "getComputedStyle(document.querySelector('ins'), '::before').content"
    assert opened.value(plus) == '"+"'
    corner = "getComputedStyle(document.querySelector('.mark.{}')).borderRadius"
    assert opened.value(corner.format("gain")) != opened.value(corner.format("harm"))


@in_browser
def test_it_prints_on_paper_in_dark_mode_too(chrome, hostile_page):
    chrome.show(1280, dark=True)
    chrome.open(hostile_page)
    chrome.call("Emulation.setEmulatedMedia", media="print")
    ground = chrome.value("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"
    hidden = "['nav', '#controls', '.listen'].map(one => document.querySelector(one).offsetHeight)"
    assert chrome.value(hidden) == [0, 0, 0]
    assert chrome.value("document.querySelector('details table').offsetHeight") > 100
    chrome.call("Emulation.setEmulatedMedia", media="")
    assert chrome.pdf().startswith(b"%PDF-") and len(chrome.pdf()) > 20_000
