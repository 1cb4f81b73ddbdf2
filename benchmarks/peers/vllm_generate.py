"""Peer: vLLM on a CPU as its users call it, `LLM.generate` with n samples a prompt.

    VLLM-PYTHON benchmarks/peers/vllm_generate.py WORKLOAD.json

By the python of an environment that has vLLM: nothing of this repository is imported. It reads the model's folder and
the prompts' token ids, gets warm by one round that is not told, prints {"ready": true}, then answers each line of its
input by a round over the whole workload: {"seconds", "tokens"}. In float32, compiled, with prefix caching, in one
process: on two cores a second one would only take turns with the first. Its malloc keeps what was freed, as ours does.
"""

import ctypes
import json
import os
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def main() -> None:
    mallopt = ctypes.CDLL(None).mallopt  # as models.memory.keep_freed_memory, which this process cannot import
    mallopt(-4, 0)  # M_MMAP_MAX
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    from vllm import LLM, SamplingParams

    with open(sys.argv[1]) as file:
        work = json.load(file)
    llm = LLM(
        model=work["model"],
        dtype="float32",
        max_model_len=work["max_tokens"],
        max_num_seqs=len(work["prompts"]) * work["samples_per_prompt"],
        kv_cache_memory_bytes=2 << 30,
        block_size=32,  # of the default, 128 tokens, the samples would share next to nothing
    )
    length = work["max_new_tokens"]
    params = SamplingParams(n=work["samples_per_prompt"], temperature=1.0, max_tokens=length, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in work["prompts"]]

    def one_round() -> dict[str, float]:
        llm.reset_prefix_cache()  # an RS step's prompts are new, and so are its weights
        begun = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "tokens": sum(len(one.token_ids) for output in outputs for one in output.outputs)}

    one_round()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(one_round()), flush=True)


if __name__ == "__main__":
    main()
