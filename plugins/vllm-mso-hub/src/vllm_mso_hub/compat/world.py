"""One process that is every rank in turn: torch's own "fake" backend under vLLM's own process groups.

The fake backend accepts any group and moves no data; vLLM builds its tensor-, pipeline-, expert- and data-parallel
groups on it as it would on NCCL. Three things have to be told so: groups that vLLM wants on gloo, the message queues
and device communicators of a group, and the count of nodes, which is an exchange between ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_mso_hub.compat import private

_STATE = "vllm.distributed.parallel_state"


@contextmanager
def fake_world(config: Any, rank: int) -> Iterator[None]:
    """Be rank `rank` of the world that a VllmConfig describes; RuntimeError when this process is in a world already."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"
    from vllm.config import set_current_vllm_config

    if dist.is_initialized():
        raise RuntimeError("this process is in a torch.distributed world already; run the shape proof in a fresh one")
    state = sys.modules[private(_STATE, "init_model_parallel_group").__module__]
    new_group, node_count = dist.new_group, private(_STATE, "_node_count")
    init_group = private(_STATE, "init_model_parallel_group")

    def fake_group(ranks: Any = None, *_args: Any, **_kwargs: Any) -> Any:
        return new_group(ranks, backend="fake")

    def plain_group(*args: Any, **kwargs: Any) -> Any:
        kwargs.update(use_message_queue_broadcaster=False, use_device_communicator=False)
        return init_group(*args, **kwargs)

    parallel = config.parallel_config
    size = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    hook = sys.excepthook  # init_process_group wraps it: every line of a traceback would name every rank so far
    dist.new_group = fake_group
    vars(state).update(init_model_parallel_group=plain_group, _node_count=lambda _group: 1)
    try:
        with set_current_vllm_config(config):
            dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
            private(_STATE, "init_distributed_environment")(
                world_size=size, rank=rank, local_rank=0, distributed_init_method="fake://", backend="fake"
            )
            private(_STATE, "initialize_model_parallel")(
                tensor_model_parallel_size=parallel.tensor_parallel_size,
                pipeline_model_parallel_size=parallel.pipeline_parallel_size,
            )
            yield
    finally:
        dist.new_group = new_group
        sys.excepthook = hook
        vars(state).update(init_model_parallel_group=init_group, _node_count=node_count)
        private(_STATE, "destroy_model_parallel")()
        private(_STATE, "destroy_distributed_environment")()
