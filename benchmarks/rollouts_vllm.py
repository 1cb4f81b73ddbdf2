"""How many times faster the in-process engine samples than vLLM on the same CPU.

    python -m benchmarks.rollouts_vllm --vllm-python PATH [--rounds N] [--threads N]

PATH is the python of an environment that has vLLM (requirements-vllm.txt); without it nothing is compared. The workload
is that of benchmarks.rollouts, and every response has the full length. Both engines are warm and take turns. Ours
returns log-probabilities as well, which vLLM is not asked for. The result goes to benchmarks/results/latest.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from alignment.config_sections import ResourcesSection
from alignment.embedded import policy_folder
from alignment.errors import ConfigError, WorkerError
from benchmarks.results import Result, noted, record, result, shown, speedups
from benchmarks.rollouts import LONGEST, NEW_TOKENS, SAMPLES, Bench, limit, workload
from benchmarks.rounds import Note, interleaved
from models.memory import keep_freed_memory
from models.policy import load_policy

NAME = "rollouts_vs_vllm_cpu"
PEER = Path(__file__).resolve().parent / "peers" / "vllm_generate.py"


class VllmPeer:
    """vLLM in a process of its own, warm and waiting."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log

    def generate(self) -> list[float]:
        """A round over the whole workload; returns the number of tokens drawn."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of one that has ended: its log says why
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return [float(self.answer()["tokens"])]

    def answer(self) -> dict[str, Any]:
        """Its next line of JSON. Raises WorkerError where it ends without one."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise WorkerError(f"vLLM ended with status {self._process.wait()}:\n{self._log.read_text()[-2000:]}")


@contextmanager
def vllm_peer(python: str, workload: dict[str, Any], scratch: Path, threads: int) -> Iterator[VllmPeer]:
    """The peer over a workload, by the python of its environment. Raises ConfigError, WorkerError."""
    if shutil.which(python) is None:
        raise ConfigError(f"--vllm-python ({python}): no such program; name the python of an environment with vLLM")
    (scratch / "workload.json").write_text(json.dumps(workload))
    log = scratch / "vllm.log"
    with (
        open(log, "w") as errors,
        subprocess.Popen(
            [python, str(PEER), str(scratch / "workload.json")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        ) as process,
    ):  # fmt: skip
        try:
            peer = VllmPeer(process, log)
            peer.answer()
            yield peer
        finally:
            process.kill()


def compare(options: argparse.Namespace, scratch: Path, note: Note) -> Result:
    """vLLM's seconds over ours, round by round, for as many tokens. Raises AlignmentError."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as a worker does
    folder = policy_folder("smollm2-135m", scratch, note)
    bench = Bench(load_policy(folder, prompt_format="text").model, *workload(), options.rounds, note)
    work = {
        "model": str(folder),
        "prompts": bench.prompts,
        "samples_per_prompt": SAMPLES,
        "max_new_tokens": NEW_TOKENS,
        "max_tokens": LONGEST + NEW_TOKENS,
    }
    note(f"{NAME}: vLLM starts and compiles, which takes minutes")
    with vllm_peer(options.vllm_python, work, scratch, options.threads) as peer:
        seconds = interleaved({"ours": bench.ours, "vllm": peer.generate}, options.rounds, note, title=NAME)
    tokens = len(bench.prompts) * SAMPLES * NEW_TOKENS
    against = (
        f"vLLM 0.32 on the CPU, compiled, float32, n={SAMPLES}, {options.threads} threads, both keep freed memory: "
        f"{tokens / min(seconds['vllm']):.0f} tokens/s, ours {tokens / min(seconds['ours']):.0f}, "
        f"matrix products alone {tokens / limit(bench).seconds:.0f}"
    )
    command = "python -m benchmarks.rollouts_vllm --vllm-python PATH"
    return result(NAME, speedups(seconds["vllm"], seconds["ours"]), target=1.7, against=against, command=command)


def main(arguments: list[str] | None = None) -> int:
    """Compare, record and print. 0 whatever the ratio is; 1 where it could not be made."""
    options = _parser().parse_args(arguments)
    if options.vllm_python is None:
        print(f"{NAME}: skipped, since no --vllm-python names the python of an environment with vLLM")
        return 0
    return shown(lambda: compared(options))


def compared(options: argparse.Namespace) -> list[Result]:
    """The result, recorded. Raises AlignmentError."""
    with tempfile.TemporaryDirectory(prefix="rollouts-bench-") as scratch:
        made = [compare(options, Path(scratch), noted())]
    record(made)
    return made


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="python of an environment that has vLLM")
    parser.add_argument("--rounds", type=int, default=3, help="ratios")
    parser.add_argument("--threads", type=int, default=ResourcesSection().threads, help="torch threads of each engine")
    return parser


if __name__ == "__main__":
    sys.exit(main())
