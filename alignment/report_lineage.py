"""What made an evaluated checkpoint, for its report: the chain of manifests down to the base, data, code, packages."""

from typing import Any

from alignment.errors import AlignmentError
from alignment.lineage import chain
from alignment.run_folder import RunFolder


def lineage_of(run: RunFolder, step: int) -> dict[str, Any]:
    """The chain from the checkpoint of RS step `step` down, newest first, and what its manifest names.

    Where the chain is broken, `{"fault"}` says how: a report is still worth having.
    """
    try:
        links = [link for link in chain(run) if link["step"] <= step]
        return _told(run, links) if links else {"fault": f"no manifest is of RS step {step} or before"}
    except AlignmentError as error:
        return {"fault": str(error)}
    except KeyError as error:
        return {"fault": f"a manifest lacks {error}"}


def _told(run: RunFolder, links: list[Any]) -> dict[str, Any]:
    newest, base, validations = links[0], links[-1]["parent"], run.validations()
    return {
        "chain": [
            {
                "step": link["step"],
                "run_id": link["run_id"],
                "weights_sha256": link["weights_sha256"],
                "rs_steps": len(link["rollouts"]),
                "rollouts_of": link.get("reused_rollouts", {}).get("run"),
                "selection": link["selection"]["strategy"],
                "reward_model_digest": link["reward_model"].get("digest"),
                "validation_reward": validations.get(link["step"]),
            }
            for link in links
        ],
        "base": {"model": base["model"], "digest": base.get("weights_sha256") or base.get("revision")},
        "prompts_read": newest["position"]["prompts_read"],
        "seed": newest["position"]["seed"],
        "data": dict(newest["data"]),
        "code": {key: newest["code"][key] for key in ("sha256", "commit", "dirty")},
        "packages": dict(newest["packages"]),
        "created": newest["created"],
    }
