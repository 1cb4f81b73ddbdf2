"""What each of two ranks gets from vLLM, with a copy each or one copy between them; for tests/test_vllm.py.

python -m alignment.one_node --nproc-per-node=2 tests/vllm_ranks.py POLICY OUT TENSOR_PARALLEL
"""

import json
import sys

from alignment.engine import start_ranks
from models.policy import load_policy
from models.vllm_engine import load_vllm
from vllm_samples import TEXTS, told


def main(folder: str, out: str, tensor_parallel: int) -> None:
    ranks = start_ranks(threads=1, gpu=False)
    policy = load_policy(folder, prompt_format="text")
    sizes = {"max_tokens": 128, "batch_tokens": 2048, "tensor_parallel": tensor_parallel}
    engine = load_vllm(folder, gpu=False, dtype="float32", **sizes)
    texts = TEXTS[2:] if ranks.rank else TEXTS  # uneven shares
    with open(f"{out}.{ranks.rank}", "w") as file:
        json.dump(told(policy, engine, texts), file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
