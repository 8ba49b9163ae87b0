"""Ray Train on backend "reducer": TorchConfig names it, and nothing else changes.

    make test-integrations                                   # once: makes .venv-integrations
    .venv-integrations/bin/python examples/ray_train.py

Ray starts a cluster on this machine for the run, of which each worker takes one core. With standalone reducers:
REDUCER_SERVERS=host:port,... before the command.
"""

from __future__ import annotations

import os
import tempfile

import ray
import ray.train.torch
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch.utils.data import DataLoader
from training_job import BATCH, LEARNING_RATE, data, model, summary

WORKERS = 2
STEPS = 60


def train() -> list[str]:
    """In each worker; what rank 0 returns is in the result."""
    gpt = model(seed=ray.train.get_context().get_world_rank())
    net = ray.train.torch.prepare_model(gpt)
    loader = ray.train.torch.prepare_data_loader(
        DataLoader(data(WORKERS * BATCH * STEPS), batch_size=BATCH, shuffle=True)
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
    losses = []
    for step, (inputs, targets) in enumerate(loader):
        loss = gpt.loss(net(inputs), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            ray.train.report({"step": step, "loss": losses[-1]})
    return summary(gpt, losses)


def main() -> None:
    # Workers on other machines have not this process' environment.
    settings = {name: value for name, value in os.environ.items() if name.startswith("REDUCER_")}
    ray.init(runtime_env={"env_vars": settings})
    with tempfile.TemporaryDirectory() as folder:
        result = TorchTrainer(
            train,
            torch_config=TorchConfig(backend="reducer"),
            scaling_config=ScalingConfig(num_workers=WORKERS),
            run_config=RunConfig(storage_path=folder),
        ).fit()
    print(*result.return_value, sep="\n")


if __name__ == "__main__":
    main()
