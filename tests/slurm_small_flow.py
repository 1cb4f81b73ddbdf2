"""A flow of three tasks side by side on whole nodes, by `@srun` itself: what they see, and how they fail.

`--what` is `look`, `fail` (the first attempt ends with status 7) or `sleep`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from metaflow import FlowSpec, Parameter, current, resources, retry, srun, step


class SlurmSmallFlow(FlowSpec):
    """start → look (three tasks) → join → end"""

    what = Parameter("what", default="look")

    @step
    def start(self):
        self.tasks = [1, 2, 3]
        self.next(self.look, foreach="tasks")

    @srun(grace_s=5)
    @retry(times=1)
    @resources(gpu=8, cpu=2, memory=500)
    @step
    def look(self):
        import os
        import time

        print(f"task {self.input} has begun", flush=True)
        if self.what == "fail" and current.retry_count == 0:
            os._exit(7)
        time.sleep(600 if self.what == "sleep" else 1)
        names = ("SLURMD_NODENAME", "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES", "SLURM_CPUS_PER_TASK")
        self.seen = {name: os.environ.get(name) for name in names}
        self.attempt = current.retry_count
        self.next(self.join)

    @step
    def join(self, inputs):
        self.all_seen = [one.seen for one in inputs]
        self.attempts = [one.attempt for one in inputs]
        self.next(self.end)

    @step
    def end(self):
        import json

        print("seen", json.dumps({"seen": self.all_seen, "attempts": self.attempts}))


if __name__ == "__main__":
    SlurmSmallFlow()
