"""One RS step with each phase as a Metaflow step: `python flows/rs_iteration_flow.py run --run_path runs/NAME`.

Without `--run_path` it begins a run of its own.
"""

from sources import CONFIG_HELP, DEFAULT_PRESET, PACKAGED, SUFFIXES, main, parse_preset, task, typed  # isort: skip

from metaflow import Config, FlowSpec, Parameter, config_expr, current, package_sources, resources, step

GPU, CPU, MEMORY = (config_expr(f"config.resources.{name}") for name in ("gpu", "cpu", "memory"))


@package_sources(PACKAGED, suffixes=SUFFIXES)
class RSIterationFlow(FlowSpec):
    """One RS step of a run, phase by phase, so that each phase may have nodes of its own.

    start         the run folder and the step to do
    reward_model  the run's reward model and judge
    rollouts      sample a shard of the step's prompts (foreach shard)
    scoring       score the rollouts of all shards
    selection     decide which are kept, and write both down
    update        fine-tune on the kept ones, save a checkpoint
    validation    score the new policy on the validation prompts
    end           say how it went
    """

    config = Config("config", default=DEFAULT_PRESET, parser=parse_preset, help=CONFIG_HELP)
    run_path = Parameter("run_path", default="", help="run folder to go on with; empty begins a new one")
    shards = Parameter("shards", default=2, help="tasks that the step's prompts are spread over")

    @step
    def start(self):
        """Find or begin the run; name the step to do."""
        from alignment.disaggregated import begin_step

        with task():
            self.place = begin_step(typed(self.config), self.run_path or None, current.run_id)
        self.next(self.reward_model)

    @resources(gpu=GPU, cpu=CPU, memory=MEMORY)
    @step
    def reward_model(self):
        """Train the run's reward model and judge, unless it has them."""
        from alignment.stages import prepare_scorers

        with task():
            reward, judge = prepare_scorers(typed(self.config), self.place["run_path"])
        self.place = {**self.place, "reward_model_ref": reward, "judge_ref": judge}
        self.shard_indices = list(range(self.shards))
        self.next(self.rollouts, foreach="shard_indices")

    @resources(gpu=GPU, cpu=CPU, memory=MEMORY)
    @step
    def rollouts(self):
        """Sample this shard of the step's prompts."""
        from alignment.disaggregated import sample_shard

        with task():
            self.sampled, self.seconds = sample_shard(typed(self.config), self.place, self.input, self.shards)
        self.next(self.scoring)

    @resources(cpu=CPU, memory=MEMORY)
    @step
    def scoring(self, inputs):
        """Score the rollouts of all shards; needs no GPU."""
        from alignment.disaggregated import score_shards

        self.merge_artifacts(inputs, include=["place"])
        with task():
            self.scored, self.seconds = score_shards(
                typed(self.config), self.place, [(i.sampled, i.seconds) for i in inputs]
            )
        self.next(self.selection)

    @step
    def selection(self):
        """Decide which rollouts are kept, and why."""
        from alignment.disaggregated import select_and_store

        with task():
            self.decisions = select_and_store(typed(self.config), self.place, self.scored)
        self.next(self.update)

    @resources(gpu=GPU, cpu=CPU, memory=MEMORY)
    @step
    def update(self):
        """Fine-tune on the kept rollouts and save a checkpoint."""
        from alignment.disaggregated import train

        with task():
            self.checkpoint = train(typed(self.config), self.place, self.scored, self.decisions, self.seconds)
        self.next(self.validation)

    @resources(gpu=GPU, cpu=CPU, memory=MEMORY)
    @step
    def validation(self):
        """Score the new policy on the validation prompts, where loop.val_check_interval says so."""
        from alignment.disaggregated import validate

        with task():
            self.validated = validate(typed(self.config), self.place)
        self.next(self.end)

    @step
    def end(self):
        """Say how it went."""
        print(f"RS step {self.place['step']} of {self.place['run_path']}:", self.validated or "not validated")


if __name__ == "__main__":
    main(RSIterationFlow)
