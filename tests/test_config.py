"""The config: presets, messages, overrides, and that every field changes what the program does."""

import ast
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import config_effects as see
import kubernetes_effects as pods
import phase_effects as phases
import promotion_effects as promotion
import sft_effects as sft
import slurm_effects as slurm
from alignment.config import Config, apply_overrides, load_config, parse_config, validate_config
from alignment.config_sections import Section
from alignment.errors import ConfigError
from flow_runs import ROOT, SMOKE, Place

VLLM = ("rollouts.engine=vllm", "resources.gpu=2")
DISAGGREGATED = ("loop.executor=disaggregated", "loop.steps_per_iteration=1")
SLURM = ("slurm.enabled=true",)
PYXIS = ("slurm.container=pyxis", "slurm.image=image.sqsh")
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))


def message(*overrides: str) -> str:
    """What is said about the smoke preset with these overrides."""
    with pytest.raises(ConfigError) as caught:
        load_config(SMOKE, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_loads_and_survives_being_written_down(path: Path) -> None:
    config = load_config(path)
    assert parse_config(config.model_dump_json()) == config


def test_the_flows_take_the_sentiment_preset_by_default() -> None:
    from sources import DEFAULT_PRESET

    assert Path(DEFAULT_PRESET) == ROOT / "configs" / "imdb_sentiment.yaml"


def test_the_hh_preset_has_the_tutorials_numbers() -> None:
    config = load_config(ROOT / "configs" / "hh_rlhf.yaml")
    assert (config.rollouts.num_rollout_samples, config.rollouts.num_rollouts_per_prompt) == (32, 8)
    assert (config.selection.strategy, config.selection.top_n_rollouts) == ("top_per_prompt", 1)
    assert (config.training.global_batch_size, config.loop.max_steps, config.loop.val_check_interval) == (32, 313, 4)
    assert (config.training.lr, config.training.lr_schedule, config.training.weight_decay) == (1e-6, "constant", 0.01)
    assert (config.training.warmup_steps, config.resources.gpu, config.num_workers) == (0, 8, 8)


def test_an_unknown_key_is_refused_and_the_known_ones_are_listed() -> None:
    assert message("training.learning_rate=1e-4").startswith(
        "training.learning_rate ('1e-4'): unknown key; known here: lr, lr_schedule, warmup_steps, min_lr, constant"
    )
    assert "known here: seed, run, resume, policy, prompts, rollouts, selection" in message("trainning.lr=1")
    assert message("phases.update.gpus=1").startswith(
        "phases.update.gpus (1): unknown key; known here: gpu, cpu, memory, retries, timeout_s"
    )


def test_a_config_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config /no/preset\.yaml: No such file.*presets are in"):
        load_config("/no/preset.yaml")
    preset = tmp_path / "my.yaml"
    preset.write_text("- a")
    with pytest.raises(ConfigError, match=r"my\.yaml: expected a mapping of sections, got list"):
        load_config(preset)
    preset.write_text("training: [")
    with pytest.raises(ConfigError, match=r"my\.yaml: not valid YAML: .*line 1"):
        load_config(preset)
    assert message("training.lr=[").startswith("--set training.lr=[: not valid YAML")


def test_each_bad_value_is_one_line_with_key_value_and_remedy() -> None:
    text = message("training.lr=-1", "rollouts.top_p=1.5", "selection.strategy=best", "loop.max_steps=many")
    assert text.splitlines() == [
        "rollouts.top_p (1.5): input should be less than or equal to 1",
        "selection.strategy ('best'): input should be 'top_per_prompt', 'top_k_overall', 'random_per_prompt' "
        "or 'random_k_overall'",
        "training.lr (-1): input should be greater than 0",
        "loop.max_steps ('many'): input should be a valid integer, unable to parse string as an integer",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["selection.top_n_rollouts=5", "rollouts.num_rollouts_per_prompt=4"],
            "selection.top_n_rollouts (5) must be <= rollouts.num_rollouts_per_prompt (4): "
            "lower the first or raise the second",
        ),
        (
            ["selection.strategy=top_k_overall"],
            "selection.strategy (top_k_overall) needs selection.top_k: set it to a number >= 1",
        ),
        (
            ["selection.top_k=3"],
            "selection.top_k (3) is read by the *_overall strategies only: "
            "unset it, or use selection.top_n_rollouts with top_per_prompt",
        ),
        (
            ["rollouts.batch_tokens=75"],
            "rollouts.batch_tokens (75) must be >= prompts.max_prompt_tokens + rollouts.max_new_tokens (76): "
            "a prompt and a response of it must fit",
        ),
        (
            ["rollouts.min_new_tokens=13"],
            "rollouts.min_new_tokens (13) must be <= rollouts.max_new_tokens (12): lower the first or raise the second",
        ),
        (
            ["reuse.rollouts=a", "resume.from=b"],
            "reuse.rollouts (a) begins at the base, and resume.from (b) goes on from a checkpoint: set one of them",
        ),
        (
            ["reuse.scores=true", "reward.url=a:1"],
            "reuse.scores keeps scores by the reward model's digest, which an external server (reward.url, a:1) does "
            "not tell: set it to false, or unset reward.url",
        ),
        (
            ["rollouts.vllm_tensor_parallel=2", "resources.gpu=2"],
            "rollouts.vllm_tensor_parallel (2) is read by rollouts.engine=vllm only: set that, or leave it 1",
        ),
        (
            ["rollouts.vllm_tensor_parallel=2", "rollouts.engine=vllm", "resources.gpu=3"],
            "rollouts.vllm_tensor_parallel (2) must divide resources.gpu (3), a worker each: change one of them, or "
            "leave the first 1",
        ),
        (
            ["rollouts.temperature=1e-38"],
            "rollouts.temperature (1e-38) must be 0 or >= 0.01: logits over less are no longer finite; "
            "0 takes the likeliest token",
        ),
        (
            ["rollouts.engine=vllm", "rollouts.temperature=2.5"],
            "rollouts.temperature (2.5) must be 0 or from 0.01 to 2 for rollouts.engine=vllm, which knows no others: "
            "change it, or set rollouts.engine=in_process",
        ),
        (
            ["rollouts.engine=vllm", "rollouts.stop=[x]", "rollouts.min_new_tokens=3"],
            "rollouts.stop and rollouts.min_new_tokens (3) do not go together with rollouts.engine=vllm, which looks "
            "for no stop string before the least length: unset one of them, or set rollouts.engine=in_process",
        ),
        (
            ["slurm.time=4:00:00"],
            "slurm.time (14400): write it as quoted text, DD:HH:MM:SS, e.g. '00:03:45:00' for 3 h 45 min",
        ),
        (["slurm.time=04:00"], "slurm.time ('04:00'): must be DD:HH:MM:SS, e.g. 00:03:45:00 for 3 h 45 min"),
        (
            [*SLURM, "slurm.time='00:00:02:30'"],
            "slurm.time (00:00:02:30) must be more than 150 s, loop.stop_grace_s (60) + 90: that long before its end a "
            "job may be told to save, and one told at once does no work. Raise the first, with room for the work, or "
            "lower the second",
        ),
        (
            ["slurm.container=pyxis"],
            "slurm.container (pyxis) needs slurm.image: name one, or leave both out",
        ),
        (
            ["slurm.mounts=[/data]"],
            "slurm.mounts (/data) is read with slurm.container only: set that to pyxis or apptainer, or leave "
            "slurm.mounts out",
        ),
        (["slurm.nodes=2"], "slurm.nodes (2) is read with slurm.enabled only: set that to true, or leave it 1"),
        (
            [*SLURM, "slurm.nodes=2"],
            "slurm.nodes (2) needs reward.url, since a reward server that a step starts answers its own node alone: "
            "start one (infra/slurm/rs_hetjob.sbatch does), or set slurm.nodes=1",
        ),
        (
            [*SLURM, "slurm.nodes=2", "reward.url=a:1", *DISAGGREGATED],
            "slurm.nodes (2) are those of a colocated iteration: set it to 1, or loop.executor=colocated",
        ),
        (
            [*SLURM, "slurm.nodes=2", "reward.url=a:1", "run.root=s3://bucket/runs"],
            "slurm.nodes (2) with run.root (s3://bucket/runs): the nodes write one checkpoint together, but under "
            "s3:// each has a copy of its own. Set slurm.nodes=1, or run.root to a folder that all nodes see",
        ),
        (
            [*SLURM, "slurm.nodes=2", "reward.url=a:1", *PYXIS],
            "slurm.nodes (2) with slurm.container (pyxis): the step starts the other nodes with srun, which a "
            "container does not hold. Set slurm.nodes=1, or leave slurm.container out",
        ),
        (
            [*SLURM, "phases.run_with=[kubernetes]"],
            "phases.run_with (kubernetes) and slurm.enabled both say where phases run: leave one of them out",
        ),
        (
            ["kubernetes.image=x:1", "run.root=s3://bucket/runs", "phases.run_with=[kubernetes]"],
            "phases.run_with (kubernetes) and kubernetes.image (x:1) both say where phases run: leave one of them out",
        ),
        (
            [*SLURM, "kubernetes.image=x:1", "run.root=s3://bucket/runs"],
            "kubernetes.image (x:1) and slurm.enabled both say where steps run: leave one of them out",
        ),
        (
            [*SLURM, "phases.update_nodes=2"],
            "phases.update_nodes (2) with slurm.enabled: Metaflow would start all nodes of the update in one job of "
            "one node. Set phases.update_nodes=1, or train on slurm.nodes with loop.executor=colocated",
        ),
        (
            ["kubernetes.namespace=team"],
            "kubernetes.namespace (team) is of pods, and kubernetes.image is null, so that no task is one: set "
            "kubernetes.image, or leave it out",
        ),
        *(
            (
                [f"kubernetes.image={image}"],
                f"kubernetes.image ({image}) must end with an exact tag or digest, so that all tasks have the same: "
                "name:0.1.0, say",
            )
            for image in (
                "alignment-trainer",
                "registry.example.com:5000/alignment-trainer",
                "alignment-trainer:latest",
            )
        ),
        (
            ["kubernetes.image=x:1", "kubernetes.volume_claims={runs: /mnt}"],
            "run.root (runs) must be seen by all tasks, which kubernetes.image makes pods: set it to a prefix s3://…, "
            "or to a folder in one of kubernetes.volume_claims",
        ),
        (
            ["kubernetes.image=x:1", "run.root=s3://bucket/runs", "reward.repository=/models"],
            "reward.repository (/models) must be seen by all tasks, which kubernetes.image makes pods: set it to a "
            "prefix s3://…, or to a folder in one of kubernetes.volume_claims",
        ),
        (
            ["kubernetes.image=x:1", "run.root=s3://bucket/runs", *DISAGGREGATED],
            "kubernetes.service_account (null) with loop.executor=disaggregated: the pod of an RS step starts the pods "
            "of its phases, as an account that may. Set it (infra/kubernetes/components/runs makes alignment-runs), or "
            "loop.executor=colocated",
        ),
        (["training.min_lr=0.1"], "training.min_lr (0.1) must be <= training.lr (0.001)"),
        (
            ["training.constant_steps=1"],
            "training.constant_steps (1) end a linear or cosine schedule, and training.lr_schedule is constant: set "
            "training.constant_steps=0",
        ),
        (
            ["training.lr_schedule=cosine", "training.warmup_steps=2", "training.constant_steps=4", "loop.max_steps=6"],
            "training.warmup_steps (2) + training.constant_steps (4) must be < the 6 steps of the training: lower one "
            "of them, or train for longer",
        ),
        (
            ["sft.constant_steps=3", "sft.max_steps=3"],
            "sft.warmup_steps (0) + sft.constant_steps (3) must be < the 3 steps of the training: lower one of them, "
            "or train for longer",
        ),
        (
            ["training.offload_optimizer=true", "training.zero_stage=1"],
            "training.offload_optimizer needs GPUs, whose memory it spares, and DeepSpeed's ZeRO: set "
            "resources.gpu >= 1 (now 0) and training.zero_stage >= 1 (now 1)",
        ),
        (
            ["training.offload_during_rollouts=true"],
            "training.offload_during_rollouts spares a GPU's memory, and on a CPU the state would move from one place "
            "of the host to another: set resources.gpu >= 1 (now 0), or leave it false",
        ),
        (
            [
                "training.offload_during_rollouts=true",
                "training.offload_optimizer=true",
                "training.zero_stage=1",
                "resources.gpu=1",
            ],
            "training.offload_during_rollouts has nothing to move where training.offload_optimizer keeps AdamW's "
            "state on the host all the time: unset one of them",
        ),
        (
            ["reward_ensemble.members={other: 1, third/2: 1}"],
            "reward_ensemble.members (other, third/2) must hold reward.name (reward_model), without a version, and at "
            "least one more: add them, or leave it empty",
        ),
        (
            ["reward_ensemble.combine=vote"],
            "reward_ensemble.combine (vote) needs models that vote: set reward_ensemble.members",
        ),
        (
            ["reward_ensemble.members={reward_model: 1, other: 0}"],
            "the weight of other in reward_ensemble.members (0) must be other than 0: change it, or name the model in "
            "reward_ensemble.shadows",
        ),
        (
            ["reward_ensemble.members={reward_model: 1, other: -1}", "reward_ensemble.combine=vote"],
            "the weight of other in reward_ensemble.members (-1) must be above 0 in a vote: change it, or name the "
            "model in reward_ensemble.shadows",
        ),
        (
            ["reward_ensemble.shadows=[reward_model]"],
            "reward_ensemble.shadows names reward_model, which scores already: take it out, or name another version",
        ),
        (
            ["reward.name=policy"],
            "reward.name (policy) is what the registry calls the policies of runs: give the reward model another name",
        ),
        (
            ["loop.executor=disaggregated"],
            "loop.executor (disaggregated) does one RS step an iteration: set loop.steps_per_iteration=1 (now 2), or "
            "loop.executor=colocated",
        ),
        (
            ["loop.executor=disaggregated", "loop.steps_per_iteration=1", *VLLM, "rollouts.vllm_tensor_parallel=2"],
            "rollouts.vllm_tensor_parallel (2) does not go with loop.executor=disaggregated, whose shards sample in "
            "one process each: set it to 1, or loop.executor=colocated",
        ),
        (
            ["phases.shards=5"],
            "phases.shards (5) must be <= rollouts.num_rollout_samples (4), the prompts that are spread over them: "
            "lower the first or raise the second",
        ),
        (
            ["phases.update_nodes=2", "run.root=s3://bucket/runs"],
            "phases.update_nodes (2) with run.root (s3://bucket/runs): the nodes of an update write one checkpoint "
            "together, but under s3:// each has a copy of its own. Set phases.update_nodes=1, or run.root to a folder "
            "that all nodes see",
        ),
        (
            ["phases.update.gpu=8", "phases.validation.gpu=1"],
            "policy.dtype (auto) is bfloat16 on GPUs and float32 without, and the phases of an RS step have both "
            "(phases.rollouts.gpu=0, phases.update.gpu=8, phases.validation.gpu=1; null means resources.gpu): set "
            "policy.dtype to one of the two, or give all three GPUs or none",
        ),
        (
            [*DISAGGREGATED, "resources.gpu=1", "training.offload_during_rollouts=true"],
            "training.offload_during_rollouts has nothing to move with loop.executor=disaggregated, whose rollouts and "
            "updates are processes of their own: leave it false, or set loop.executor=colocated",
        ),
        (
            [
                *DISAGGREGATED,
                *("resources.gpu=1", "phases.update.gpu=0", "policy.dtype=float32"),
                *("training.offload_optimizer=true", "training.zero_stage=1"),
            ],
            "training.offload_optimizer needs GPUs, whose memory it spares, and DeepSpeed's ZeRO: set "
            "phases.update.gpu >= 1 (now 0) and training.zero_stage >= 1 (now 1)",
        ),
        (
            ["phases.shards=2", "phases.max_lost_shards=2"],
            "phases.max_lost_shards (2) must be < phases.shards (2): a step needs rollouts of one at least; lower the "
            "first or raise the second",
        ),
        (
            ["promotion.max_kl_per_token=0.5"],
            "promotion.max_kl_per_token (0.5) reads the KL that the update measures where training.kl_penalty (0) is "
            "above 0: set the latter, or leave the former null",
        ),
        (
            ["promotion.alias=latest"],
            "promotion.alias (latest) means the newest version, promoted or not: name another, `promoted` say",
        ),
        (
            ["reward.url=localhost"],
            "reward.url (localhost) must be host:port of Triton's gRPC endpoint, or env:NAME of an environment "
            "variable that holds it",
        ),
    ],
)
def test_two_keys_that_do_not_go_together(overrides: list[str], expected: str) -> None:
    assert message(*overrides) == expected


def test_the_edges_of_those_checks_are_accepted() -> None:
    load_config(
        SMOKE,
        [
            "selection.top_n_rollouts=4",
            "rollouts.batch_tokens=76",
            "rollouts.min_new_tokens=12",
            "training.min_lr=1e-3",
        ],
    )
    load_config(SMOKE, ["selection.strategy=random_k_overall", "selection.top_k=1", "selection.top_n_rollouts=9"])


def test_a_phase_has_the_resources_of_all_steps_but_for_its_own() -> None:
    config = load_config(SMOKE, ["resources.gpu=8", "phases.update.cpu=9", "phases.validation.memory=7000"])
    asked = [config.in_phase(name).resources for name in ("rollouts", "scoring", "update", "validation")]
    assert [(r.gpu, r.cpu, r.memory) for r in asked] == [(1, 1, 4000), (0, 1, 4000), (8, 9, 4000), (1, 1, 7000)]
    assert config.in_phase("update").num_workers == 8
    own = load_config(
        SMOKE, ["phases.update.gpu=2", "phases.scoring.cpu=2", "phases.rollouts.gpu=0", "policy.dtype=float32"]
    )
    assert [own.in_phase(name).resources.gpu for name in ("rollouts", "scoring", "update")] == [0, 0, 2]


def test_overrides_are_read_as_yaml_and_leave_the_preset_alone() -> None:
    preset = {"training": {"lr": 1.0}, "seed": 3}
    words = ["training.lr=1e-6", "training.beta1=.5", "seed=4", "reward_training.train=null", "run.root=/data/a=b"]
    values = apply_overrides(preset, [*words, "run.root="])
    assert preset == {"training": {"lr": 1.0}, "seed": 3}
    assert values["seed"] == 4
    assert values["reward_training"]["train"] is None
    assert values["run"]["root"] is None  # of two, the last holds
    config = validate_config(apply_overrides({}, words))
    assert (config.training.lr, config.training.beta1) == (1e-6, 0.5)
    assert config.run.root == "/data/a=b"
    quoted = apply_overrides({}, ["""reward.template='{{ messages[0].content }} = {% if x %}: "#"{% endif %}'"""])
    assert quoted["reward"]["template"] == '{{ messages[0].content }} = {% if x %}: "#"{% endif %}'
    for wrong in ("training.lr", "=1"):
        with pytest.raises(ConfigError, match=r"expected section\.field=value, e\.g\. --set training\.lr=1e-5"):
            apply_overrides({}, [wrong])
    with pytest.raises(ConfigError, match=r"--set seed\.x=1: seed is not a section"):
        apply_overrides(preset, ["seed.x=1"])
    deep = apply_overrides({"phases": {"rollouts": {"cpu": 2}}}, ["phases.rollouts.gpu=1", "phases.scoring.cpu=4"])
    assert deep == {"phases": {"rollouts": {"cpu": 2, "gpu": 1}, "scoring": {"cpu": 4}}}
    merged = apply_overrides(preset, ["training={beta1: 0.5}"])
    assert merged["training"] == {"lr": 1.0, "beta1": 0.5}  # a section changes what it names


@pytest.mark.parametrize("override", ["training.lr=yes", "resources.gpu=on", "loop.max_steps=true", "policy.model=off"])
def test_a_truth_value_passes_for_no_number_and_no_text(override: str) -> None:
    key = override.partition("=")[0]
    assert message(override).startswith(f"{key} (") and message(override).endswith("write a number, or text in quotes")


def test_a_run_may_be_named_by_an_id_that_is_a_number() -> None:
    config = load_config(SMOKE, ["resume.from=1795700511161709", "evaluation.model=7", "evaluation.base=8"])
    named = (config.resume.from_, config.evaluation.model, config.evaluation.base)
    assert named == ("1795700511161709", "7", "8")


def test_a_section_that_stands_there_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="training stands there twice"):
        parse_config("training: {lr: 1e-5}\nloop: {}\ntraining: {zero_stage: 1}")


def test_every_field_is_explained() -> None:
    texts = [
        (ROOT / "alignment" / f"{name}.py").read_text()
        for name in (
            "config",
            "config_kubernetes",
            "config_phases",
            "config_promotion",
            "config_sections",
            "config_slurm",
            "config_training",
        )
    ]
    classes = [node for text in texts for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    explained = set()
    for section in classes:
        for field, after in zip(section.body, [*section.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or ast.unparse(field.annotation).endswith("Section"):
                continue
            text = getattr(getattr(after, "value", None), "value", None)
            assert isinstance(text, str) and len(text.split()) >= 2, f"{section.name}.{ast.unparse(field.target)}"
            explained.add((section.name, ast.unparse(field.target)))
    sections = [info.annotation for name, info in Config.model_fields.items() if name != "seed"]
    for cls in sections:  # a field may be explained in the section that another one is made from
        for name, info in cls.model_fields.items():  # type: ignore[union-attr]
            if is_section(info.annotation):
                sections.append(info.annotation)
                continue
            assert any((base.__name__, name) in explained for base in cls.__mro__), f"{cls}.{name}"  # type: ignore[union-attr]


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def fields(section: type[Section] = Config, within: str = "") -> set[str]:
    """Every field of the config as section.field."""
    found: set[str] = set()
    for own, info in section.model_fields.items():
        name = within + (info.alias or own)
        found |= fields(info.annotation, f"{name}.") if is_section(info.annotation) else {name}  # type: ignore[arg-type]
    return found


UNSTATED = object()


class Effect(NamedTuple):
    """`value` in the smoke preset (with `also` on both sides), changes what `look` sees; to `becomes`, if stated."""

    value: Any
    look: Any
    becomes: Any = UNSTATED
    also: tuple[str, ...] = ()


THREE_STEPS = "loop.steps_per_iteration=3"
PODS = ("run.root=s3://bucket/runs", "kubernetes.image=registry/x:1")
MEMORY = ("resources.memory=8000",)  # Metaflow raises what is below its own default for Kubernetes


def on_gpus(section):
    """What a section's settings for GPUs need besides."""
    return ("resources.gpu=1", f"{section}.zero_stage=2")


RATED = ("reward_training.train={root}/margins.jsonl",)
REGRESSION = (
    "reward_training.train={root}/ratings.jsonl", "reward_training.loss=regression", "reward_training.attributes=[good]"
)  # fmt: skip
VALIDATED = ("reward_training.validation_share=0.2",)
SLOW = (*VALIDATED, "reward_training.val_check_interval=1", "reward_training.epochs=2", "reward_training.lr=1e-30")
CHAT = ("policy.prompt_format=chat",)
CHAT_DATA = "sft.train={root}/chat.jsonl"
ENSEMBLE = "reward_ensemble.members={reward_model: 1, other: 0.5}"
NO_VALIDATION = ("sft.validation=null",)
IN_S3 = ("run.root=s3://bucket/runs",)
RUN = ("evaluation.model=tiny",)
TASKS = ("evaluation.lm_eval_tasks=[colours]",)
ONE_DTYPE = ("policy.dtype=float32",)  # a phase on a GPU beside others without would have another
# {root} and {port} stand for the folder of the runs and a free port.
EFFECTS = {
    "seed": Effect(1, see.column("prompt_id")),
    "run.root": Effect("{root}/other", see.run_root, Path("{root}/other")),
    "run.workspace": Effect("{root}/work", see.workspace, Path("{root}/work/bucket/runs"), IN_S3),
    "run.cache_limit_gb": Effect(7, see.cache_limit, 7_000_000_000),
    "resume.from": Effect("{root}/earlier", see.adopted_checkpoints, ["step-000002"]),
    "reuse.rollouts": Effect("{root}/earlier", see.reused_steps, ["step-000001.parquet"], ("loop.max_steps=1",)),
    "reuse.scores": Effect(True, see.kept_scores),
    "policy.model": Effect("{root}/policy", see.column("response")),
    "policy.prompt_format": Effect("chat", see.column("prompt")),
    "policy.dtype": Effect("bfloat16", see.engine_says("bfloat16_enabled"), True),
    "prompts.train": Effect("{root}/prompts.jsonl", see.first_words("train"), {"question"}),
    "prompts.held_out": Effect("{root}/prompts.jsonl", see.first_words("evaluation"), {"question"}),
    "prompts.max_prompt_tokens": Effect(16, see.num_prompts("train")),
    "rollouts.num_rollout_samples": Effect(2, see.prompts_read, 2),
    "rollouts.num_rollouts_per_prompt": Effect(3, see.responses_per_prompt, 3),
    "rollouts.max_new_tokens": Effect(5, see.longest_response, 5),
    "rollouts.min_new_tokens": Effect(99, see.shortest_response, 99, ("rollouts.max_new_tokens=99",)),
    "rollouts.temperature": Effect(0, see.distinct_responses, 1),
    "rollouts.top_k": Effect(1, see.distinct_responses, 1),
    "rollouts.top_p": Effect(1e-6, see.distinct_responses, 1),
    "rollouts.min_p": Effect(1, see.distinct_responses, 1),
    "rollouts.repetition_penalty": Effect(2, see.column("response")),
    "rollouts.stop": Effect(["e"], see.responses_with("e"), 0),
    "rollouts.references": Effect(
        "join", see.responses_at(4), {"a reference"}, ("prompts.train={root}/answered.jsonl",)
    ),
    "rollouts.batch_tokens": Effect(76, see.rows_per_batch, 4),
    "rollouts.engine": Effect("vllm", see.vllm_asked("batch_tokens"), 16384),
    "rollouts.vllm_tensor_parallel": Effect(2, see.vllm_asked("tensor_parallel"), 2, VLLM),
    "selection.strategy": Effect("random_per_prompt", see.column("reason")),
    "selection.top_n_rollouts": Effect(2, see.num_selected, 8),
    "selection.top_k": Effect(5, see.num_selected, 5, ("selection.strategy=top_k_overall", "selection.top_k=3")),
    "selection.min_reward": Effect(1e6, see.num_selected, 0),
    "selection.truncated": Effect("refuse", see.cut_and_selected, 0),
    "reward.model": Effect("{root}/reward", see.export_says("digest")),
    "reward.template": Effect("{{ messages }}", see.export_says("template"), "{{ messages }}"),
    "reward.max_tokens": Effect(48, see.export_says("max_tokens"), 48),
    "reward.over_long": Effect("refuse", see.export_says("over_long"), "refuse"),
    "reward.dtype": Effect("weights", see.export_says("dtype"), "weights"),
    "reward.runtime": Effect("onnxruntime", see.runtime_written, "onnxruntime"),
    "reward.device_map": Effect("auto", see.export_says("device_map"), "auto"),
    "reward.instances": Effect(2, see.instances_written, 2),
    "reward.output": Effect("standardized", see.export_says("output"), "standardized"),
    "reward.name": Effect("other", see.export_says("name"), "other"),
    "reward.repository": Effect("{root}/elsewhere", see.export_says("repository"), "{root}/elsewhere"),
    "reward.url": Effect("127.0.0.1:9", see.server_url, "127.0.0.1:9"),
    "reward.version": Effect("2", see.export_says("version"), "2"),
    "reward.grpc_port": Effect("{port}", see.server_url, "127.0.0.1:{port}"),
    "reward.timeout_s": Effect(0.4, see.error_without_server, also=("reward.url=127.0.0.1:9", "reward.timeout_s=0.2")),
    "reward.patience_s": Effect(7, see.patience, 7),
    "reward.token_budget": Effect(512, see.export_says("token_budget"), 512),
    "reward_ensemble.members": Effect({"reward_model": 1, "other": 0.5}, see.column("reward")),
    "reward_ensemble.combine": Effect("vote", see.column("reward"), also=(ENSEMBLE,)),
    "reward_ensemble.shadows": Effect(["other"], see.shadow_means, {"other/1"}),
    "reward_training.train": Effect("toy:judge_pairs", see.export_says("digest")),
    "reward_training.num_train": Effect(32, see.reward_examples("trained on"), 32),
    "reward_training.validation_share": Effect(0.2, see.reward_examples("validated on")),
    "reward_training.validation": Effect(["toy:judge_pairs"], see.reward_validation_sets, {"toy:judge_pairs"}),
    "reward_training.test_share": Effect(0.2, see.reward_sets),
    "reward_training.held_out": Effect("{root}/swapped.jsonl", see.export_says("accuracy"), 0.0),
    "reward_training.num_held_out": Effect(16, see.reward_sets, {"toy:held_out_pairs": 16}),
    "reward_training.also_measure": Effect(
        ["toy:judge_pairs"], see.reward_sets, {"toy:held_out_pairs": 64, "toy:judge_pairs": 64}
    ),
    "reward_training.loss": Effect("scaled", see.export_says("digest"), also=RATED),
    "reward_training.attributes": Effect(["good", "short"], see.export_says("merge_weights"), [0.5, 0.5], REGRESSION),
    "reward_training.merge_weights": Effect([2.0], see.export_says("merge_weights"), [2.0], REGRESSION),
    "reward_training.epochs": Effect(2, see.reward_steps, 4),
    "reward_training.val_check_interval": Effect(1, see.reward_validations, [1, 2], VALIDATED),
    "reward_training.stop_after": Effect(1, see.reward_validations, [1, 2], SLOW),
    "reward_training.lora_rank": Effect(2, see.trained_weights),
    "reward_training.lora_alpha": Effect(4, see.adapter_scale, [2.0], ("reward_training.lora_rank=2",)),
    "reward_training.zero_stage": Effect(3, see.reward_engine("zero_optimization_stage"), 3),
    "reward_training.lr": Effect(1e-5, see.export_says("digest")),
    "reward_training.lr_schedule": Effect("constant", see.export_says("digest")),
    "reward_training.warmup_steps": Effect(1, see.export_says("digest")),
    "reward_training.min_lr": Effect(1e-3, see.export_says("digest")),
    "reward_training.constant_steps": Effect(
        1, see.export_says("digest"), also=("reward_training.lr_schedule=linear", "reward_training.epochs=2")
    ),
    "reward_training.gradient_checkpointing": Effect(True, see.reward_model_keeps_layer_inputs_only, True),
    "reward_training.offload_optimizer": Effect(
        True, see.offloads("reward_training"), True, on_gpus("reward_training")
    ),
    "reward_training.weight_decay": Effect(0.5, see.export_says("digest")),
    "reward_training.beta1": Effect(0.5, see.export_says("digest")),
    "reward_training.beta2": Effect(0.5, see.export_says("digest")),
    "reward_training.gradient_clip": Effect(1e-3, see.export_says("digest")),
    "reward_training.global_batch_size": Effect(64, see.reward_steps, 1),
    "reward_training.micro_batch_size": Effect(8, see.reward_engine("gradient_accumulation_steps"), 4),
    "sft.train": Effect("{root}/chat.jsonl", sft.told("trained on", "examples"), [6], CHAT),
    "sft.num_train": Effect(7, sft.told("trained on", "examples"), [7]),
    "sft.validation": Effect("{root}/chat.jsonl", sft.told("validated on", "examples"), [6], CHAT),
    "sft.validation_share": Effect(0.2, sft.told("validated on", "source"), ["validation share"], NO_VALIDATION),
    "sft.num_validation": Effect(9, sft.told("validated on", "examples"), [9]),
    "sft.turns": Effect("last", sft.told("trained on", "learned_tokens"), [6 * 2], (*CHAT, CHAT_DATA)),
    "sft.chat_template": Effect("{% for m in messages %}{{ m.content }}{% endfor %}", sft.first_example, also=CHAT),
    "sft.max_tokens": Effect(24, sft.told("trained on", "examples")),
    "sft.packing": Effect("rows", sft.packed, True),
    "sft.epochs": Effect(2, sft.steps, 10),
    "sft.max_steps": Effect(4, sft.steps, 4),
    "sft.val_check_interval": Effect(6, sft.validations, [0, 6, 12, 15]),
    "sft.keep_best": Effect(2, sft.checkpoints),
    "sft.lora_rank": Effect(2, sft.trained_weights),
    "sft.lora_alpha": Effect(4, sft.adapter_scale, [2.0], ("sft.lora_rank=2",)),
    "sft.zero_stage": Effect(2, sft.engine("zero_optimization_stage"), 2),
    "sft.lr": Effect(1e-5, sft.weights),
    "sft.lr_schedule": Effect("constant", sft.rates, [0.003] * 15),
    "sft.warmup_steps": Effect(2, sft.rates),
    "sft.min_lr": Effect(1e-3, sft.rates),
    "sft.constant_steps": Effect(3, sft.rates),
    "sft.gradient_checkpointing": Effect(True, sft.keeps_layer_inputs_only, True),
    "sft.offload_optimizer": Effect(True, see.offloads("sft"), True, on_gpus("sft")),
    "sft.weight_decay": Effect(0.5, sft.weights),
    "sft.beta1": Effect(0.5, sft.weights),
    "sft.beta2": Effect(0.5, sft.weights),
    "sft.gradient_clip": Effect(1e-3, sft.weights),
    "sft.global_batch_size": Effect(32, sft.steps, 9),
    "sft.micro_batch_size": Effect(2, sft.engine("gradient_accumulation_steps"), 8),
    "judge.train_pairs": Effect("toy:pairs", see.judge_says("weights")),
    "judge.held_out_pairs": Effect("{root}/swapped.jsonl", see.judge_says("accuracy"), 0.0),
    "judge.num_train_pairs": Effect(32, see.judge_says("weights")),
    "training.lr": Effect(0.01, see.rates, [0.01] * 4),
    "training.lr_schedule": Effect("linear", see.rates, [0.001, 0.00075, 0.0005, 0.00025]),
    "training.warmup_steps": Effect(2, see.rates, [0.0005, 0.001, 0.001, 0.001]),
    "training.min_lr": Effect(4e-4, see.rates, [0.001, 0.00085, 0.0007, 0.00055], ("training.lr_schedule=linear",)),
    "training.constant_steps": Effect(1, see.rates, [0.001, 0.000667, 0.000333, 0.0], ("training.lr_schedule=linear",)),
    "training.weight_decay": Effect(0.1, see.optimizer_group, (0.1, 0.9, 0.98)),
    "training.beta1": Effect(0.5, see.optimizer_group, (0.01, 0.5, 0.98)),
    "training.beta2": Effect(0.9, see.optimizer_group, (0.01, 0.9, 0.9)),
    "training.gradient_clip": Effect(1e-3, see.weights),
    "training.global_batch_size": Effect(2, see.optimizer_steps, [2, 2]),
    "training.micro_batch_size": Effect(1, see.engine_says("train_micro_batch_size_per_gpu"), 1),
    "training.gradient_checkpointing": Effect(True, see.keeps_layer_inputs_only, True),
    "training.offload_optimizer": Effect(True, see.offloads("training"), True, on_gpus("training")),
    "training.offload_during_rollouts": Effect(True, see.leaves_for_rollouts, True, ("resources.gpu=1",)),
    "training.lora_rank": Effect(2, see.trained_policy_weights),
    "training.lora_alpha": Effect(4, see.policy_adapter_scale, {2.0}, ("training.lora_rank=2",)),
    "training.sft_mix": Effect("toy:demonstrations", see.weights),
    "training.num_sft_examples": Effect(4, see.optimizer_steps, [2, 2], ("training.sft_mix=toy:demonstrations",)),
    "training.kl_penalty": Effect(10.0, see.weights),
    "training.zero_stage": Effect(3, see.engine_says("zero_optimization_stage"), 3),
    "loop.max_steps": Effect(3, see.last_steps, [2, 3]),
    "loop.max_epochs": Effect(1, see.last_steps, [20, 20], ("loop.max_steps=30", "loop.steps_per_iteration=30")),
    "loop.max_time_per_run": Effect("00:00:01:30", see.ends_at, 1090.0),
    "loop.stop_grace_s": Effect(5, see.grace, 5),
    "loop.steps_per_iteration": Effect(3, see.last_steps, [3, 4]),
    "loop.val_check_interval": Effect(1, see.validated_steps, [0, 1, 2]),
    "loop.save_interval": Effect(2, see.saved_steps, ["step-000002"], ("loop.keep_last=2",)),
    "loop.keep_last": Effect(2, see.saved_steps, ["step-000001", "step-000002"]),
    "loop.keep_best": Effect(
        3, see.saved_steps, [f"step-00000{i}" for i in (1, 2, 3)], ("loop.val_check_interval=1", THREE_STEPS)
    ),
    "loop.executor": Effect("disaggregated", phases.executor, "inner_run", ("loop.steps_per_iteration=1",)),
    **{
        f"phases.{phase}.{field}": Effect(value, phases.asked(phase, decorator, attribute), value, ONE_DTYPE)
        for phase in ("rollouts", "scoring", "update", "validation")
        for field, value, decorator, attribute in (
            ("gpu", 1, "resources", "gpu"),
            ("cpu", 3, "resources", "cpu"),
            ("memory", 12345, "resources", "memory"),
            ("retries", 3, "retry", "times"),
            ("timeout_s", 90, "timeout", "seconds"),
        )
    },
    "phases.shards": Effect(3, phases.shard_sizes, [2, 1, 1]),
    "phases.max_lost_shards": Effect(1, phases.without_a_shard, 1, ("phases.shards=4",)),
    "phases.update_nodes": Effect(2, phases.update_nodes, 2),
    "phases.run_with": Effect(["kubernetes"], phases.inner_command("--with"), ["kubernetes"]),
    "validation.num_prompts": Effect(4, see.num_prompts("validation"), 4),
    "evaluation.num_prompts": Effect(10, see.num_prompts("evaluation"), 10),
    "evaluation.best_of_n": Effect(2, see.samples_per_prompt, [3]),
    "evaluation.prompts": Effect("{root}/prompts.jsonl", see.first_words("evaluation"), {"question"}),
    "evaluation.model": Effect("{root}/policy", see.evaluated, ("{root}/policy", "{root}/cache/tiny-policy-1"), RUN),
    "evaluation.base": Effect("{root}/policy", see.evaluated, also=RUN),
    "evaluation.lm_eval_tasks": Effect(["colours"], see.harness_asked, [(("colours",), None)] * 2),
    "evaluation.lm_eval_limit": Effect(5, see.harness_asked, [(("colours",), 5)] * 2, TASKS),
    "promotion.min_reward_gain": Effect(0.5, promotion.passed("reward_gain"), False),
    "promotion.max_judge_fall": Effect(0.25, promotion.passed("judge_gain"), False),
    "promotion.max_length_ratio": Effect(1.1, promotion.passed("response_length"), False),
    "promotion.max_kl": Effect(0.2, promotion.passed("kl_to_base"), False),
    "promotion.min_distinct_ratio": Effect(0.8, promotion.passed("distinct_2"), False),
    "promotion.max_validation_fall": Effect(2.0, promotion.failing_step, None),
    "promotion.max_kl_per_token": Effect(0.2, promotion.failing_step, 1, ("training.kl_penalty=0.1",)),
    "promotion.alias": Effect("stable", promotion.aliases, {"latest": 1, "stable": 1}),
    "resources.gpu": Effect(8, see.cluster_request, ("8", "1.0", "8000.0M"), MEMORY),
    "resources.cpu": Effect(3, see.cluster_request, ("0", "3.0", "8000.0M"), MEMORY),
    "resources.memory": Effect(12345, see.cluster_request, ("0", "1.0", "12345.0M"), MEMORY),
    "resources.cpu_workers": Effect(2, see.num_workers, 2),
    "resources.threads": Effect(2, see.threads, 2),
    "slurm.enabled": Effect(True, slurm.decorators, ["retry", "srun"]),
    "slurm.partition": Effect("gpu", slurm.option("--partition"), ["gpu"], SLURM),
    "slurm.account": Effect("lab", slurm.option("--account"), ["lab"], SLURM),
    "slurm.qos": Effect("high", slurm.option("--qos"), ["high"], SLURM),
    "slurm.constraint": Effect("a100", slurm.option("--constraint"), ["a100"], SLURM),
    "slurm.time": Effect("01:02:03:04", slurm.option("--time"), ["1-02:03:04"], SLURM),
    "slurm.nodes": Effect(2, slurm.option("--nodes"), ["2", "1"], (*SLURM, "reward.url=127.0.0.1:9")),
    "slurm.retries": Effect(3, slurm.retries, 3, SLURM),
    "slurm.container": Effect(
        "apptainer", slurm.in_front_of_python, ["apptainer", "exec", "image.sqsh"], (*SLURM, *PYXIS)
    ),
    "slurm.image": Effect("other.sqsh", slurm.option("--container-image"), ["other.sqsh"], (*SLURM, *PYXIS)),
    "slurm.mounts": Effect(["/data"], slurm.option("--container-mounts"), ["/data:/data"], (*SLURM, *PYXIS)),
    "slurm.extra_args": Effect(["--reservation=ours"], slurm.option("--reservation"), ["ours"], SLURM),
    "kubernetes.image": Effect("registry/x:1", see.pod_has("image"), "registry/x:1", ("run.root=s3://bucket/runs",)),
    **{
        f"kubernetes.{field}": Effect(value, see.pod_has(attribute), becomes, PODS)
        for field, value, attribute, becomes in (
            ("namespace", "team", "namespace", "team"),
            ("service_account", "runs", "service_account", "runs"),
            ("secrets", ["keys"], "secrets", ["keys"]),
            ("image_pull_secrets", ["keys"], "image_pull_secrets", ["keys"]),
            ("node_selector", {"pool": "a"}, "node_selector", {"pool": "a"}),
            ("gpu_node_selector", {"gpu": "h100"}, "node_selector", {"gpu": "h100"}),
            ("tolerations", [{"key": "gpu"}], "tolerations", [{"key": "gpu"}]),
            ("shared_memory", 64, "shared_memory", 64),
            ("disk", 20000, "disk", 20000),
            ("volume_claims", {"v": "/v"}, "persistent_volume_claims", {"v": "/v"}),
        )
    },
    "kubernetes.retries": Effect(3, pods.repeated, {"times": 3, "minutes_between_retries": 0}, PODS),
    "wandb.mode": Effect("offline", see.wandb_run, ["rejection-sampling"]),
    "wandb.sample_prompts": Effect(0, see.sampled_texts, 0, ("wandb.mode=offline",)),
    "tensorboard.enabled": Effect(True, see.event_files, 1),
    "wandb.project": Effect("other", see.wandb_run, ["other"], ("wandb.mode=offline",)),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A root for the runs with a judge, two exported reward models, a port and other models and data to name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignment.embedded import policy_folder
    from alignment.judge_stage import prepare_judge
    from alignment.stages import prepare_scorers
    from alignment.toy import toy_pairs
    from infra.triton_setup import free_ports
    from reward_fixtures import tiny_reward_model

    root = tmp_path_factory.mktemp("effects")
    threads = torch.get_num_threads()
    config = effect_config(root)
    prepare_judge(config, root / "judge", lambda _: None)
    earlier = see.iteration(config).trainer.run.path
    see.exported(config)
    prepare_scorers(config, str(earlier))  # finds what has just been exported
    (root / "earlier").symlink_to(earlier)
    see.exported(effect_config(root, "reward_training.lr=1e-4"))
    (root / "prompts.jsonl").write_text("".join(json.dumps({"text": f"question {i}"}) + "\n" for i in range(30)))
    answered = [{"text": f"question {i}", "reference": "a reference"} for i in range(30)]
    (root / "answered.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in answered))
    swapped = [{"prompt": "", "chosen": p.rejected, "rejected": p.chosen} for p in toy_pairs("toy:held_out_pairs")[:32]]
    (root / "swapped.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in swapped))
    margins = [{**pair, "margin": 1 + i % 3} for i, pair in enumerate(swapped)]
    (root / "margins.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in margins))
    ratings = [
        {"prompt": "q", "response": side, "ratings": {"good": float(i % 2), "short": -len(side)}}
        for pair in swapped
        for i, side in enumerate((pair["rejected"], pair["chosen"]))
    ]
    (root / "ratings.jsonl").write_text("".join(json.dumps(rated) + "\n" for rated in ratings))
    chat = [{"role": role, "content": text} for role, text in (("user", "why"), ("assistant", "?")) * 2]
    chats = [{"messages": [*chat[:3], {"role": "assistant", "content": str(i)}]} for i in range(6)]
    (root / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chats))
    tiny = policy_folder("tiny", root / "cache")
    other = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    for part in (other, AutoTokenizer.from_pretrained(tiny)):
        part.save_pretrained(root / "policy")
    for part in tiny_reward_model():
        part.save_pretrained(root / "reward")
    yield root, str(free_ports(1)[0])
    torch.set_num_threads(threads)


def effect_config(root: Path, *overrides: str) -> Config:
    own = [f"run.root={root}", "wandb.mode=disabled", "reward_training.num_train=64", "judge.num_train_pairs=64"]
    return load_config(SMOKE, [*own, *overrides])


def test_every_field_has_an_entry_in_the_table_of_effects() -> None:
    assert set(EFFECTS) == fields()


def test_without_a_change_the_same_is_seen_again(bench: Any) -> None:
    first, second = (see.run_iteration(effect_config(bench[0])) for _ in range(2))
    assert (first.rows, first.weights, first.checkpoints) == (second.rows, second.weights, second.checkpoints)
    judges = [see.train_judge(effect_config(bench[0])) for _ in range(2)]
    assert judges[0]["weights"] == judges[1]["weights"]


@pytest.mark.parametrize("field", EFFECTS)
def test_each_field_changes_what_the_program_does(field: str, bench: Any) -> None:
    value, look, becomes, also = EFFECTS[field]

    def placed(item: Any) -> Any:
        if isinstance(item, tuple):
            return tuple(placed(one) for one in item)
        if not isinstance(item, str | Path):
            return item
        return type(item)(str(item).replace("{root}", str(bench[0])).replace("{port}", bench[1]))

    also = [placed(override) for override in also]
    before = look(effect_config(bench[0], *also))
    after = look(effect_config(bench[0], *also, f"{field}={json.dumps(placed(value))}"))
    assert after != before
    if becomes is not UNSTATED:
        assert after == placed(becomes)


def test_a_bad_value_ends_the_command_line_before_anything_starts(tmp_path: Path) -> None:
    place = Place(tmp_path)
    flow = str(ROOT / "flows" / "rs_flow.py")
    done = place.execute([sys.executable, flow, "--set", "training.lr=-1", "run"])
    assert done.status == 1
    assert done.output == "ConfigError: training.lr (-1): input should be greater than 0\n"
    assert list(tmp_path.iterdir()) == []


def test_set_and_a_preset_are_folded_into_one_config_value() -> None:
    from sources import fold_overrides

    words = ["--set", "resources.gpu=8", "--config", "config", str(SMOKE), "--set=run.root=/a=b", "run", "--tag", "x"]
    option, name, value, *rest = fold_overrides(words)
    assert (option, name, rest) == ("--config-value", "config", ["run", "--tag", "x"])
    assert parse_config(value) == load_config(SMOKE, ["resources.gpu=8", "run.root=/a=b"])
    assert fold_overrides(["--config", "config", "file.yaml", "show"]) == ["--config", "config", "file.yaml", "show"]
    for wrong, said in {
        ("--set",): "--set needs a value",
        ("--set", "seed=1", "resume"): "a resume keeps its config",
        ("--set", "seed=1", "--config-value", "config", "{}", "run"): "cannot be combined with --config-value",
    }.items():
        with pytest.raises(SystemExit, match=said):
            fold_overrides(wrong)
