"""The progress line: states rendered by hand, a real pseudo-terminal, and a stream that is none."""

import io
from typing import Any

import pytest

from alignment.progress import FitLines, ProgressLines, ProgressState, advance, duration, render_line


def step_event(step: int, **changes: Any) -> dict[str, Any]:
    event = {"kind": "step", "step": step, "reward_mean": 0.4123, "selected_reward_mean": 1.87, "loss": 2.0}
    return event | {"seconds": {"rollouts": 3.0, "scoring": 1.0, "update": 2.0}, "tokens_per_second": 849.6} | changes


def phase_event(step: int, done: int) -> dict[str, Any]:
    return {"kind": "phase", "step": step, "phase": "rollouts", "done": done, "total": 512, "tokens": done * 20}


class HandClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_by_hand() -> None:
    assert render_line(ProgressState(10)) == "[..........] step 0/10"
    assert (
        render_line(ProgressState(10, step=1, phase="rollouts", done=128, total=512))
        == "[..........] step 1/10 | rollouts 128/512"
    )
    state = ProgressState(
        total_steps=10,
        finished_steps=3,
        step=4,
        phase="update",
        reward=0.4123,
        selected_reward=1.87,
        validation_reward=-0.5,
        tokens_per_second=849.6,
        step_seconds=(50.0, 6.0, 7.0),
    )
    # 7 steps to go at the median of 7 s
    assert render_line(state) == (
        "[###.......] step 4/10 | update | reward 0.412, selected 1.870 | validation -0.500 | 850 tokens/s | 49 s left"
    )


def test_nothing_is_left_after_the_last_step() -> None:
    state = advance(ProgressState(2, finished_steps=1, step_seconds=(5.0,)), step_event(2))
    assert render_line(state) == "[##########] step 2/2 | reward 0.412, selected 1.870 | 850 tokens/s"


def test_an_empty_selection_is_said() -> None:
    state = advance(ProgressState(1), step_event(1, selected_reward_mean=None))
    assert "reward 0.412, none selected" in render_line(state)


def test_events_move_the_state() -> None:
    state = advance(ProgressState(10), phase_event(1, 128))
    assert (state.step, state.phase, state.done, state.total) == (1, "rollouts", 128, 512)
    state = advance(state, step_event(1))
    assert (state.finished_steps, state.phase, state.step_seconds) == (1, "", (6.0,))
    assert advance(state, step_event(2), step_seconds=9.0).step_seconds == (6.0, 9.0)
    assert advance(state, {"kind": "validation", "step": 1, "reward_mean": 0.5}).validation_reward == 0.5
    assert advance(state, {"kind": "task", "name": "start", "seconds": 1.0}) == state


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (304, "5 min 04 s"),
        (3600, "1 h 00 min"),
        (7860, "2 h 11 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_file_gets_a_line_per_step_and_one_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), HandClock()
    line = ProgressLines(2, stream, clock)
    for second in range(26):
        clock.now = 100.0 + second
        line.update(phase_event(1, second))
    line.update(step_event(1))
    line.update({"kind": "note", "text": "checkpoint\r\x1b[2J saved"})
    line.update(phase_event(2, 1))
    clock.now += 6
    line.update(step_event(2))
    assert stream.getvalue().splitlines() == [
        "[..........] step 1/2 | rollouts 10/512",
        "[..........] step 1/2 | rollouts 20/512",
        "[#####.....] step 1/2 | reward 0.412, selected 1.870 | 850 tokens/s | 6 s left",
        "checkpoint  [2J saved",
        "[##########] step 2/2 | reward 0.412, selected 1.870 | 850 tokens/s",
    ]
    assert all(c == "\n" or c.isprintable() for c in stream.getvalue())
    assert line.state.step_seconds == (6.0, 6.0)  # the first by its phases, the second by the clock


def test_a_trainings_lines_have_a_bar_a_rate_and_the_time_left():
    said, seconds = [], iter([0.0, 20.0, 22.0, 26.0, 30.0])
    lines = FitLines(said.append, "sft", "sft", clock=lambda: next(seconds))
    lines.update({"kind": "note", "text": "hello"})
    for step in range(1, 5):  # at 20, 22, 26 and 30 s
        lines.update({"kind": "sft_step", "step": step, "steps": 10, "loss": 1 / step, "tokens": 100})
    lines.update({"kind": "sft_validation", "step": 4, "loss": 0.5})
    lines.update({"kind": "reward_step", "step": 5})  # another training's
    assert said == [
        "sft: hello",
        "sft: [#.........] step 1/10 | loss 1.000",
        "sft: [###.......] step 3/10 | loss 0.333 | 33.3 tokens/s | 21 s left",
        "sft: validation after step 4: loss 0.500",
    ]
