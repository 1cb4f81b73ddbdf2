"""Whether a served model answers, for the probes of a container.

    python -m infra.triton_canary --model reward_model [--url 127.0.0.1:8001] [--within 10]

It sends a canary conversation, since a server says "ready" for a model whose process has died. Status 0 means that the
model has answered. A server with a long queue may answer later than that and is well: so a probe that ends a container
on this must be slow to do so. The launcher inside sees a dead or hung model by itself and starts the server anew.
"""

import argparse
import sys

from alignment.errors import RewardServerError
from infra.triton_health import CANARY_S, answers


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 when the model has answered, 1 when it has not or never will."""
    parser = argparse.ArgumentParser(prog="python -m infra.triton_canary", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="name of the model that is asked")
    parser.add_argument("--url", default="127.0.0.1:8001", help="host:port of gRPC (default: %(default)s)")
    parser.add_argument("--within", type=float, default=CANARY_S, help="seconds to wait (default: %(default)g)")
    options = parser.parse_args(arguments)
    try:
        if answers(options.url, options.model, options.within):
            return 0
        print(f"{options.model} at {options.url} has not answered within {options.within:g} s", file=sys.stderr)
    except RewardServerError as error:
        print(error, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
