"""What the program does under a config, seen from outside: each function runs a real part and returns what it saw.

The parts are real but for three stand-ins: the reward server's client, the launch of worker processes, and
the sampling of the evaluation, of which only the arguments are looked at. All runs share one root.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import re
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import reward_runs
from alignment import colocated, evaluation_stage, worker
from alignment.atomic_files import write_json
from alignment.config import Config, parse_config
from alignment.engine import engine_settings
from alignment.errors import AlignmentError
from alignment.hosted_optimizer import hosted_optimizer
from alignment.judge_stage import prepare_judge
from alignment.lifeline import Stop
from alignment.policy_source import model_folder
from alignment.preparation import load_prompt_sets
from alignment.progress import PhaseLines
from alignment.reward_stage import prepare_reward_model
from alignment.reward_training import build_trainer
from alignment.rollout_engine import load_engine
from alignment.run_folder import RunFolder
from alignment.stages import begin
from alignment.task import COMMAND_STARTED, ScoringModels, reward_client, scoring_clients, served, tracker
from alignment.trainer import train_step
from alignment.types import Checkpoint, Decision, JudgeRef, RewardModelRef, ScoredRollout
from alignment.workspace import local_root
from argo import compiled, s3_stand_in

_numbers = itertools.count(1)


class RewardClientStandIn:
    """Stands in for a client and its server: a response's reward depends on its text and the model's name alone."""

    def __init__(self, url: str, model_name: str, model_version: str, timeout_s: float, **_: Any) -> None:
        self.url, self.model_name, self.model_version, self.timeout_s = url, model_name, model_version, timeout_s
        self._background = ThreadPoolExecutor(1)

    def __enter__(self) -> "RewardClientStandIn":
        return self

    def __exit__(self, *_: object) -> None:
        self._background.shutdown()

    def wait_ready(self, timeout_s: float) -> None:
        """It always is."""

    def _submit(self, pool: ThreadPoolExecutor, function: Any, *arguments: Any) -> Any:
        return pool.submit(function, *arguments)

    def score(self, conversations: Any) -> list[float]:
        return [sum(map(ord, messages[-1]["content"])) * len(self.model_name) % 997 / 100 for messages in conversations]


@dataclass(frozen=True)
class Iteration:
    """What one iteration of RS steps left behind."""

    trainer: Any
    threads: int
    events: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    checkpoints: list[str]
    weights: str

    def steps(self, kind: str) -> list[int]:
        """The RS steps that have a record of this kind."""
        return [m["step"] for m in self.metrics if m["kind"] == kind]


def iteration(config: Config) -> Iteration:
    """The first iteration by a worker in this process; one that has been run is not run again."""
    return _iteration(config.model_dump_json())


@functools.cache
def _iteration(text: str) -> Iteration:
    return run_iteration(parse_config(text))


def run_iteration(config: Config, run: RunFolder | None = None, until: int | None = None) -> Iteration:
    """The first iteration of a new run by a worker in this process, or `run` continued to RS step `until`.

    The worker's process group, of this process alone, stays: DeepSpeed cannot join a second one.
    """
    run, out, sessions = run or new_run(config), io.StringIO(), []
    until = until or config.loop.steps_per_iteration
    # Nobody listens at the discard port, so that the server's statistics are unknown at once.
    options = Namespace(folder=str(run.path), until=until, url="127.0.0.1:9", metrics_url=None)
    options.reward_model = json.dumps(asdict(reference(config)))
    external = config.model_copy(update={"reward": config.reward.model_copy(update={"url": options.url})})
    options.judge = str(Path(config.run.root) / "judge")
    write_scorers(config, run)

    def watched(session: Any, until: int, real: Any = worker.run_iteration) -> None:
        sessions.append(session)
        real(session, until)

    with (
        reward_runs.alone(),
        patch("alignment.scoring.RewardClient", RewardClientStandIn),
        patch.object(worker, "run_iteration", watched),
        contextlib.redirect_stdout(out),
    ):
        worker.work(external, run, options, Stop())
    names = sorted(p.name for p in run.checkpoints.glob("step-*"))
    manifest = json.loads((run.checkpoints / names[-1] / "manifest.json").read_text())
    return Iteration(
        trainer=sessions[0].trainer,
        threads=torch.get_num_threads(),
        events=[json.loads(line) for line in out.getvalue().splitlines()],
        rows=run.read_rollouts(1),
        metrics=run.read_metrics(),
        checkpoints=names,
        weights=manifest["weights_sha256"],
    )


def write_scorers(config: Config, run: RunFolder) -> None:
    """Where other models than reward.name score, version 1 of each as the run's scorers.json pins it."""
    others = {
        key: [
            asdict(RewardModelRef(name.partition("/")[0], "1", "", "", None))
            for name in names
            if name != config.reward.name
        ]
        for key, names in config.reward_ensemble
        if key != "combine"
    }
    if any(others.values()):
        write_json(run.scorers, {"reward_model": asdict(reference(config)), "judge": {}, **others})


def new_run(config: Config) -> RunFolder:
    """A run folder with its prompts."""
    with contextlib.redirect_stdout(io.StringIO()):
        path, _ = begin(config, f"run-{next(_numbers)}")
    return RunFolder(Path(path))


def column(name: str) -> Any:
    """Of the first RS step's rollouts, one column."""
    return lambda config: [row[name] for row in iteration(config).rows]


def longest_response(config: Config) -> int:
    return max(column("num_tokens")(config))


def shortest_response(config: Config) -> int:
    return min(column("num_tokens")(config))


def responses_with(text: str) -> Any:
    """How many responses hold `text`."""
    return lambda config: sum(text in response for response in column("response")(config))


def prompts_read(config: Config) -> int:
    return len(set(column("prompt_id")(config)))


def responses_per_prompt(config: Config) -> float:
    return len(column("response")(config)) / prompts_read(config)


def num_selected(config: Config) -> int:
    return sum(column("selected")(config))


def responses_at(index: int) -> Any:
    """The different responses with this rollout index."""
    return lambda config: {row["response"] for row in iteration(config).rows if row["rollout_index"] == index}


def cut_and_selected(config: Config) -> int:
    return sum(row["selected"] and row["finish_reason"] == "length" for row in iteration(config).rows)


def distinct_responses(config: Config) -> int:
    """Different responses to the first prompt."""
    rows = iteration(config).rows
    return len({row["response"] for row in rows if row["prompt_id"] == rows[0]["prompt_id"]})


def rows_per_batch(config: Config) -> int:
    """Responses that were decoded side by side."""
    done = [e["done"] for e in iteration(config).events if e.get("phase") == "rollouts" and e["step"] == 1]
    return max(after - before for before, after in itertools.pairwise([0, *done]))


def vllm_asked(name: str) -> Any:
    """What vLLM is to be loaded with, of one name; None where it is not."""

    def look(config: Config) -> Any:
        asked: dict[str, Any] = {}
        with patch("models.vllm_engine.load_vllm", lambda source, **options: asked.update(options)):
            load_engine(config, "policy")
        return asked.get(name)

    return look


def optimizer_group(config: Config) -> tuple[float, ...]:
    """Weight decay and the two betas of the optimizer."""
    group = iteration(config).trainer.engine.basic_optimizer.param_groups[0]
    return group["weight_decay"], *group["betas"]


def engine_says(method: str) -> Any:
    return lambda config: getattr(iteration(config).trainer.engine, method)()


def keeps_layer_inputs_only(config: Config) -> bool:
    """Whether the policy is trained with gradient checkpointing."""
    return iteration(config).trainer.engine.module.policy.is_gradient_checkpointing


def offloads(name: str) -> Any:
    """Whether a section's engine would keep AdamW's state on the host: of DeepSpeed's config, as here is no GPU."""

    def look(config: Config) -> bool:
        section = getattr(config, name)
        settings = engine_settings(section, zero_stage=section.zero_stage, world_size=1, dtype=torch.bfloat16)
        return settings["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu"

    return look


def leaves_for_rollouts(config: Config) -> bool:
    """Whether AdamW's state would be on the host for the time of rollouts: of the decision, as here is no GPU."""
    return hosted_optimizer(None, config.training) is not None


def trained_policy_weights(config: Config) -> int:
    """How many weights of the policy are trained."""
    trained = iteration(config).trainer.engine.module.policy
    return sum(p.numel() for p in trained.parameters() if p.requires_grad)


def policy_adapter_scale(config: Config) -> set[float]:
    """The scales of the policy's adapters."""
    modules = iteration(config).trainer.engine.module.policy.modules()
    return {scale for m in modules if isinstance(getattr(m, "scaling", None), dict) for scale in m.scaling.values()}


def shadow_means(config: Config) -> set[str]:
    """The shadows whose means the first RS step's record and the validation's have."""
    records = [m for m in iteration(config).metrics if m["kind"] in ("step", "validation")]
    return {name for record in records for name in record.get("shadow_means", {})}


def weights(config: Config) -> str:
    return iteration(config).weights


def optimizer_steps(config: Config) -> list[int]:
    return [m["optimizer_steps"] for m in iteration(config).metrics if m["kind"] == "step"]


def rates(config: Config) -> list[float]:
    """The learning rate of every RS step; nothing is selected, so nothing is trained."""
    trainer = iteration(config).trainer
    return [round(train_step(trainer, [], step).lr, 6) for step in range(1, config.loop.max_steps + 1)]


def validated_steps(config: Config) -> list[int]:
    return iteration(config).steps("validation")


def saved_steps(config: Config) -> list[str]:
    return iteration(config).checkpoints


def threads(config: Config) -> int:
    return iteration(config).threads


def num_prompts(name: str) -> Any:
    """The size of one of the run's prompt sets."""
    return lambda config: len(getattr(load_prompt_sets(new_run(config).path), name))


def first_words(name: str) -> Any:
    """The words that the prompts of one of the run's sets begin with."""
    return lambda config: {
        prompt.messages[0]["content"].split()[0] for prompt in getattr(load_prompt_sets(new_run(config).path), name)
    }


def run_root(config: Config) -> Path:
    return new_run(config).path.parent


def workspace(config: Config) -> Path:
    """This node's folder in the stead of a root."""
    return local_root(config.run)


def cache_limit(config: Config) -> int:
    """Bytes that the cache of downloaded models is told to keep to."""
    seen: dict[str, int] = {}

    def cached_folder_stand_in(uri: str, sha256: str, limit_bytes: int, **_: Any) -> Any:
        seen["limit"] = limit_bytes
        raise Seen

    with (
        patch("alignment.policy_source.find_run", lambda root, name: None),
        patch("alignment.s3_objects.read_bytes", lambda uri: (b"digest", "etag")),
        patch("alignment.model_cache.cached_folder", cached_folder_stand_in),
        contextlib.suppress(Seen),
    ):
        model_folder("s3://bucket/model", config.run, key="policy.model")
    return seen["limit"]


class Seen(Exception):
    """Ends a part once its arguments have been seen."""


def workers_launched(config: Config, done: int = 0, url: str = "stand-in:1") -> dict[str, Any]:
    """The arguments, also to `run_workers`, that the iteration after RS step `done` starts its workers with."""
    seen: dict[str, Any] = {}

    def run_workers_stand_in(module: str, arguments: Any, **others: Any) -> None:
        seen.update(zip(arguments[::2], arguments[1::2], strict=True))
        seen.update(others)
        raise Seen

    with (
        patch.object(colocated, "run_workers", run_workers_stand_in),
        patch("models.checkpoints.newest_checkpoint", lambda _: Checkpoint("", "", done)),
        contextlib.suppress(Seen),
    ):
        external = config.model_copy(update={"reward": config.reward.model_copy(update={"url": url})})
        run, reward, judge = new_run(config), reference(config), JudgeRef("judge", "judge", 1.0)
        write_json(run.scorers, {"reward_model": asdict(reward), "judge": asdict(judge)})
        colocated.iterate(external, run, reward, judge)
    return seen


def num_workers(config: Config) -> int:
    return workers_launched(config)["num_workers"]


def last_steps(config: Config) -> list[int]:
    """The last RS step of the first and of the second iteration."""
    first = int(workers_launched(config)["--until"])
    return [first, int(workers_launched(config, first)["--until"])]


def grace(config: Config) -> float:
    """Seconds that workers get to end in order."""
    return workers_launched(config)["grace_s"]


def ends_at(config: Config) -> float | None:
    """Unix time at which workers are to stop, for a command that began at 1000."""
    with patch.dict(os.environ, {COMMAND_STARTED: "1000"}):
        at = workers_launched(config).get("--ends-at")
    return None if at is None else float(at)


def patience(config: Config) -> float:
    """Seconds that a run's client waits for a server that is gone."""
    with reward_client(config, "127.0.0.1:9", "reward_model", "1") as client:
        return client.patience_s


def adopted_checkpoints(config: Config) -> list[str]:
    """The checkpoints that a new run begins with."""
    return sorted(p.name for p in new_run(config).checkpoints.glob("step-*"))


def reused_steps(config: Config) -> list[str]:
    """The RS steps whose rollouts a new run begins with."""
    return sorted(p.name for p in new_run(config).reused.glob("*"))


def kept_scores(config: Config) -> set[str]:
    """The folder in which a task keeps the scores of the reward model."""
    with scoring_clients(config, "127.0.0.1:9", ScoringModels((reference(config),), ())) as ensemble:
        for cache in ensemble.caches:
            cache.add([[{"role": "user", "content": "a"}]], [1.0])
    return {str(path.parent) for path in Path(config.run.root).glob("scores/*.jsonl")}


def reference(config: Config) -> RewardModelRef:
    return RewardModelRef(config.reward.name, "1", "", str(config.reward_repository), None)


def server_url(config: Config) -> str:
    """The address that a task scores at. A local server is started, finds no export, and ends."""
    with served(config, new_run(config), reference(config)) as server:
        return server.url


def error_without_server(config: Config) -> str:
    """What is said about an external server that is not there."""
    try:
        prepare_reward_model(config, print)
    except AlignmentError as error:
        return str(error)
    raise AssertionError(f"a server answers at {config.reward.url}")


def exported(config: Config) -> dict[str, Any]:
    """The reward model's export; one that has been made is not made again."""
    return _exported(config.model_dump_json())


@functools.cache
def _exported(text: str) -> dict[str, Any]:
    return reward_runs.exported(parse_config(text))


def instances_written(config: Config) -> int:
    """The instances that config.pbtxt of a name that was not exported before asks for."""
    name = f"fresh-{next(_numbers)}"
    exported(config.model_copy(update={"reward": config.reward.model_copy(update={"name": name})}))
    text = (Path(config.reward_repository) / name / "config.pbtxt").read_text()
    return int(re.search(r"instance_group \[ { kind: KIND_AUTO count: (\d+)", text)[1])


def runtime_written(config: Config) -> str:
    """What an export's settings name as its runtime; no graph is written, so that no package is needed."""
    with patch("models.reward_export.check_onnx"), patch("models.reward_export.write_onnx"):
        return exported(config)["runtime"]


def reward_steps(config: Config) -> int:
    """Optimizer steps of the reward model's training."""
    return len(exported(config)["training"]["losses"])


def reward_validations(config: Config) -> list[int]:
    return [record["step"] for record in exported(config)["training"]["validations"]]


def reward_validation_sets(config: Config) -> set[str]:
    return {record["set"] for record in exported(config)["training"]["validations"]}


def reward_sets(config: Config) -> dict[str, int]:
    """The sets that a reward model was measured on, with their sizes."""
    return {name: q.get("pairs", q.get("answers")) for name, q in exported(config)["quality"].items()}


def reward_examples(role: str) -> Any:
    """How many examples a reward model was, say, trained on."""
    return lambda config: sum(s["examples"] for s in exported(config)["data"]["sets"] if s["role"] == role)


def reward_engine(method: str) -> Any:
    """What DeepSpeed's engine says of itself after one optimizer step of the reward model."""
    return _reward_engine(lambda engine: getattr(engine, method)())


def reward_model_keeps_layer_inputs_only(config: Config) -> bool:
    """Whether the reward model is trained with gradient checkpointing."""
    return _reward_engine(lambda engine: engine.module.model.is_gradient_checkpointing)(config)


def _reward_engine(method: Any) -> Any:

    def look(config: Config) -> Any:
        seen = []

        def build_stand_in(*arguments: Any, **others: Any) -> Any:
            seen.append(build_trainer(*arguments, **others))
            return seen[0]

        with patch("alignment.reward_training.build_trainer", build_stand_in):
            folder = Path(config.run.root) / f"reward-training-{next(_numbers)}"
            reward_runs.work(config, folder, reward_runs.StopAfter(0))
        return method(seen[0].engine)

    return look


def trained_weights(config: Config) -> int:
    """How many weights of the reward model are trained."""
    from alignment.reward_worker import trainable_model

    model, _ = trainable_model(config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapter_scale(config: Config) -> list[float]:
    from alignment.reward_worker import trainable_model

    model, _ = trainable_model(config)
    scales = [m.scaling for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]  # BERT's is a number
    return sorted({scale for by_adapter in scales for scale in by_adapter.values()})


def export_says(name: str) -> Any:
    return lambda config: exported(config)[name]


def judge_says(name: str) -> Any:
    """A field of the judge's reference; `weights` for what it has learned. A judge is trained once."""
    return lambda config: _judge(config.model_dump_json())[name]


@functools.cache
def _judge(text: str) -> dict[str, Any]:
    return train_judge(parse_config(text))


def train_judge(config: Config) -> dict[str, Any]:
    """The judge, trained anew."""
    folder = Path(config.run.root) / f"judge-{next(_numbers)}"
    ref = prepare_judge(config, folder, lambda _: None)
    return {"accuracy": ref.accuracy, "weights": [p.read_bytes() for p in folder.glob("*.safetensors")]}


def samples_per_prompt(config: Config) -> list[int]:
    """Responses per prompt that the evaluation asks of the base."""
    seen: list[int] = []

    def sample_stand_in(*_: Any, samples_per_prompt: int, **__: Any) -> None:
        seen.append(samples_per_prompt)
        raise Seen

    run, judge = new_run(config), JudgeRef("judge", str(Path(config.run.root) / "judge"), 1.0)
    base = str(Path(config.run.root) / "cache" / "tiny-policy-1")
    with (
        patch("alignment.scoring.RewardClient", RewardClientStandIn),
        patch("alignment.evaluation.sample_and_score", sample_stand_in),
        contextlib.suppress(Seen),
    ):
        external = config.model_copy(update={"reward": config.reward.model_copy(update={"url": "stand-in:1"})})
        evaluation_stage._measure(external, run, reference(config), judge, Checkpoint(base, "", 1), base)
    return seen


def evaluated(config: Config) -> tuple[str, str]:
    """The checkpoint and the base that the evaluation finds."""
    model, base = evaluation_stage.find_policies(config, lambda _: None)
    return model.checkpoint.uri, base.checkpoint.uri


def harness_asked(config: Config) -> list[tuple[Any, ...]]:
    """Tasks and limits that the evaluation gives to lm-evaluation-harness, of which a stand-in takes the place."""
    asked = []

    def run_tasks_stand_in(_: Any, tasks: Any, *, limit: Any, **__: Any) -> dict[str, Any]:
        asked.append((tasks, limit))
        return {task: {"acc": 0.5} for task in tasks}

    with patch.object(evaluation_stage, "run_tasks", run_tasks_stand_in):
        evaluation_stage._tasks(config, {"base": None, "aligned": None}, PhaseLines(1, io.StringIO()))
    return asked


def wandb_run(config: Config) -> list[str]:
    """The projects of the W&B runs that a task leaves in the run folder."""
    import wandb

    from test_tracking import read_runs

    run = new_run(config)
    with tracker(config, run) as wandb_run:
        wandb_run.log_validation(
            {"kind": "validation", "step": 0, "reward_mean": 0.0, "judge_mean": 0.0, "seconds": 0.0}
        )
    wandb.teardown()  # its service may write the last of a finished run's records only when it ends
    return [found["project"] for found in read_runs(run.path)]


def sampled_texts(config: Config) -> int:
    """Responses in the table that follows a validation."""
    import wandb

    run = new_run(config)
    scored = [
        ScoredRollout(prompt_id=name, rollout_index=0, response="", finish_reason="stop", reward=0.0)
        for name in "abcdef"
    ]
    run.write_rollouts(1, scored, [Decision(r.prompt_id, 0, True, "") for r in scored])
    with tracker(config, run) as told:
        told.log_validation({"kind": "validation", "step": 1, "reward_mean": 0.0, "judge_mean": 0.0, "seconds": 0.0})
    wandb.teardown()
    tables = run.path.glob("wandb/offline-run-*/files/media/table/**/*.json")
    return sum(len(json.loads(table.read_text())["data"]) for table in tables)


def event_files(config: Config) -> int:
    """Files for TensorBoard that a task leaves."""
    run = new_run(config)
    with tracker(config, run):
        return len(list(run.path.glob("tensorboard/events.*")))


def cluster_request(config: Config) -> tuple[str | None, str, str]:
    """GPUs, cores and memory that the `iterate` step asks of Kubernetes: from the command line to the workflow."""
    return _cluster_request(config.resources.gpu, config.resources.cpu, config.resources.memory)


@functools.cache
def _cluster_request(gpu: int, cpu: int, memory: int) -> tuple[str | None, str, str]:
    asked = {"gpu": gpu, "cpu": cpu, "memory": memory}
    sets = [word for key, value in asked.items() for word in ("--set", f"resources.{key}={value}")]
    with s3_stand_in() as environment:
        workflow = compiled("rs_flow", *sets, environment=environment)
    step = next(t for t in workflow["spec"]["templates"] if t["name"] == "recursive-iterate")
    resources = step["container"]["resources"]
    return resources["limits"].get("nvidia.com/gpu"), resources["requests"]["cpu"], resources["requests"]["memory"]


def pod_has(attribute: str) -> Any:
    """What a step with a GPU tells @kubernetes of its pod."""
    return lambda config: config.kubernetes.pod(1).get(attribute)
