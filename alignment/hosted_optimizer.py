"""AdamW's state in host memory while nothing is updated, so that rollouts have the GPU's memory for their cache.

A tensor's storage is emptied in place and filled again: what DeepSpeed holds of the state (views, flat buffers, links
from parameters to their masters) goes on to hold it, whatever the ZeRO stage. Bytes are copied, so that an update gives
the same weights as without. Left out: gradient buffers, which some of DeepSpeed's engines keep between steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from alignment.config_training import TrainingSection
from alignment.engine import optimizer_tensors
from models.memory import release_memory


class HostedOptimizer:
    """The optimizer state of an engine, its moments and fp32 masters: on the host, or where the engine steps.

    The copies on the host stay allocated from one time to the next, page-locked where they are a GPU's.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._copies: dict[str, Tensor] = {}  # by a name of the storage, as `_away`
        self._away: dict[str, torch.UntypedStorage] = {}

    @property
    def is_away(self) -> bool:
        """Whether the state is on the host alone: then nothing may read or step it."""
        return bool(self._away)

    def put_away(self) -> int:
        """Move the state to the host; the bytes that this has freed. Nothing where it is there already."""
        if self._away:
            return 0
        self._away = _storages(self._engine)
        for name, storage in self._away.items():
            whole = _bytes(storage)
            if name not in self._copies:
                self._copies[name] = torch.empty(len(whole), dtype=torch.uint8, pin_memory=whole.is_cuda)
            self._copies[name].copy_(whole)
            storage.resize_(0)
        release_memory()  # to the card itself: vLLM allocates without torch's cache
        return sum(len(self._copies[name]) for name in self._away)

    def bring_back(self) -> None:
        """Move the state to where the engine steps. Nothing where it is there already."""
        for name, storage in self._away.items():
            storage.resize_(len(self._copies[name]))
            _bytes(storage).copy_(self._copies[name])
        self._away = {}

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """The state where the engine steps, for as long as the context lasts."""
        self.bring_back()
        try:
            yield
        finally:
            self.put_away()


def hosted_optimizer(engine: Any, training: TrainingSection) -> HostedOptimizer | None:
    """What moves the state of `engine` out of the rollouts' way, where the config asks for it."""
    return HostedOptimizer(engine) if training.offload_during_rollouts else None


def _storages(engine: Any) -> dict[str, torch.UntypedStorage]:
    """Those of the state, each once; not the weights', which are sampled, nor those of counts of steps."""
    seen = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    found = {}
    for name, tensor in optimizer_tensors(engine).items():
        storage = tensor.untyped_storage()
        if tensor.dim() and tensor.numel() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[name] = storage
    return found


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """A view of all of it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
