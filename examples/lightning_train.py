"""PyTorch Lightning on backend "reducer": the strategy names it, and nothing else changes.

    make test-integrations                                   # once: makes .venv-integrations
    .venv-integrations/bin/python examples/lightning_train.py

Lightning starts the second process itself. With standalone reducers: REDUCER_SERVERS=host:port,... before the command.
"""

from __future__ import annotations

import lightning
import torch
from gpt import Gpt
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader
from training_job import BATCH, LEARNING_RATE, data, model, summary

WORKERS = 2
STEPS = 60


class LitGpt(lightning.LightningModule):  # type: ignore[misc]  # Lightning is not where mypy runs
    """A GPT as Lightning wants it."""

    def __init__(self, gpt: Gpt) -> None:
        super().__init__()
        self.gpt = gpt
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        inputs, targets = batch
        loss = self.gpt.loss(self.gpt(inputs), targets)
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)


def main() -> None:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=WORKERS,
        strategy=DDPStrategy(process_group_backend="reducer"),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
    )
    module = LitGpt(model(seed=trainer.global_rank))
    trainer.fit(module, DataLoader(data(WORKERS * BATCH * STEPS), batch_size=BATCH, shuffle=True))
    lines = summary(module, module.losses)
    if trainer.is_global_zero:
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()
