"""A communication hook for DistributedDataParallel that averages where the sum is. DDP works without it, too."""

# No postponed annotations here: DistributedDataParallel looks at those of a communication hook.
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket


def average_hook(group: dist.ProcessGroup | None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """The mean of a bucket: `model.register_comm_hook(None, average_hook)`.

    The owner of a sum divides it, once; without the hook every worker divides its whole gradient before it is sent,
    a pass over memory more, and a rounding more for each rank.
    """
    work = dist.all_reduce(bucket.buffer(), dist.ReduceOp.AVG, group, async_op=True)
    assert work is not None
    averaged: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return averaged
