"""Being one rank of a job without any process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_fast_path_sharding_prop_cache, _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def playing(rank: int, world_size: int) -> Iterator[None]:
    """torch's fake process group, in which this process is `rank`: collectives return at once and move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # The caches of DTensor's operations hold meshes that know which rank they are on.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
        _clear_fast_path_sharding_prop_cache()  # type: ignore[no-untyped-call]
