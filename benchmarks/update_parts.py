"""Where an update's seconds and memory go, on one row of numbers each; for docs/performance.md, no ratio.

    python -m benchmarks.update_parts [--tokens N] [--rows N] [--threads N] [--only NAME …]

The default policy in float32. Peak memory is the process's own (Linux), above what it held before.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment.config_sections import ResourcesSection
from alignment.config_training import TrainingSection
from alignment.embedded import policy_folder
from benchmarks.update_setup import TRAINING, alone, uniform_rollouts
from benchmarks.updates import CACHE

CHUNKS = (128, 256, 512, 1024, 2048)
REPEATS = 3
"""Of each measurement; the fastest counts."""


def parts(policy: Path, rows: int, tokens: int) -> None:
    """Seconds of each part of one optimizer step."""
    import torch

    from alignment.update import token_sequence
    from models.packing import sequence_batch
    from models.sequence_loss import SequenceLoss, hidden_states

    model = _model(policy).train()
    loss = SequenceLoss(model, packed=True)
    sequences = [token_sequence(r) for r in uniform_rollouts(rows, tokens)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINING["lr"], fused=True)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any, **others: Any) -> Any:
        begun = time.perf_counter()
        made = work(*arguments, **others)
        seconds.setdefault(name, []).append(time.perf_counter() - begun)
        return made

    for _ in range(REPEATS):
        batch = timed("layout", sequence_batch, sequences, packed=True)
        hidden = timed("body, forward", hidden_states, model, batch)
        inputs = hidden.detach().requires_grad_()
        sums = timed("head, forward and its gradients", loss.head, inputs, batch.targets, None)
        timed("head, backward", sums[0].backward)
        timed("body, backward", hidden.backward, inputs.grad)
        timed("clipping", torch.nn.utils.clip_grad_norm_, model.parameters(), 1.0)
        timed("AdamW", optimizer.step)
        optimizer.zero_grad()
    for name, measured in seconds.items():
        print(f"{name:34} {min(measured):7.2f} s")


def head(policy: Path, rows: int, tokens: int) -> None:
    """Seconds and peak memory of the head's loss and gradients, whole and in chunks of tokens."""
    import torch

    from models import head as heads
    from models.head import TokenHead, loss_sums

    layer = _model(policy).lm_head
    hidden, targets = torch.randn(rows * tokens, layer.in_features), torch.randint(1000, (rows * tokens,))
    for chunk in (None, *CHUNKS):

        def step(chunk: int | None = chunk) -> None:
            inputs = hidden.clone().requires_grad_()
            if chunk is None:
                sums = loss_sums(layer(inputs), targets, None, 0.0)
            else:
                heads.CHUNK = chunk
                sums = TokenHead(layer, 0.0)(inputs, targets, None)
            sums[0].backward()
            layer.weight.grad = None

        print(f"head, {'whole' if chunk is None else f'chunks of {chunk}':15} {_cost(step)}")


def recomputing(policy: Path, rows: int, tokens: int) -> None:
    """Seconds and peak memory of a forward and a backward pass, with gradient checkpointing and without."""
    from alignment.engine import keep_layer_inputs_only
    from alignment.update import token_sequence
    from models.sequence_loss import SequenceLoss

    model = _model(policy).train()
    loss = SequenceLoss(model, packed=True)
    sequences = [token_sequence(r) for r in uniform_rollouts(rows, tokens)]
    for name in ("gradient_checkpointing=false", "gradient_checkpointing=true"):
        if name.endswith("true"):
            keep_layer_inputs_only(loss, "training")
        print(f"{name:34} {_cost(lambda: loss(sequences)[0].backward())}")


def engine(policy: Path, rows: int, tokens: int) -> None:
    """Seconds that DeepSpeed's engine takes to start around the policy, by ZeRO stage; nothing is compiled."""
    import torch

    from alignment.engine import build_engine, start_ranks
    from models.sequence_loss import SequenceLoss

    with alone():
        start_ranks(threads=torch.get_num_threads(), gpu=False)
    training = TrainingSection(global_batch_size=rows, micro_batch_size=rows, **TRAINING)
    for stage in range(4):
        loss = SequenceLoss(_model(policy), packed=True)
        begun = time.perf_counter()
        with alone():
            build_engine(loss, training, zero_stage=stage, world_size=1)
        print(f"engine, ZeRO {stage} {time.perf_counter() - begun:7.2f} s")


MEASUREMENTS: dict[str, Callable[[Path, int, int], None]] = {
    "head": head,
    "recomputing": recomputing,
    "parts": parts,
    "engine": engine,
}


def _model(policy: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)


def _cost(step: Callable[[], None]) -> str:
    """The fastest of some runs, and the peak of the memory that they took."""
    step()  # gradients stay, as they do from one micro-batch to the next
    reset_peak()
    before, measured = memory_mb("VmRSS"), []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        step()
        measured.append(time.perf_counter() - begun)
    return f"{min(measured):7.2f} s {memory_mb('VmHWM') - before:7.0f} MB"


def reset_peak() -> None:
    """This process's peak of memory (VmHWM) counts from here."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_mb(key: str) -> float:
    """A value of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(key))


def main() -> int:
    """Print the measurements that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="sequences")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each sequence")
    parser.add_argument("--threads", type=int, default=ResourcesSection().threads, help="torch threads")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    policy = Path(policy_folder("smollm2-135m", CACHE, print))
    for name in options.only:
        MEASUREMENTS[name](policy, options.rows, options.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
