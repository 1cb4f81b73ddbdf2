"""vLLM as the engine of rollouts, in the worker's own process.

The engine keeps no weights from one use to the next: `responses` wakes it, hands it the trainer's tensors in memory,
drops the prefix cache that older weights filled, generates, and puts it to sleep again. So it cannot sample from
weights that training has left behind, and training has the memory. On a CPU vLLM cannot sleep: its copy of the weights
and its cache stay.

Every sample is a request of its own with a seed made from its stream's name; the prefix cache spares all but the first
of a prompt the prompt's forward pass. Under tensor parallelism the ranks that hold the weights together pool their
prompts and run the same requests in the same order, which is how vLLM's external launcher works.

Left out on purpose: a vLLM server in processes of its own, to which weights would have to travel; quantised weights.
"""

import atexit
import contextlib
import hashlib
import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignment.errors import ConfigError, ModelError, TrainingError
from models.batching import TokenIds
from models.sampling import Sample, Sampling

INSTALL = (
    "pip install --no-deps -r requirements-vllm.txt on a CPU, vllm==0.32.0 by its own instructions on GPUs; "
    "or set rollouts.engine=in_process"
)
BLOCK_TOKENS = 32
"""Tokens of a cache block: the samples of a prompt share the blocks that it fills."""
MAX_ROWS = 512
"""Responses side by side at the most, whatever the cache holds: a step computes as many rows of logits."""

SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # a worker's standard output is its owner's
}
"""Environment that vLLM reads as it is imported, where a user has not set it."""

Weights = Iterable[tuple[str, Tensor]]
"""The policy's named tensors, whole, as a checkpoint names them."""
Request = tuple[list[int], list[int]]
"""A prompt's token ids, and the seed of each of its samples."""


def check_installed() -> None:
    """Raise ConfigError where vLLM is not there."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"rollouts.engine (vllm) needs vLLM, which is not installed: {INSTALL}")


def load_vllm(
    source: str | Path, *, gpu: bool, dtype: str, max_tokens: int, batch_tokens: int, tensor_parallel: int
) -> "VllmEngine":
    """An engine for the architecture and tokenizer of `source`, asleep and without weights.

    `dtype` is the type of its weights, "float32" or "bfloat16", `max_tokens` bounds a prompt with its response,
    `batch_tokens` those whose keys and values are kept at once. All
    ranks of the process group call it, if there is one. Raises ConfigError, and ModelError where vLLM cannot run the
    model.
    """
    check_installed()
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if tensor_parallel > ranks:
        raise ConfigError(
            f"rollouts.vllm_tensor_parallel ({tensor_parallel}) needs as many workers that sample together, and here "
            f"there is {ranks}, as in each shard of rs_iteration_flow.py: set it to 1"
        )
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine must see this process's tensors
    try:
        from vllm import LLM
    except ImportError as error:
        raise ConfigError(f"rollouts.engine (vllm): vLLM cannot be imported ({error}): {INSTALL}") from error
    try:
        llm = LLM(
            model=str(source),
            load_format="dummy",  # the trainer's weights follow before the first token
            dtype=dtype,
            max_model_len=max_tokens,
            max_num_seqs=min(MAX_ROWS, math.ceil(batch_tokens / BLOCK_TOKENS)),
            block_size=BLOCK_TOKENS,
            num_gpu_blocks_override=math.ceil(max(batch_tokens, max_tokens) / BLOCK_TOKENS) + 1,  # vLLM keeps one
            kv_cache_memory_bytes=1,  # counted in blocks: no share of the memory is asked for, on a CPU neither
            gpu_memory_utilization=0.01,
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher" if ranks > 1 else "uni",
            enable_prefix_caching=True,
            enable_sleep_mode=gpu,
            enforce_eager=not gpu,  # on a CPU compiling takes longer than it gives
            logprobs_mode="raw_logprobs",
        )
    except Exception as error:  # vLLM raises ValueError, RuntimeError, AssertionError and others here
        raise ModelError(
            f"vLLM cannot run the policy in {source}: {str(error).strip() or type(error).__name__}. Where it lacks "
            f"memory, lower rollouts.batch_tokens ({batch_tokens}); else set rollouts.engine=in_process"
        ) from error
    atexit.register(llm.llm_engine.engine_core.shutdown)  # before the process group ends, which it needs
    engine = VllmEngine(llm, sleeps=gpu, tensor_parallel=tensor_parallel)
    engine.sleep()
    return engine


class VllmEngine:
    """A vLLM engine that has weights, and on a GPU memory, only while it generates."""

    def __init__(self, llm: Any, *, sleeps: bool, tensor_parallel: int) -> None:
        self._llm, self._sleeps, self._tensor_parallel = llm, sleeps, tensor_parallel

    def responses(
        self,
        weights: Weights,
        prompts: Sequence[TokenIds],
        streams: Sequence[Sequence[str]],
        sampling: Sampling,
        eos_ids: Sequence[int],
    ) -> Iterator[dict[int, list[Sample]]]:
        """All samples of some prompts at a time, by the prompt's index; one sample per stream, from these weights.

        Under tensor parallelism all come at once: its ranks must not part before the last token. Raises ModelError
        where the weights are not the model's, TrainingError where they are no longer finite.
        """
        mine = [(list(ids), [stream_seed(one) for one in row]) for ids, row in zip(prompts, streams, strict=True)]
        first, requests = self._pool(mine)
        with self._awake(weights):
            finished = self._generate(requests, sampling, eos_ids)
            if self._tensor_parallel == 1:
                yield from finished
                return
            everything = {i: samples for some in finished for i, samples in some.items()}
        yield {i: everything[first + i] for i in range(len(mine))}

    def sleep(self) -> None:
        """Hand the GPU's memory back, weights and cache forgotten; nothing on a CPU."""
        if self._sleeps:
            self._llm.sleep(level=2)

    @contextlib.contextmanager
    def _awake(self, weights: Weights) -> Iterator[None]:
        """With these weights, in memory until the end."""
        try:
            if self._sleeps:
                self._llm.wake_up(tags=["weights"])  # the cache stays away until the weights have been gathered
            config = self._llm.llm_engine.model_config
            [missing] = self._llm.apply_model(lambda model: _put_weights(model, weights, config))
            if missing:
                raise ModelError(f"the policy lacks weights that vLLM has: {', '.join(sorted(missing)[:3])}")
            if self._sleeps:
                self._llm.wake_up()
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM keeps the prefix cache of older weights: requests are left in it")
            yield
        finally:  # also where it is awake in part: what sleeps already is passed over
            self.sleep()

    def _pool(self, requests: list[Request]) -> tuple[int, list[Request]]:
        """The requests of all ranks that hold the weights together, and where this rank's begin among them."""
        if self._tensor_parallel == 1:
            return 0, requests
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        parts: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(parts, requests, group=group.cpu_group)
        return sum(len(part) for part in parts[: group.rank_in_group]), [one for part in parts for one in part]

    def _generate(
        self, requests: Sequence[Request], sampling: Sampling, eos_ids: Sequence[int]
    ) -> Iterator[dict[int, list[Sample]]]:
        """The samples of the prompts that one of vLLM's steps after the other finishes, by the prompt's index."""
        engine = self._llm.llm_engine
        groups: list[dict[int, Sample]] = [{} for _ in requests]
        places = {f"{i}/{k}": (i, k) for i, (_, seeds) in enumerate(requests) for k in range(len(seeds))}
        for name, (i, k) in places.items():
            ids, seeds = requests[i]
            engine.add_request(name, {"prompt_token_ids": ids}, _params(sampling, seeds[k], eos_ids))
        try:
            while engine.has_unfinished_requests():
                finished: dict[int, list[Sample]] = {}
                for output in engine.step():
                    i, k = places.pop(output.request_id)
                    groups[i][k] = _sample(output.outputs[0])
                    if len(groups[i]) == len(requests[i][1]):
                        finished[i] = [one for _, one in sorted(groups[i].items())]
                if finished:
                    yield finished
        finally:
            engine.abort_request(list(places))  # of a generator that is closed early


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint of the model holds, tied weights once: parameters, and the buffers that are saved."""
    yield from model.named_parameters()
    saved = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def stream_seed(stream: str) -> int:
    """vLLM's seed of the stream with this name: 63 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big") >> 1


def _params(sampling: Sampling, seed: int, eos_ids: Sequence[int]) -> Any:
    """One sample's parameters as vLLM has them."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        stop=list(sampling.stop),
        detokenize=bool(sampling.stop),
        ignore_eos=True,  # the policy's own ending tokens follow
        stop_token_ids=list(eos_ids),
        seed=seed,
        logprobs=0,  # those of the drawn tokens alone
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sample(output: Any) -> Sample:
    """A finished response. Raises TrainingError where its probabilities are not finite."""
    ids = tuple(output.token_ids)
    log_probs = tuple(step[token].logprob for token, step in zip(ids, output.logprobs, strict=True))
    if not all(map(math.isfinite, log_probs)):
        raise TrainingError("the policy's probabilities are not finite: training diverged. Lower training.lr")
    return Sample(ids, "stop" if output.finish_reason == "stop" else "length", log_probs)


@torch.no_grad()
def _put_weights(model: Any, weights: Weights, model_config: Any) -> set[str]:
    """Load named tensors into vLLM's model, in the layouts that it computes with; the names it has not been given."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    wanted = {name for name, _ in model.named_parameters()}
    initialize_layerwise_reload(model)
    loaded = model.load_weights((name, tensor.detach()) for name, tensor in weights)
    finalize_layerwise_reload(model, model_config)
    _repack_tied(model)
    return wanted - set(loaded)


def _repack_tied(model: nn.Module) -> None:
    """Prepare anew the layers that share another's weights: a reload passes them over; on a CPU they hold a copy."""
    owners: dict[int, nn.Module] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        if owners.setdefault(id(parameter), layer) is not layer:
            layer.quant_method.process_weights_after_loading(layer)
