"""A small GPT that trains on while workers are killed, and started again: docs/elastic.md.

    .venv/bin/reducer rendezvous --listen 127.0.0.1:29400 &
    for i in 1 2 3; do .venv/bin/python examples/elastic_train.py tcp://127.0.0.1:29400 & done
    kill -9 %3                                                             # at any moment
    .venv/bin/python examples/elastic_train.py tcp://127.0.0.1:29400 &     # another takes its place

With standalone reducers: REDUCER_SERVERS=host:port,... before the command.
"""

from __future__ import annotations

import argparse

import torch
from training_job import BATCH, LEARNING_RATE, data, model, weights_sha256

import reducer.elastic as elastic

_WINDOWS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rendezvous", help="tcp://host:port of `reducer rendezvous`, or file:///path on one host")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--on-loss", choices=("retry", "average"), default="retry")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    gpt = model(seed=0)
    windows = data(_WINDOWS)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    sampler = elastic.Sampler(_WINDOWS, BATCH)
    with elastic.Session(
        gpt,
        optimizer,
        arguments.rendezvous,
        state={"sampler": sampler, "scheduler": scheduler},
        on_loss=arguments.on_loss,
    ) as session:
        for step in session.steps(arguments.steps):
            samples = [windows[i] for i in sampler.indices()]
            inputs, targets = (torch.stack(column) for column in zip(*samples, strict=True))
            loss = gpt.loss(gpt(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            if not session.reduce():
                continue  # a worker was lost: this step is done again
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if step % 10 == 0:
                print(f"step {step}: loss {loss.item():.3f} on {session.rank} of {session.world_size}", flush=True)
    print(f"{arguments.steps} steps, {sampler.epoch:.2f} epochs, weights {weights_sha256(gpt)}")


if __name__ == "__main__":
    main()
