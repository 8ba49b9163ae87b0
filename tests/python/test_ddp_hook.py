"""`reducer.ddp`: the reducer's average is DDP's."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import run_ranks
from test_wrap_ddp import N, loss_of, wrap

from reducer.ddp import average_hook


def train_averaged() -> tuple[torch.Tensor, torch.Tensor]:
    found = []
    for hook in (None, average_hook):
        model = wrap(None)
        if hook is not None:
            model.register_comm_hook(None, hook)
        torch.autograd.backward(loss_of(model, 0, dist.get_rank()))
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    return found[0], found[1]


def test_the_average_of_the_reducer_is_that_of_ddp() -> None:
    results = run_ranks(N, train_averaged)
    for plain, averaged in results:
        # By two, division is exact wherever it happens.
        assert torch.equal(plain, averaged) and torch.equal(averaged, results[0][1]) and averaged.abs().sum() > 0
