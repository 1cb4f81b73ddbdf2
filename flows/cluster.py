"""Which steps run on the cluster: those that need its nodes, where the config says so.

The steps that lay out a folder, name shards, select or say how it went take seconds of one core, and run where the
flow runs. So does the step that loops in the disaggregated executor: it watches its phases, which have jobs of their
own.
"""

from metaflow import StepMutator


def _attach(mutable_step, *, nodes: int = 1) -> None:
    config = mutable_step.flow.config
    own = {key: value for key, value in config.slurm.to_dict().items() if key not in ("enabled", "retries")}
    if config.slurm.enabled:
        mutable_step.add_decorator("srun", deco_kwargs={**own, "nodes": nodes, "grace_s": config.loop.stop_grace_s})
        mutable_step.add_decorator("retry", deco_kwargs={"times": config.slurm.retries})


class on_cluster(StepMutator):
    """@srun on one node where slurm.enabled says so, and @retry where the step has none."""

    def mutate(self, mutable_step):
        _attach(mutable_step)


class iterating_on_cluster(StepMutator):
    """The same on slurm.nodes nodes for the step that loops, if it does the work itself."""

    def mutate(self, mutable_step):
        if mutable_step.flow.config.loop.executor == "colocated":
            _attach(mutable_step, nodes=mutable_step.flow.config.slurm.nodes)
