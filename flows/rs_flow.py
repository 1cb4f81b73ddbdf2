"""Rejection-sampling alignment: `python flows/rs_flow.py run`."""

from sources import CONFIG_HELP, DEFAULT_PRESET, PACKAGED, SUFFIXES, main, parse_preset, tag, task, typed  # isort: skip

from metaflow import Config, FlowSpec, config_expr, current, package_sources, resources, run_card, step

from placement import iterating_on_cluster, on_cluster, placed

GPU, CPU, MEMORY = (config_expr(f"config.resources.{name}") for name in ("gpu", "cpu", "memory"))
OWN_GPU = config_expr("config.resources.gpu if config.loop.executor == 'colocated' else 0")
"""Of the step that loops: the disaggregated executor's phases have GPUs of their own."""


@placed()
@package_sources(PACKAGED, suffixes=SUFFIXES)
class RSFlow(FlowSpec):
    """Align a language model by rejection sampling.

    start         check the config, lay out the run folder, split the prompts
    reward_model  train the reward model and the judge, export the former to a Triton repository
    iterate       rollouts, scoring, selection, update, validation: RS steps until all are done or one fails badly
    evaluate      the best checkpoint against the base, on prompts that nothing has seen; promoted or not
    end           say how it went

    The first run's id names runs/<run id>/ for good: a resume appends there.
    """

    config = Config("config", default=DEFAULT_PRESET, parser=parse_preset, help=CONFIG_HELP)

    @step
    def start(self):
        """Check the config, lay out the run folder, split and write the prompts."""
        import time

        from alignment.stages import begin

        self.started = time.time()
        with task():
            self.run_path, self.prompt_counts = begin(typed(self.config), current.run_id, current.origin_run_id)
        self.iteration = 0
        self.next(self.reward_model)

    @on_cluster
    @resources(gpu=GPU, cpu=CPU, memory=MEMORY)
    @step
    def reward_model(self):
        """Train the reward model and the judge; export the reward model as a version of a Triton repository."""
        from alignment.stages import prepare_scorers

        with task():
            self.reward_model_ref, self.judge_ref = prepare_scorers(typed(self.config), self.run_path)
        tag("reward_model:{name}/{version}".format(**self.reward_model_ref))
        self.next(self.iterate)

    @iterating_on_cluster
    @resources(gpu=OWN_GPU, cpu=CPU, memory=MEMORY)
    @run_card(id="progress")
    @step
    def iterate(self):
        """One iteration of RS steps from the last checkpoint; loops to itself until all steps are done."""
        from alignment.stages import run_iteration

        self.iteration += 1
        with task():
            self.checkpoint, steps_left = run_iteration(
                typed(self.config), self.run_path, self.reward_model_ref, self.judge_ref, current.run_card.show
            )
        self.again = "yes" if steps_left else "no"
        self.next({"yes": self.iterate, "no": self.evaluate}, condition="again")

    @on_cluster
    @resources(gpu=GPU, cpu=CPU, memory=MEMORY)
    @step
    def evaluate(self):
        """Best checkpoint by validation against the base, on held-out prompts; writes the report."""
        from alignment.report import outcome
        from alignment.stages import run_evaluation

        with task():
            self.report, self.checkpoint = run_evaluation(
                typed(self.config), self.run_path, self.reward_model_ref, self.judge_ref, self.started
            )
        tag(f"outcome:{outcome(self.report)}")
        self.next(self.end)

    @run_card(id="report")
    @step
    def end(self):
        """Say how it went and where the report is, which is also the step's card."""
        from alignment.report_summary import summary
        from alignment.stages import page_of

        path = self.run_path
        current.run_card.show(lambda: page_of(path))
        print(summary(self.report, f"{path}/report.html"))


if __name__ == "__main__":
    main(RSFlow)
