"""What a step asks of Kubernetes under a config; see config_effects.py."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from metaflow.user_configs.config_parameters import ConfigValue

import placement
from alignment.config import Config


def repeated(config: Config) -> dict[str, Any]:
    """The rule by which a step that has none of its own is repeated."""
    seen: dict[str, Any] = {}
    step = SimpleNamespace(
        get_decorator_specs=lambda _: [],
        add_decorator=lambda name, deco_kwargs=None: seen.update({name: deco_kwargs}),
    )
    flow = SimpleNamespace(configs=[("config", ConfigValue(config.model_dump(mode="json")))], steps=[("start", step)])
    with patch.dict(placement.os.environ, {placement.COMMAND_STARTED: "0"}):
        placement.placed.pre_mutate(None, flow)
    assert {"kubernetes", "if_curable"} <= set(seen)
    return seen["retry"]
