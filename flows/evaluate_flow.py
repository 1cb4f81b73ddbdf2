"""Any checkpoint against any base: `python flows/evaluate_flow.py --set evaluation.model=… run`."""

from sources import CONFIG_HELP, DEFAULT_PRESET, PACKAGED, SUFFIXES, main, parse_preset, tag, task, typed  # isort: skip

from metaflow import Config, FlowSpec, config_expr, current, package_sources, resources, step

from placement import on_cluster, placed

GPU, CPU, MEMORY = (config_expr(f"config.resources.{name}") for name in ("gpu", "cpu", "memory"))


@placed()
@package_sources(PACKAGED, suffixes=SUFFIXES)
class EvaluateFlow(FlowSpec):
    """Compare a policy with a base on held-out prompts; nothing is trained but scorers that are not there yet.

    start         find both policies, lay out the folder, write the prompts
    reward_model  find the reward model by its version or recipe, or make it; train the judge
    evaluate      the policy against the base; writes the report
    end           say how it went

    `evaluation.model` and `evaluation.base` name runs, checkpoints, model folders or hub names. Reports go to
    <run.root>/evaluations/<run id>/.
    """

    config = Config("config", default=DEFAULT_PRESET, parser=parse_preset, help=CONFIG_HELP)

    @step
    def start(self):
        """Find both policies, lay out the folder, write the prompts."""
        import time

        from alignment.stages import begin_evaluation

        self.started = time.time()
        with task():
            self.run_path, self.model_ref, self.base = begin_evaluation(
                typed(self.config), current.run_id, current.origin_run_id
            )
        self.next(self.reward_model)

    @on_cluster
    @resources(gpu=GPU, cpu=CPU, memory=MEMORY)
    @step
    def reward_model(self):
        """Find the reward model by its version or recipe, or make it; train the judge."""
        from alignment.stages import prepare_scorers

        with task():
            self.reward_model_ref, self.judge_ref = prepare_scorers(typed(self.config), self.run_path)
        tag("reward_model:{name}/{version}".format(**self.reward_model_ref))
        self.next(self.evaluate)

    @on_cluster
    @resources(gpu=GPU, cpu=CPU, memory=MEMORY)
    @step
    def evaluate(self):
        """The policy against the base, on held-out prompts; writes the report."""
        from alignment.report import outcome
        from alignment.stages import run_evaluation_of

        scorers = typed(self.config), self.run_path, self.reward_model_ref, self.judge_ref
        with task():
            self.report = run_evaluation_of(*scorers, self.model_ref, self.base, self.started)
        tag(f"outcome:{outcome(self.report)}")
        self.next(self.end)

    @step
    def end(self):
        """Say how it went and where the report is."""
        from alignment.report_summary import summary

        print(summary(self.report, f"{self.run_path}/report.html"))


if __name__ == "__main__":
    main(EvaluateFlow)
