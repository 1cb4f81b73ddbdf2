"""An RS step's phases as they run beside each other."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import config_effects
from alignment import rs_step
from alignment.judge_stage import prepare_judge
from test_config import effect_config

PATIENCE_S = 60
"""How long the stand-in waits before the test fails; where phases overlap, nobody waits."""


def test_a_batch_is_scored_while_the_next_one_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    second = threading.Event()

    class Patient(config_effects.RewardClientStandIn):
        """Stands in for a server that answers a step's first batch only after its second one was drawn."""

        def score(self, conversations: Any) -> list[float]:
            if order and not second.wait(PATIENCE_S):
                raise RuntimeError("the second batch is not drawn before the first is answered")
            order.append("answered") if order else None
            return super().score(conversations)

    def watched(*arguments: Any, real: Any = rs_step.generate, **others: Any) -> Iterator[Any]:
        for i, batch in enumerate(real(*arguments, **others)):
            if others["stream"].endswith("/step-1"):
                order.append("drawn")
                if i == 1:
                    second.set()
            yield batch

    monkeypatch.setattr(config_effects, "RewardClientStandIn", Patient)
    monkeypatch.setattr(rs_step, "generate", watched)
    prepare_judge(effect_config(tmp_path), tmp_path / "judge", lambda _: None)
    done = config_effects.run_iteration(effect_config(tmp_path, "rollouts.batch_tokens=76"))
    assert order[:3] == ["drawn", "drawn", "answered"]
    assert done.steps("step")[0] == 1
