"""RSIterationFlow with a stand-in for sampling: its shards cost what their Metaflow tasks do and load no policy."""

from collections.abc import Sequence
from typing import Any

from alignment import disaggregated
from alignment.types import Prompt, Rollout
from rs_iteration_flow import RSIterationFlow
from sources import main


def sample_stand_in(
    _config: Any, _run: Any, prompts: Sequence[Prompt], count: int, *_: Any, **__: Any
) -> list[Rollout]:
    """Made-up responses that no policy has sampled."""
    return [
        Rollout(
            prompt_id=prompt.prompt_id, rollout_index=k, response=f"{k} of {prompt.prompt_id}", finish_reason="stop",
            messages=prompt.messages, prompt_ids=(3, 4), response_ids=(5, 6),
        )
        for prompt in prompts
        for k in range(count)
    ]  # fmt: skip


disaggregated.sample = sample_stand_in

if __name__ == "__main__":
    main(RSIterationFlow)
