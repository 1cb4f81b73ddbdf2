"""Train a reward model and export it as a version of a Triton repository: `python flows/reward_model_flow.py run`."""

from sources import CONFIG_HELP, DEFAULT_PRESET, PACKAGED, SUFFIXES, main, parse_preset, tag, task, typed  # isort: skip

from metaflow import Config, FlowSpec, config_expr, current, package_sources, resources, step

from placement import on_cluster, placed

GPU, CPU, MEMORY = (config_expr(f"config.resources.{name}") for name in ("gpu", "cpu", "memory"))


@placed()
@package_sources(PACKAGED, suffixes=SUFFIXES)
class RewardModelFlow(FlowSpec):
    """Train a reward model, measure it, export it.

    start         check the config and what it names
    reward_model  train on all workers, measure on held-out data, export a version
    end           say how good it is, and how to serve it

    The sections reward, reward_training, resources and run of a preset are read. A recipe that has been exported
    before is found again instead of being trained anew.
    """

    config = Config("config", default=DEFAULT_PRESET, parser=parse_preset, help=CONFIG_HELP)

    @step
    def start(self):
        """Check the config and what it names."""
        from alignment.inputs import check_reward_inputs

        with task():
            check_reward_inputs(typed(self.config))
        self.next(self.reward_model)

    @on_cluster
    @resources(gpu=GPU, cpu=CPU, memory=MEMORY)
    @step
    def reward_model(self):
        """Train on all workers, measure on held-out data, export a version."""
        from alignment.stages import train_reward_model

        with task():
            self.reward_model_ref, self.card = train_reward_model(typed(self.config), current.run_id)
        tag("reward_model:{name}/{version}".format(**self.reward_model_ref))
        self.next(self.end)

    @step
    def end(self):
        """Say how good it is, and how to serve it."""
        from alignment.reward_findings import summary

        print(summary(self.reward_model_ref, self.card))


if __name__ == "__main__":
    main(RewardModelFlow)
