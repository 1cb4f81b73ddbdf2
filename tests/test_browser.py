"""report.html in headless Chromium, as people open it: its numbers are report.json's, and it needs nothing else.

The report is made up and complete (`made_up_report`). `make test-browser` installs Debian's Chromium; without one these
tests skip. `make screenshots` keeps the pictures of the docs, which are taken here.
"""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from alignment.live_card import LiveCard
from alignment.report import write_report
from alignment.run_folder import create
from alignment.types import Decision, ScoredRollout
from made_up_report import CONFIG, full_report, metrics

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH: `make test-browser` installs Debian's")

SAMPLES = 20
"""More of them make the search for faults slow."""
DESKTOP, PHONE = (1100, 900), (360, 740)
LARGEST = 200_000
"""Bytes of a picture in docs/images/."""
PICTURES = {
    "result": ("light", DESKTOP, "section[aria-labelledby=result]"),
    "win-rate-and-kl": ("light", DESKTOP, "section[aria-labelledby=frontier] .charts"),
    "over-optimisation": ("dark", DESKTOP, "section[aria-labelledby=over]"),
    "reward-server": ("light", DESKTOP, "section[aria-labelledby=server] .charts"),
    "phone": ("dark", PHONE, None),
}
"""Scheme, window and element of each picture; the window itself where there is none."""
COLOURS = "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
VALUES = """() => [...document.querySelectorAll('[data-key]')].map(
    e => [e.dataset.key, e.getAttribute('value'), e.textContent])"""
SHOWN = """() => [...document.querySelectorAll('.sample')].sort(
    (a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top).map(e => e.ariaLabel)"""


@dataclass
class Opened:
    """A page, and what happened while it was open: requests beside its own file's, and lines on its console."""

    page: Any
    requests: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = create(tmp_path_factory.mktemp("browser"), "1795721048904599", CONFIG)
    report, samples = full_report()
    write_report(folder, report, samples[:SAMPLES])
    return folder.path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


def opened(browser: Any, run: Path, scheme: str, window: tuple[int, int] = DESKTOP) -> Opened:
    size = dict(zip(("width", "height"), window, strict=True))
    own = Opened(browser.new_context(color_scheme=scheme, viewport=size).new_page())
    own.page.on("request", lambda request: own.requests.append(request.url))
    own.page.on("console", lambda message: own.console.append(message.text))
    own.page.on("pageerror", lambda error: own.console.append(str(error)))
    own.page.goto((run / "report.html").as_uri())
    return own


def test_every_number_is_that_of_report_json_with_no_request_and_nothing_on_the_console(browser, run, scheme) -> None:
    own = opened(browser, run, scheme)
    report = json.loads((run / "report.json").read_text())
    shown = own.page.evaluate(VALUES)
    assert {"evaluation.win_rate", "evaluation.reward_gain_ci95", "selection_lift.reward"} <= {key for key, *_ in shown}
    for key, value, text in shown:
        expected: Any = report
        for part in key.split("."):
            expected = expected[int(part)] if isinstance(expected, list) else expected[part]
        assert (text if value is None else json.loads(value)) in (expected, str(expected)), key
        assert text.strip(), key
    assert [url for url in own.requests if not url.startswith("data:")] == [(run / "report.html").as_uri()]
    assert own.console == []


def test_dark_is_dark_and_light_is_light(browser, run) -> None:
    light, dark = (opened(browser, run, scheme).page.evaluate(COLOURS) for scheme in ("light", "dark"))
    assert light[0] == "rgb(255, 255, 255)" and dark[0] == "rgb(20, 22, 26)"
    assert light[1] != dark[1]


def test_samples_stand_in_the_order_that_is_asked_for(browser, run) -> None:
    page = opened(browser, run, "light").page
    samples = full_report()[1][:SAMPLES]
    rewards = [sample.aligned_reward - sample.base_reward for sample in samples]
    tokens = [sample.aligned_tokens - sample.base_tokens for sample in samples]
    drawn = [f"Sample {i + 1}" for i in range(len(rewards))]
    assert page.evaluate(SHOWN) == drawn
    for value, changes, sign in (("reward-up", rewards, -1), ("reward-down", rewards, 1), ("tokens-up", tokens, -1)):
        page.check(f"input[value={value}]")
        expected = sorted(range(len(changes)), key=lambda i, of=changes, sign=sign: sign * of[i])
        assert [changes[int(name.split()[1]) - 1] for name in page.evaluate(SHOWN)] == [changes[i] for i in expected]
    page.check("input[value=prompt]")
    assert page.evaluate(SHOWN) == drawn


def test_a_phone_shows_it_without_scrolling_sideways(browser, run, scheme) -> None:
    page = opened(browser, run, scheme, PHONE).page
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    page.set_viewport_size({"width": 320, "height": 600})
    assert page.evaluate("document.documentElement.scrollWidth") == 320


def test_it_prints(browser, run, tmp_path) -> None:
    page = opened(browser, run, "dark").page
    page.emulate_media(media="print")
    assert page.evaluate(COLOURS)[0] == "rgb(255, 255, 255)"
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.scrollHeight <= e.clientHeight)")
    pdf = page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000


@pytest.mark.slow
def test_axe_finds_nothing_against_the_rules_of_wcag(browser, run, scheme) -> None:
    import axe_playwright_python

    page = opened(browser, run, scheme).page
    # Evaluated by the debugger, which the page's content policy does not bind.
    page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text())
    found = page.evaluate("() => axe.run()")
    assert len(found["passes"]) > 20
    told = {rule["id"]: [node["html"][:200] for node in rule["nodes"]][:3] for rule in found["violations"]}
    assert told == {}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in its eighth RS step; its report.html is the live card."""
    run, shown = create(tmp_path_factory.mktemp("live"), "1795721048904599", CONFIG), []
    card = LiveCard(run, 12, shown.append)
    rows = full_report()[1]
    scored = [
        ScoredRollout(
            **{"prompt_id": f"p{i}", "rollout_index": k, "response": text, "finish_reason": "stop"},
            **{"prompt": rows[i].prompt, "reward": reward},
        )
        for i in range(3)
        for k, (text, reward) in enumerate(((rows[i].aligned, 1.5 + i), (rows[i].base, -0.5)))
    ]
    run.write_rollouts(7, scored, [Decision(r.prompt_id, r.rollout_index, r.reward > 0, "rank 1") for r in scored])
    for record in metrics(random.Random(0)):
        if record["step"] <= 7:
            card.update(record, 19.0)
    card.update({"kind": "phase", "step": 8, "phase": "rollouts", "done": 96, "total": 256})
    (run.path / "report.html").write_text(shown[-1]())
    return run.path


def test_the_live_card_is_a_page_of_the_same_kind(browser, live, tmp_path, request) -> None:
    own = opened(browser, live, "light", PHONE)
    assert "RS step 7 of 12 is done; in RS step 8: rollouts 96 of 256; 1 min 35 s left." in own.page.inner_text("body")
    assert own.page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    assert len(own.requests) == 1 and own.console == []
    folder = Path(request.config.getoption("--screenshots") or tmp_path)
    picture = opened(browser, live, "light").page.screenshot(path=folder / "report-live-card.png")
    assert picture.startswith(b"\x89PNG") and len(picture) < LARGEST


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_of_the_docs(browser, run, tmp_path, request, name) -> None:
    folder = Path(request.config.getoption("--screenshots") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    scheme, window, element = PICTURES[name]
    page = opened(browser, run, scheme, window).page
    picture = (page.locator(element) if element else page).screenshot(path=folder / f"report-{name}.png")
    assert picture.startswith(b"\x89PNG") and len(picture) < LARGEST
