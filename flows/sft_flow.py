"""Supervised fine-tuning, the usual step before rejection sampling: `python flows/sft_flow.py run`."""

from sources import CONFIG_HELP, DEFAULT_PRESET, PACKAGED, SUFFIXES, main, parse_preset, tag, task, typed  # isort: skip

from metaflow import Config, FlowSpec, config_expr, current, package_sources, resources, step

from placement import on_cluster, placed

GPU, CPU, MEMORY = (config_expr(f"config.resources.{name}") for name in ("gpu", "cpu", "memory"))


@placed()
@package_sources(PACKAGED, suffixes=SUFFIXES)
class SFTFlow(FlowSpec):
    """Fine-tune a policy on demonstrations.

    start  check the config, lay out the run folder, read and tokenize the demonstrations
    train  optimizer steps on all workers, with validations and checkpoints; the best one's model is written
    end    say how it went, and where the model is

    The sections policy, sft, resources, loop (stop_grace_s, max_time_per_run) and run of a preset are read, and
    prompts.held_out and evaluation.prompts, which are kept out of the training. The first run's id names
    <run.root>/sft/<run id>/ for good: a resume appends there.
    """

    config = Config("config", default=DEFAULT_PRESET, parser=parse_preset, help=CONFIG_HELP)

    @step
    def start(self):
        """Check the config, lay out the run folder, read and tokenize the demonstrations."""
        import time

        from alignment.stages import begin_sft

        self.started = time.time()
        with task():
            self.run_path, self.data = begin_sft(typed(self.config), current.run_id, current.origin_run_id)
        self.next(self.train)

    @on_cluster
    @resources(gpu=GPU, cpu=CPU, memory=MEMORY)
    @step
    def train(self):
        """Optimizer steps on all workers; the model of the best checkpoint, and the report."""
        from alignment.stages import train_sft

        with task():
            self.report = train_sft(typed(self.config), self.run_path, self.data, self.started)
        tag("sft_step:{step}".format(**self.report["model"]))
        self.next(self.end)

    @step
    def end(self):
        """Say how it went, and where the model is."""
        from alignment.sft_stage import summary

        print(summary(self.report))


if __name__ == "__main__":
    main(SFTFlow)
