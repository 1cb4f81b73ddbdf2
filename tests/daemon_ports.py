"""Ports for the daemons of tests: of Ceph, of Slurm."""

import contextlib
import random
import socket

PORTS = range(30000, 32768)


def free_ports(count: int) -> list[int]:
    """Ports that are free now and likely to stay so for the seconds until a daemon takes them.

    The kernel gives the ports from 32768 on to whoever connects somewhere.
    """
    free: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise OSError(f"fewer than {count} of the ports {PORTS[0]} to {PORTS[-1]} are free")
