"""One RS step with each phase as a Metaflow step: `python flows/rs_iteration_flow.py run --run_path runs/NAME`.

Without `--run_path` it begins a run of its own. RSFlow runs it for each RS step where loop.executor is disaggregated.
"""

from sources import CONFIG_HELP, DEFAULT_PRESET, PACKAGED, SUFFIXES, main, parse_preset, task, typed  # isort: skip

from metaflow import (
    Config,
    FlowSpec,
    Parameter,
    StepMutator,
    config_expr,
    current,
    package_sources,
    parallel,
    resources,
    retry,
    step,
    timeout,
)

from placement import config_of, on_cluster, placed

AT_ONCE = {"minutes_between_retries": 0}
"""Of a repeated pod, which would else wait for two minutes; elsewhere Metaflow never waits."""


def phase(name):
    """@resources, @retry, @timeout and the cluster's job of a phase, as the config has them."""

    def of(key):
        return config_expr(f"typed(config).{key}")

    def decorated(function):
        asked = {key: of(f"in_phase({name!r}).resources.{key}") for key in ("gpu", "cpu", "memory")}
        limited = timeout(seconds=of(f"phases.{name}.timeout_s"))(function)
        return on_cluster(resources(**asked)(retry(times=of(f"phases.{name}.retries"), **AT_ONCE)(limited)))

    return decorated


def preparing(function):
    """@resources, @retry, @timeout and job of the preparation: it trains, as long as an update may, and validates."""

    def of(key):
        return config_expr(f"max(typed(config).{key}, typed(config).in_phase('validation').{key})")

    asked = {key: of(f"resources.{key}") for key in ("gpu", "cpu", "memory")}
    limited = timeout(seconds=config_expr("config.phases['update'].timeout_s"))(function)
    again = retry(times=config_expr("config.phases['update'].retries"), **AT_ONCE)
    return on_cluster(resources(**asked)(again(limited)))


class may_be_lost(StepMutator):
    """@catch where phases.max_lost_shards lets a step go on without some shards; else a lost one can be resumed."""

    def mutate(self, mutable_step):
        if config_of(mutable_step.flow).phases.max_lost_shards:
            mutable_step.add_decorator("catch", deco_kwargs={"var": "lost"})


@placed()
@package_sources(PACKAGED, suffixes=SUFFIXES)
class RSIterationFlow(FlowSpec):
    """One RS step of a run, phase by phase, so that each phase may have nodes of its own.

    start        the run folder and the step to do
    preparation  where the run lacks them: reward model, judge, the validation of the policy that the step begins with
    sharding     name the shards
    rollouts     sample a shard of the step's prompts (foreach shard)
    scoring      score the rollouts of all shards
    selection    decide which are kept, and write both down
    update       fine-tune on the kept ones, save a checkpoint; with phases.update_nodes above 1 a gang does it:
                 gang → gang_update × nodes → gang_done
    validation   score the new policy on the validation prompts
    end          say how it went
    """

    config = Config("config", default=DEFAULT_PRESET, parser=parse_preset, help=CONFIG_HELP)
    run_path = Parameter("run_path", default="", help="run folder to go on with; empty begins a new one")

    @retry(times=1, **AT_ONCE)
    @step
    def start(self):
        """Find or begin the run; name the step to do."""
        from alignment.disaggregated import begin_step, lacks_nothing

        with task():
            ids = current.run_id, current.origin_run_id
            self.place = begin_step(typed(self.config), self.run_path or None, *ids)
            self.ready = "yes" if lacks_nothing(typed(self.config), self.place) else "no"
        self.next({"yes": self.sharding, "no": self.preparation}, condition="ready")

    @preparing
    @step
    def preparation(self):
        """Make what the run lacks: reward model, judge, the validation of the policy that the step begins with."""
        from alignment.disaggregated import prepare_step

        with task(self.config.phases["update"].timeout_s):
            prepare_step(typed(self.config), self.place)
        self.next(self.sharding)

    @retry(times=1, **AT_ONCE)
    @step
    def sharding(self):
        """Name the shards and who scores them."""
        from alignment.disaggregated import with_scorers

        self.place = with_scorers(typed(self.config), self.place)
        self.shards = list(range(self.config.phases.shards))
        self.next(self.rollouts, foreach="shards")

    @may_be_lost
    @phase("rollouts")
    @step
    def rollouts(self):
        """Sample this shard of the step's prompts."""
        from alignment.disaggregated import sample_shard

        with task(self.config.phases.rollouts.timeout_s):
            self.sampled = sample_shard(typed(self.config), self.place, self.input)
        self.next(self.scoring)

    @phase("scoring")
    @step
    def scoring(self, inputs):
        """Score the rollouts of all shards."""
        from alignment.disaggregated import score_shards

        self.merge_artifacts(inputs, include=["place"])
        shards = [None if getattr(shard, "lost", None) else shard.sampled for shard in inputs]
        with task(self.config.phases.scoring.timeout_s):
            self.scored = score_shards(typed(self.config), self.place, shards)
        self.next(self.selection)

    @retry(times=1, **AT_ONCE)
    @step
    def selection(self):
        """Decide which rollouts are kept, and why."""
        from alignment.disaggregated import select_and_store

        with task():
            self.decisions = select_and_store(typed(self.config), self.place, self.scored["scored"])
        # Kubernetes takes no gang of one.
        self.nodes = "several" if self.config.phases.update_nodes > 1 else "one"
        self.next({"one": self.update, "several": self.gang}, condition="nodes")

    @phase("update")
    @step
    def update(self):
        """Fine-tune on the kept rollouts, on one node, and save a checkpoint."""
        from alignment.disaggregated import train
        from alignment.launch import Gang

        alone = Gang(0, 1, "127.0.0.1", 0)
        with task(self.config.phases["update"].timeout_s):  # by brackets: a mapping has a method of that name
            self.checkpoint = train(typed(self.config), self.place, self.scored, self.decisions, alone)
        self.next(self.validation)

    @retry(times=1, **AT_ONCE)
    @step
    def gang(self):
        """Begin the gang, which a step with two ways on cannot do."""
        self.next(self.gang_update, num_parallel=self.config.phases.update_nodes)

    @phase("update")
    @parallel
    @step
    def gang_update(self):
        """Fine-tune on the kept rollouts, on all nodes of the gang together, and save a checkpoint."""
        from alignment.disaggregated import train
        from alignment.launch import Gang, gang_port

        here, attempt = current.parallel, f"{current.run_id}/{current.retry_count}"
        gang = Gang(here.node_index, here.num_nodes, here.main_ip, gang_port(attempt))
        with task(self.config.phases["update"].timeout_s):
            self.checkpoint = train(typed(self.config), self.place, self.scored, self.decisions, gang)
        self.next(self.gang_done)

    @retry(times=1, **AT_ONCE)
    @step
    def gang_done(self, inputs):
        """Go on with the checkpoint that the gang's first node names."""
        self.merge_artifacts(inputs, include=["place"])
        self.checkpoint = next(node.checkpoint for node in inputs if node.checkpoint)
        self.next(self.validation)

    @phase("validation")
    @step
    def validation(self):
        """Score the new policy on the validation prompts, where loop.val_check_interval says so."""
        from alignment.disaggregated import validate

        with task(self.config.phases.validation.timeout_s):
            self.validated = validate(typed(self.config), self.place, self.checkpoint)
        self.next(self.end)

    @retry(times=1, **AT_ONCE)
    @step
    def end(self):
        """Say how it went."""
        print(f"RS step {self.place['step']} of {self.place['run_path']}:", self.validated or "not validated")


if __name__ == "__main__":
    main(RSIterationFlow)
