"""Hugging Face Accelerate on backend "reducer": the group is made first, and Accelerate keeps it.

    make test-integrations                                   # once: makes .venv-integrations
    .venv-integrations/bin/torchrun --nproc-per-node 2 examples/accelerate_train.py

Without one, Accelerate 1.15 makes a group of its own, which on CPUs is always Gloo: docs/pytorch-frameworks.md.
With standalone reducers: REDUCER_SERVERS=host:port,... before the command.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader
from training_job import BATCH, LEARNING_RATE, data, model, summary

STEPS = 60


def main() -> None:
    dist.init_process_group("reducer")
    accelerator = Accelerator(cpu=True)

    gpt = model(seed=accelerator.process_index)
    windows = data(accelerator.num_processes * BATCH * STEPS)
    net, optimizer, loader = accelerator.prepare(
        gpt,
        torch.optim.AdamW(gpt.parameters(), lr=LEARNING_RATE),
        DataLoader(windows, batch_size=BATCH, shuffle=True),
    )
    losses = []
    for step, (inputs, targets) in enumerate(loader):
        loss = gpt.loss(net(inputs), targets)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            mean = accelerator.gather(loss.detach()).mean().item()
            accelerator.print(f"step {step}: loss {mean:.3f}")
    for line in summary(gpt, losses):
        accelerator.print(line)
    accelerator.end_training()


if __name__ == "__main__":
    main()
