"""Peer: vLLM on a CPU as its users call it, `LLM.generate` with n samples a prompt.

    python vllm_generate.py WORKLOAD.json

By the python of an environment that has vLLM: nothing of this repository is imported. It reads the model's folder and
the prompts, gets warm by one round that is not told, prints {"ready": true}, then answers each line of its input by a
round over the whole workload: {"seconds", "tokens"}. Compiled, float32, prefix caching on: vLLM's defaults, and blocks
small enough that a prompt's samples share most of its cache.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    from vllm import LLM, SamplingParams

    with open(sys.argv[1]) as file:
        work = json.load(file)
    llm = LLM(
        model=work["model"],
        dtype="float32",
        max_model_len=work["max_tokens"],
        max_num_seqs=len(work["prompts"]) * work["samples_per_prompt"],
        kv_cache_memory_bytes=4 << 30,
        block_size=32,
        enforce_eager=work["eager"],
    )
    params = SamplingParams(n=work["samples_per_prompt"], temperature=1.0, max_tokens=work["max_new_tokens"])

    def round_of() -> dict[str, float]:
        llm.reset_prefix_cache()  # a step's prompts are new, and so are its weights
        begun = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in work["prompts"]], params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "tokens": sum(len(one.token_ids) for output in outputs for one in output.outputs)}

    round_of()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(round_of()), flush=True)


if __name__ == "__main__":
    main()
