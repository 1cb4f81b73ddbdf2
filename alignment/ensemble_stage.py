"""The other reward models of a run, beside the one that it trains or pins: found, and pinned to a version."""

from dataclasses import asdict
from typing import Any

from alignment.config import Config
from alignment.errors import ConfigError
from alignment.reward_repository import SERVED_VERSIONS, exported_versions, read_export
from alignment.reward_server import external_url
from alignment.task import reward_client
from alignment.types import RewardModelRef


def find_others(config: Config) -> dict[str, list[dict[str, Any]]]:
    """References to the `members` other than reward.name and to the `shadows`, as scorers.json keeps them.

    Empty where reward.name scores alone. Raises ConfigError, ModelError and RewardServerError.
    """
    own = config.reward_ensemble
    if not own.members and not own.shadows:
        return {}
    names = {"members": [name for name in own.members if name != config.reward.name], "shadows": own.shadows}
    return {key: [asdict(_find(config, key, name)) for name in named] for key, named in names.items()}


def check_distinct(reward: RewardModelRef, others: dict[str, list[dict[str, Any]]]) -> None:
    """Raise ConfigError where a version would score twice, or a server could not hold all versions of a name."""
    refs = [reward, *(RewardModelRef(**ref) for refs in others.values() for ref in refs)]
    versions: dict[str, list[str]] = {}
    for ref in refs:
        versions.setdefault(ref.name, []).append(ref.version)
    for name, found in versions.items():
        if len(set(found)) != len(found) or len(found) > SERVED_VERSIONS:
            raise ConfigError(
                f"reward_ensemble and reward.name would score with {name} version {', '.join(found)}: each version may "
                f"score once, and a server holds {SERVED_VERSIONS} of a name; change reward_ensemble"
            )


def _find(config: Config, key: str, text: str) -> RewardModelRef:
    """The version that `name` or `name/version` means: the newest where none is named."""
    name, _, version = text.partition("/")
    if url := external_url(config.reward.url):
        with reward_client(config, url, name, version) as client:
            return RewardModelRef(name, client.model_version, "", "", None)
    known = exported_versions(config.reward_repository, name)
    if (version not in known) if version else (not known):
        raise ConfigError(
            f"reward_ensemble.{key} ({text}): {config.reward_repository}/{name} holds "
            f"{'the versions ' + ', '.join(known) if known else 'no version'}; `python flows/reward_model_flow.py run "
            f"--set reward.name={name}` trains and exports one"
        )
    return read_export(config.reward_repository, name, version or known[-1], config.run)
