"""Tasks of EleutherAI's lm-evaluation-harness, for a policy that is loaded already.

The package is optional (requirements-lm-eval.txt) and imported here alone. A task is a name that the harness knows,
whose data it takes from a hub, or the .yaml file of one's own. Code that a task would have to run is not confirmed.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import ConfigError, DataError

if TYPE_CHECKING:
    from models.policy import Policy


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise ConfigError where the harness, or a task's file, is not there."""
    if not tasks:
        return
    named = f"evaluation.lm_eval_tasks ({', '.join(tasks)})"
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"{named} needs lm_eval, which is not installed: pip install -r requirements-lm-eval.txt")
    for task in tasks:
        if _is_file(task) and not Path(task).is_file():
            raise ConfigError(f"{named}: there is no file {task}")


def run_tasks(
    policy: "Policy", tasks: Sequence[str], *, limit: int | None, batch_rows: int, seed: int
) -> dict[str, dict[str, float]]:
    """Task to metric to value, as the harness names and defines them; standard errors are left out.

    `limit` is the number of examples read per task, `batch_rows` the rows of a forward pass. Raises DataError.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Reading the harness's own tasks takes seconds, which a file does not need.
    known = TaskManager(include_defaults=not all(_is_file(task) for task in tasks))
    model = HFLM(pretrained=policy.model, tokenizer=policy.reader.tokenizer, batch_size=batch_rows)
    try:
        results: Mapping[str, Any] | None = simple_evaluate(
            model,
            tasks=list(tasks),
            task_manager=known,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0,
            apply_chat_template=policy.reader.prompt_format == "chat",
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as error:  # of many types: a data set that cannot be had, a task's own code
        raise DataError(
            f"evaluation.lm_eval_tasks ({', '.join(tasks)}): {type(error).__name__}: {error}. "
            "`lm-eval ls tasks` lists the known ones; those need a hub"
        ) from error
    assert results is not None  # it is on the first rank
    return {task: _numbers(values) for task, values in results["results"].items()}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics alone: `acc,none` is the metric `acc` after the filter `none`, which does nothing."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "," in name and "_stderr," not in name
    }


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))
