"""How many times faster the in-process engine samples than vLLM on the same CPU.

    python -m benchmarks.rollouts_vllm --vllm-python PATH [--rounds N] [--threads N]

PATH is the python of an environment that has vLLM (requirements-vllm.txt); without it nothing is compared. The same
model, SmolLM2-135M in fp32, the same prompts and numbers of samples; both engines are warm, and take turns. Tokens a
second are compared, since each draws its own samples. Ours returns log-probabilities, and vLLM is not asked for them.
The result goes to benchmarks/results/latest.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignment.config import Config
from alignment.config_sections import ResourcesSection
from alignment.errors import AlignmentError, WorkerError
from alignment.preparation import cache_folder
from alignment.progress import ProgressLines
from benchmarks.results import Result, record, result, table
from benchmarks.rollout_prompts import LONGEST, MAX_NEW_TOKENS, SAMPLES_PER_PROMPT, review_prompts, smollm2
from benchmarks.rounds import Note

NAME = "rollouts_vs_vllm_cpu"
PEER = Path(__file__).resolve().parent / "peers" / "vllm_generate.py"


class VllmPeer:
    """vLLM in a process of its own, warm and waiting."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log

    def rate(self) -> float:
        """Tokens a second of one round."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        done = self.answer()
        return float(done["tokens"] / done["seconds"])

    def answer(self) -> dict[str, Any]:
        """Its next line of JSON. Raises WorkerError where it ends without one."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise WorkerError(f"vLLM ended with status {self._process.wait()}:\n{self._log.read_text()[-2000:]}")


@contextmanager
def vllm_peer(python: str, workload: dict[str, Any], scratch: Path, threads: int) -> Iterator[VllmPeer]:
    """The peer over a workload, by the python of its environment."""
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


def compare(python: str, *, rounds: int, threads: int, eager: bool, scratch: Path, note: Note) -> Result:
    """Our tokens a second over vLLM's, round by round. Raises AlignmentError."""
    import torch

    from alignment.rollouts import generate
    from models.sampling import Sampling

    torch.set_num_threads(threads)
    config = Config()
    policy = smollm2(cache_folder(config))
    prompts = review_prompts(policy)

    def our_rate(stream: str) -> float:
        begun = time.perf_counter()
        batches = generate(
            policy,
            prompts,
            samples_per_prompt=SAMPLES_PER_PROMPT,
            sampling=Sampling(MAX_NEW_TOKENS),
            batch_tokens=config.rollouts.batch_tokens,
            stream=stream,
        )
        tokens = sum(rollout.num_tokens for batch in batches for rollout in batch)
        return tokens / (time.perf_counter() - begun)

    workload = {
        "model": policy.model.config.name_or_path,
        "prompts": [policy.reader.encode(policy.reader.text(prompt)) for prompt in prompts],
        "samples_per_prompt": SAMPLES_PER_PROMPT,
        "max_new_tokens": MAX_NEW_TOKENS,
        "max_tokens": LONGEST + MAX_NEW_TOKENS + 8,
        "eager": eager,
    }
    lengths = sorted(map(len, workload["prompts"]))
    note(f"{len(lengths)} prompts of {lengths[0]} to {lengths[-1]} tokens; vLLM starts and compiles, a few minutes")
    ours, theirs = [], []
    with vllm_peer(python, workload, scratch, threads) as peer:
        our_rate("warm")
        for n in range(rounds):
            theirs.append(peer.rate())
            ours.append(our_rate(f"round-{n}"))
            note(f"{NAME}: round {n + 1}/{rounds} | ours {ours[-1]:.1f} tokens/s, vLLM {theirs[-1]:.1f}")
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    against = (
        f"vLLM 0.32 on the same CPU, float32, {'eager' if eager else 'compiled'}, {threads} threads, n samples a prompt"
    )
    return result(
        NAME, ratios, target=1.7, against=against, command="python -m benchmarks.rollouts_vllm --vllm-python PYTHON"
    )


def main(arguments: list[str] | None = None) -> int:
    """Compare, record and print. 0 whatever the ratio is; 1 where it could not be made."""
    options = _parser().parse_args(arguments)
    if options.vllm_python is None:
        print(f"{NAME}: skipped, since no --vllm-python names the python of an environment with vLLM")
        return 0
    note = _progress()
    try:
        with tempfile.TemporaryDirectory(prefix="rollouts-bench-") as scratch:
            found = compare(
                options.vllm_python, rounds=options.rounds, threads=options.threads, eager=options.eager,
                scratch=Path(scratch), note=note,
            )  # fmt: skip
    except AlignmentError as error:
        print(error, file=sys.stderr)
        return 1
    record([found])
    print(table([found]))
    return 0


def _progress() -> Note:
    lines = ProgressLines(total_steps=1)
    return lambda text: lines.update({"kind": "note", "text": text})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="python of an environment that has vLLM")
    parser.add_argument("--rounds", type=int, default=3, help="ratios")
    parser.add_argument("--threads", type=int, default=ResourcesSection().threads, help="torch threads of each engine")
    parser.add_argument("--eager", action="store_true", help="vLLM without its compiler: starts in seconds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
