"""What a step asks of Kubernetes under a config; see config_effects.py."""

from typing import Any

from alignment.config import Config
from phase_effects import decorators


def repeated(config: Config) -> dict[str, Any]:
    """The rule by which a step that has none of its own is repeated."""
    return decorators(config.model_dump_json(), "rs_flow")["start", "retry"]
