"""The live card: what it says at each moment, how seldom it is written, and that its faults stay its own."""

import threading
from pathlib import Path
from typing import Any

import pytest

from alignment.card_writer import REFRESH_S, CardWriter
from alignment.live_card import MOST_POINTS, LiveCard
from alignment.run_folder import RunFolder, create
from alignment.types import Decision, ScoredRollout
from test_report import Page, step_record

VALIDATION = {"kind": "validation", "step": 0, "reward_mean": 0.25, "judge_mean": 0.0, "seconds": 1.0}


def phase(step: int, done: int) -> dict[str, Any]:
    return {"kind": "phase", "step": step, "phase": "rollouts", "done": done, "total": 64, "tokens": 9}


def rollouts(run: RunFolder, step: int) -> None:
    scored = [
        ScoredRollout(prompt_id="p", rollout_index=i, response=text, finish_reason="stop", prompt="Say", reward=reward)
        for i, (text, reward) in enumerate((("good <b>", 1.5), ("bad", -0.5), ("x" * 1000, 0.5)))
    ]
    run.write_rollouts(step, scored, [Decision("p", i, i == 0, f"because {i}") for i in range(3)])


def test_the_card_follows_the_run(tmp_path: Path) -> None:
    run, shown = create(tmp_path, "7", "{}"), []
    run.append_metrics(VALIDATION)
    run.append_metrics(step_record(1))
    card = LiveCard(run, 4, shown.append)
    assert "RS step 1 of 4 is done." in Page(shown[-1]()).text  # what an earlier task has done
    card.update(phase(2, 16))
    assert "RS step 1 of 4 is done; in RS step 2: rollouts 16 of 64." in Page(shown[-1]()).text
    card.update({"kind": "note", "text": "nothing"})
    assert len(shown) == 2
    rollouts(run, 2)
    card.update(step_record(2), 30.0)
    page = Page(shown[-1]())
    assert "RS step 2 of 4 is done; 1 min 00 s left." in page.text  # two steps of 30 s
    assert "Mean reward, all rollouts0.200" in page.text and "Mean reward, selected1.200" in page.text
    assert "Mean reward, validation0.250" in page.text and "Rollout tokens per second400" in page.text
    assert "good <b>" in page.text and "reward 1.500: because 0" in page.text
    assert "bad" in page.text and "reward -0.500: because 1" in page.text
    assert not page.open and not {"script", "b"} & {tag for tag, _ in page.elements}
    assert [len(line.split()) for line in page.lines("rewards")] == [2, 2]


def test_the_card_stays_small_however_long_the_run(tmp_path: Path) -> None:
    run, shown = create(tmp_path, "7", "{}"), []
    card = LiveCard(run, 1000, shown.append)
    for step in range(1, 1001):
        card.update(step_record(step), 1.0)
    html = shown[-1]()
    assert len(html) < 150_000
    (every, _) = Page(html).lines("rewards")
    assert len(every.split()) <= MOST_POINTS and every.endswith("424.0,43.3")  # the last step, of 0 to 120


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_only_the_newest_page_is_written_and_seldom() -> None:
    clock, saved, drawn = Clock(), [], []

    def page(name: str) -> Any:
        return lambda: drawn.append(name) or name

    writer = CardWriter(saved.append, clock)
    for name, now in (("a", 0.0), ("b", 1.0), ("c", REFRESH_S), ("d", REFRESH_S + 1)):
        clock.now = now
        writer.show(page(name))
        writer._thread.join()
    assert saved == drawn == ["a", "c"]
    writer.close()
    assert saved == ["a", "c", "d"]
    writer.close()
    assert saved == ["a", "c", "d"]


def test_a_slow_store_is_asked_less_often_and_never_waited_for() -> None:
    clock, go_on, saved = Clock(), threading.Event(), []

    def save(page: str) -> None:
        go_on.wait(10)
        clock.now += 2.0
        saved.append(page)

    writer = CardWriter(save, clock)
    writer.show(lambda: "a")
    writer.show(lambda: "b")  # comes back at once, while the first one is being written
    assert saved == []
    go_on.set()
    writer._thread.join()
    clock.now = 2.0 + 39.0  # 2 s of writing are a twentieth of 40 s
    writer.show(lambda: "c")
    assert saved == ["a"]
    clock.now = 2.0 + 40.0
    writer.show(lambda: "d")
    writer._thread.join()
    assert saved == ["a", "d"]


def test_a_store_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignment.card_writer.CLOSE_S", 0.05)
    go_on, asked, clock = threading.Event(), [], Clock()

    def save(page: str) -> None:
        asked.append(page)
        if page == "b":
            go_on.wait(10)

    writer = CardWriter(save, clock)
    writer.show(lambda: "a")
    writer._thread.join()
    writer.show(lambda: "b")  # too soon after the first: it is the last page
    writer.close()
    assert asked == ["a", "b"] and writer._thread.is_alive()
    go_on.set()


def test_records_of_an_older_version_are_shown(tmp_path: Path) -> None:
    run, shown = create(tmp_path, "7", "{}"), []
    run.append_metrics({"note": "of no kind"})
    run.append_metrics({k: v for k, v in step_record(1).items() if k != "tokens_per_second"})
    LiveCard(run, 4, shown.append)
    assert "Rollout tokens per second–" in Page(shown[-1]()).text


def test_a_fault_is_told_once_and_stops_nothing_but_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def save(page: str) -> None:
        asked.append(page)
        raise OSError("the store is\nfull")

    clock = Clock()
    writer = CardWriter(save, clock)
    for now in (0.0, 100.0):
        clock.now = now
        writer.show(lambda: "page")
        writer._thread.join()
    writer.close()
    assert asked == ["page"]
    assert capsys.readouterr().err == "the card is no longer written: OSError: the store is full\n"
