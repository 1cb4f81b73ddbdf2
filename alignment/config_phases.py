"""The config of the disaggregated executor: what each phase of an RS step asks for, and how the step is spread.

A phase is a Metaflow step of `flows/rs_iteration_flow.py` with its own @resources, @retry and @timeout. What it leaves
null it has in common with `resources`.
"""

from typing import Annotated

from pydantic import Field

from alignment.config_sections import ResourcesSection, Section

FIVE_DAYS_S = 432_000


class PhaseSection(Section):
    gpu: int | None = Field(None, ge=0)
    """GPUs of a task of this phase; null means resources.gpu."""
    cpu: int | None = Field(None, ge=1)
    """CPU cores of a task of this phase; null means resources.cpu."""
    memory: int | None = Field(None, ge=1)
    """Memory of a task of this phase in MB; null means resources.memory."""
    retries: int = Field(1, ge=0, le=4)
    """Times that a task of this phase is repeated after it has failed, was lost, or took too long."""
    timeout_s: int = Field(FIVE_DAYS_S, ge=1)
    """Seconds after which a task of this phase is ended, and counts as failed; Metaflow's own limit is five days."""

    def over(self, resources: ResourcesSection) -> ResourcesSection:
        """The resources of a task: this phase's, where it names any, else `resources`."""
        own = {"gpu": self.gpu, "cpu": self.cpu, "memory": self.memory}
        return resources.model_copy(update={name: value for name, value in own.items() if value is not None})


class SamplingPhaseSection(PhaseSection):
    gpu: int | None = Field(None, ge=0, le=1)
    """GPUs of a task of this phase, which samples in one process; null means 1 where resources.gpu is not 0."""

    def over(self, resources: ResourcesSection) -> ResourcesSection:
        """As of any phase, with one GPU at the most."""
        shared = super().over(resources)
        return shared.model_copy(update={"gpu": min(shared.gpu, 1)})


class ScoringPhaseSection(PhaseSection):
    gpu: int | None = Field(0, ge=0)
    """GPUs of a task of this phase: none for a client of reward.url, else those of the reward server it starts."""


class PhasesSection(Section):
    rollouts: SamplingPhaseSection = SamplingPhaseSection()
    scoring: ScoringPhaseSection = ScoringPhaseSection()
    update: PhaseSection = PhaseSection()
    """Its `retries` and `timeout_s` are also those of the preparation, which trains what a run lacks."""
    validation: SamplingPhaseSection = SamplingPhaseSection()
    shards: int = Field(1, ge=1)
    """Tasks that the prompts of an RS step are spread over."""
    max_lost_shards: int = Field(0, ge=0)
    """Shards that a step may lose, those that still fail or take too long after their retries: it goes on without their
    prompts, which its record names. More end the step with an error."""
    update_nodes: int = Field(1, ge=1)
    """Nodes of the update, each with the workers of one; more than one need a run.root that all of them see."""
    run_with: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Metaflow's decorators for every task of a step, as `--with` takes them: `kubernetes`, `slurm`. Without any, all
    tasks run on the node of the step that starts them."""
