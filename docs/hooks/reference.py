"""The reference pages of the site, read from the code: config, records, files of a run, errors, commands.

Nothing is imported but the config, whose defaults are values; the rest is read as text. A key without a word on it, or
a word on a key that is gone, ends the build.
"""

import ast
import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
NEMO = ROOT / "docs" / "nemo-aligner-keys.md"

STEP = {
    "kind": "`step`",
    "step": "number of the RS step, from 1",
    "reward_mean": "mean reward of all rollouts that the policy drew",
    "selected_reward_mean": "mean reward of the selected ones; null where none was",
    "judge_mean": "mean score of the judge over all rollouts",
    "selected_judge_mean": "the same over the selected ones",
    "response_length_mean": "mean tokens of a response",
    "truncated_fraction": "share of responses that ended at the limit",
    "duplicate_fraction": "share of responses that repeat another one of their prompt",
    "num_rollouts": "responses drawn",
    "num_selected": "responses trained on",
    "num_selected_references": "reference answers among them (`rollouts.references=join`)",
    "best_of_n": "expected best reward of 1, 2, … n of a prompt's own responses",
    "entropy": "mean −log p of the tokens drawn, nats per token; null for rollouts without probabilities",
    "prompt_length_mean": "tokens of a prompt",
    "selected_response_length_mean": "tokens of a response trained on",
    "gpu_memory_bytes": "the most that a worker's GPU held; null without GPUs",
    "optimizer_steps": "updates of the weights in this step",
    "response_tokens": "response tokens trained on",
    "loss": "mean negative log-likelihood of those tokens, nats per token, the KL penalty included",
    "kl": "exact KL to the base on the texts trained on, nats per token; null without `training.kl_penalty`",
    "grad_norm": "largest norm of the gradient before clipping, of the optimizer steps",
    "lr": "learning rate, the same in all optimizer steps of the RS step",
    "seconds": "seconds of the phases `rollouts`, `scoring`, `update`, which may overlap",
    "scoring_server": "what Triton did in the step: mean batch, queue and compute time, failures, padding, restarts",
    "tokens_per_second": "response tokens drawn per second of the rollouts",
    "prompt_ids": "prompts of the step, in the order read",
    "lost_prompts": "prompts whose shard was lost (`phases.max_lost_shards`); only where there are any",
    "reused_from": "the run that drew the rollouts, where it was another one",
}
VALIDATION = {
    "kind": "`validation`",
    "step": "the RS step before it; 0 is the base's",
    "reward_mean": "mean reward, one response a prompt",
    "judge_mean": "mean score of the judge",
    "rewards": "reward of each prompt, in their order",
    "judged": "the judge's score of each",
    "seconds": "seconds that it took",
}
TASK = {
    "kind": "`task`",
    "name": "`start`, `reward_model`, `iterate` or `evaluate`",
    "seconds": "seconds that the task took; `iterate` says besides what went to `starting`, `saving`, `ending`",
}
ROLLBACK = {
    "kind": "`rollback`",
    "step": "the RS step that failed badly",
    "rule": "`finite`, `kl` or `validation`",
    "value": "what was measured",
    "ci95": "its 95 % interval, where the rule has one",
    "bound": "the bound in `promotion` that it broke",
    "reason": "the same in a sentence",
}
RECORDS = (
    ("A step", "alignment/records.py", "step_record", STEP),
    ("A validation", "alignment/records.py", "validation_record", VALIDATION),
    ("A task", "alignment/task.py", "record", TASK),
    ("A rollback", "alignment/rollback.py", "_record", ROLLBACK),
)
COMMANDS = (
    *("alignment.runs", "alignment.compare", "alignment.lineage", "alignment.strategies", "alignment.hh"),
    *("alignment.scaling", "models.chat", "models.policy_export", "models.registry", "infra.triton", "infra.wandb"),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    pages = {"config": config_page, "records": records_page, "run-folder": folder_page, "errors": errors_page}
    for name, page in {**pages, "commands": commands_page}.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


# Config


def config_page() -> str:
    """Each field with its default, what it does, and NeMo-Aligner's names for it."""
    sys.path.insert(0, str(ROOT))
    from alignment.config import Config

    words = docstrings(*sorted((ROOT / "alignment").glob("config*.py")))
    nemo, lines = nemo_names(), list(CONFIG_HEAD)
    for name, field in Config.model_fields.items():
        fields = getattr(field.annotation, "model_fields", None)
        if fields is None:
            lines += [f"## {name}", "", words["Config", name], "", f"Default: `{_shown(field.default)}`", ""]
            continue
        lines += [f"## {name}", "", "| field | default | |", "|---|---|---|"]
        for key, default, text in _fields(words, field.annotation):
            theirs = nemo.get(f"{name}.{key}")
            also = f" NeMo-Aligner: {', '.join(f'`{one}`' for one in theirs)}." if theirs else ""
            lines.append(f"| `{key}` | `{_shown(default)}` | {text}{also} |")
        lines.append("")
    return "\n".join(lines)


CONFIG_HEAD = (
    "# Config",
    "",
    "Every field, its default, and what NeMo-Aligner's rejection-sampling tutorial calls it. A preset states what",
    "differs from the defaults, `--set section.field=value` overrides one.",
    "[All of NeMo-Aligner's keys](../nemo-aligner-keys.md) with those that have no place here.",
    "",
)


def _fields(words: dict[tuple[str, str], str], section: Any) -> Iterator[tuple[str, Any, str]]:
    """Key, default and text of each field; those of a section within a section as `section.field`."""
    for own, one in section.model_fields.items():
        if hasattr(one.annotation, "model_fields"):
            note = words.get((section.__name__, own), "")
            for key, default, text in _fields(words, one.annotation):
                yield f"{own}.{key}", default, f"{text} {note}".rstrip() if f"`{key}`" in note else text
        else:
            yield one.alias or own, one.get_default(call_default_factory=True), _word(words, section, own)


def _word(words: dict[tuple[str, str], str], section: Any, own: str) -> str:
    """The docstring under a field, or under that of the section that it comes from."""
    for owner in section.__mro__:
        if (owner.__name__, own) in words:
            return html.escape(words[owner.__name__, own], quote=False).replace("|", "\\|")
    raise PluginError(f"{section.__name__}.{own} has no docstring")


def _shown(value: Any) -> str:
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    return json.dumps(value, ensure_ascii=False, default=list)


def docstrings(*files: Path) -> dict[tuple[str, str], str]:
    """Text under each annotated field or property of each class, in one line, by class and field."""
    found = {}
    for file in files:
        for owner in ast.parse(file.read_text()).body:
            if not isinstance(owner, ast.ClassDef):
                continue
            for at, node in enumerate(owner.body):
                text = None
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    after = owner.body[at + 1] if at + 1 < len(owner.body) else None
                    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                        text, name = str(after.value.value), node.target.id
                elif isinstance(node, ast.FunctionDef):
                    text, name = ast.get_docstring(node), node.name
                if text:
                    found[owner.name, name] = " ".join(text.split())
    return found


def nemo_names() -> dict[str, list[str]]:
    """NeMo-Aligner's keys by ours, those of rejection sampling before the others'."""
    found: dict[str, list[str]] = {}
    for theirs, ours in re.findall(r"^\| (`.*?`) \| `([\w.]+)` \|", NEMO.read_text(), re.MULTILINE):
        names = found.setdefault(ours, [])
        names += [key for key in re.findall(r"`([^`]+)`", theirs) if key not in names]
    return found


# Records of metrics.jsonl


def records_page() -> str:
    """The keys of each kind of record."""
    lines = [
        "# Records of metrics.jsonl",
        "",
        "One JSON object a line, in the order in which things happened. A number that is not finite is null. Runs in",
        "which several reward models score have `member_means`, `shadow_means` and the like besides",
        "([several reward models](../several-reward-models.md)), runs with `reuse.scores` have `scoring_cache`.",
        "Rollouts themselves stand in `rollouts/step-*.parquet` ([a run's folder](run-folder.md)).",
        "",
    ]
    for title, file, function, words in RECORDS:
        keys = _keys(ROOT / file, function)
        if keys != set(words):
            raise PluginError(
                f"{file}: {function} writes {sorted(keys ^ set(words))}, of which docs/hooks/reference.py tells other"
            )
        lines += [
            f"## {title}",
            "",
            "| key | |",
            "|---|---|",
            *(f"| `{key}` | {text} |" for key, text in words.items()),
            "",
        ]
    return "\n".join(lines)


def _keys(file: Path, function: str) -> set[str]:
    """The constant keys of the dict that a function returns, those of dicts unpacked into it included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            returned = [one.value for one in ast.walk(node) if isinstance(one, ast.Return)]
            return {key for value in returned if isinstance(value, ast.Dict) for key in _own_keys(value)}
    raise PluginError(f"{file} has no function {function}")


def _own_keys(value: ast.Dict) -> Iterator[str]:
    for key, inner in zip(value.keys, value.values, strict=True):
        if isinstance(key, ast.Constant):
            yield str(key.value)
        elif key is None and isinstance(inner, ast.IfExp) and isinstance(inner.body, ast.Dict):
            yield from _own_keys(inner.body)


# Files, errors, commands


def folder_page() -> str:
    """What `RunFolder` says of each path, and the columns of the rollouts."""
    file = ROOT / "alignment" / "run_folder.py"
    tree = ast.parse(file.read_text())
    owner = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "RunFolder")
    lines = ["# A run's folder", "", "`<run.root>/<run id>/`; `latest` beside it points to the newest run.", ""]
    lines += ["| path | |", "|---|---|"]
    for node in owner.body:
        path = _path(node)
        if path:
            lines.append(f"| `{path}` | {' '.join((ast.get_docstring(node) or '').split())} |")
    columns = next(
        ast.literal_eval(n.value)
        for n in ast.parse((ROOT / "alignment" / "rollout_table.py").read_text()).body
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "COLUMNS"
    )
    lines += ["", "## Columns of rollouts/step-*.parquet", "", "| column | type |", "|---|---|"]
    lines += [f"| `{name}` | {kind.removesuffix('_').replace('_', ' ')} |" for name, kind in columns.items()]
    lines += [
        "",
        "Where several reward models score: `member_rewards`, `shadow_rewards`, maps from name/version to a score.",
    ]
    lines += ["", "`metrics.jsonl` is [a page of its own](records.md)."]
    return "\n".join(lines)


def _path(node: ast.stmt) -> str | None:
    """`report.json` of a property that returns `self.path / "report.json"`."""
    match = re.fullmatch(r"self\.path / '([\w.]+)'", ast.unparse(node.body[-1].value)) if _returns(node) else None
    return match[1] if match else None


def _returns(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Return) and node.body[-1].value is not None
    )


def errors_page() -> str:
    """The tree of errors, and each class's own words."""
    tree = ast.parse((ROOT / "alignment" / "errors.py").read_text())
    lines = ["# Errors", "", "```text", ast.get_docstring(tree) or "", "```", "", "| error | |", "|---|---|"]
    lines += [
        f"| `{n.name}` | {' '.join((ast.get_docstring(n) or '').split())} |"
        for n in tree.body
        if isinstance(n, ast.ClassDef)
    ]
    lines += ["", "[Troubleshooting](../troubleshooting.md) takes the messages that come most often one by one."]
    return "\n".join(lines)


def commands_page() -> str:
    """The docstring of each command, which its --help prints, and of the flows."""
    lines = ["# Commands", "", "`python -m MODULE --help` prints the same, with all options.", ""]
    for module in COMMANDS:
        place = ROOT / module.replace(".", "/")
        file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
        text = ast.get_docstring(ast.parse(file.read_text()))
        lines += [f"## python -m {module}", "", "```text", text or "", "```", ""]
    for file in sorted((ROOT / "flows").glob("*_flow.py")):
        flow = next(n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef))
        lines += [f"## python flows/{file.name}", "", "```text", ast.get_docstring(flow) or "", "```", ""]
    return "\n".join(lines)
