"""torch.distributed.run for the ranks of one node, without a port that others could reach.

    python -m alignment.one_node --nproc-per-node N -m MODULE …

Its own rendezvous opens a store on all interfaces of the node, to anyone, and unpickles what it finds there. On one
node nobody has to be found: the launcher keeps its store in memory, and the ranks meet through a file in a private
folder (`store_url`). Gloo and nccl are told to use the loopback interface.
"""

import os
import sys
import tempfile
from pathlib import Path

STORE = "RS_STORE"
"""Environment variable: the file through which the ranks of one node meet."""
RENDEZVOUS = ("--rdzv-backend=one-node", "--rdzv-endpoint=none")
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def main() -> None:
    """The command line of torch.distributed.run, its rendezvous apart."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import (
        RendezvousHandler,
        RendezvousInfo,
        RendezvousStoreInfo,
        rendezvous_handler_registry,
    )
    from torch.distributed.run import get_args_parser, run

    class OneNode(RendezvousHandler):
        """A rendezvous of one launcher with itself."""

        def get_backend(self) -> str:
            return "one-node"

        def next_rendezvous(self) -> RendezvousInfo:
            from torch.distributed import HashStore  # type: ignore[attr-defined]

            nobody_listens_here = RendezvousStoreInfo("127.0.0.1", 29500)  # ranks want it set; they use the file
            return RendezvousInfo(HashStore(), rank=0, world_size=1, bootstrap_store_info=nobody_listens_here)

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            """There is nothing to close."""

        def num_nodes_waiting(self) -> int:
            return 0

        def get_run_id(self) -> str:
            return "one-node"

        def shutdown(self) -> bool:
            return True

    rendezvous_handler_registry.register("one-node", lambda _: OneNode())
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:  # for this user's eyes only
        os.environ |= {**LOOPBACK, STORE: str(Path(folder) / "store")}
        try:
            run(get_args_parser().parse_args(["--nnodes=1", *RENDEZVOUS, *sys.argv[1:]]))
        except ChildFailedError as error:  # what the rank wrote last is worth more than the launcher's report
            rank, failure = error.get_first_failure()
            sys.exit(f"rank {rank} ended with status {failure.exitcode}")


def store_url() -> str | None:
    """Where the ranks of this node meet, as an init_method; None for ranks that another launcher started."""
    path = os.environ.get(STORE)
    return f"file://{path}" if path else None


if __name__ == "__main__":
    main()
