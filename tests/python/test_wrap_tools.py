"""What PyTorch has around training: checkpoints, torch.compile, torchrun, and its debug level."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.checkpoint as dcp
from ranks import Ranks, init_group
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

N = 2


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(N) as all_ranks:
        yield all_ranks


def model(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 5))


def sharded(seed: int = 1) -> tuple[Any, torch.optim.Optimizer]:
    module: Any = fully_shard(model(seed))
    return module, torch.optim.Adam(module.parameters(), lr=0.01)


def train(module: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        optimizer.zero_grad()
        module(torch.randn(4, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def whole(module: nn.Module) -> torch.Tensor:
    return torch.cat(
        [(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten() for p in module.parameters()]
    )


# ---------------------------------------------------------------- distributed checkpoint


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, rest = get_state_dict(module, optimizer)
    return {"model": weights, "optimizer": rest}


def load(path: str) -> tuple[Any, torch.optim.Optimizer]:
    """A model with other weights, and then with those of the checkpoint."""
    module, optimizer = sharded(seed=9)
    state = state_of(module, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return module, optimizer


def save_and_load(path: str) -> None:
    """Saved after three steps and loaded, two more steps give what five in a row give."""
    module, optimizer = sharded()
    train(module, optimizer, range(3))
    dcp.save(state_of(module, optimizer), checkpoint_id=path)
    train(module, optimizer, range(3, 5))
    again, again_optimizer = load(path)
    assert not torch.equal(whole(again), whole(module))
    train(again, again_optimizer, range(3, 5))
    assert torch.equal(whole(again), whole(module))


def test_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    ranks.call(save_and_load, str(tmp_path / "checkpoint"))
    assert len(list((tmp_path / "checkpoint").glob("*.distcp"))) == N, "not every rank has written its part"


def save_while_training(path: str, own_group: bool) -> int:
    """In a rank: the checkpoint is what was there when async_save was called; the steps that ran beside it."""
    group = dist.new_group() if own_group else None
    module, optimizer = sharded()
    train(module, optimizer, range(3))
    expected = whole(module)
    saving = dcp.async_save(state_of(module, optimizer), checkpoint_id=path, process_group=group)
    steps = 0
    # All ranks stop at the same step: the one at which the last of them has saved.
    while True:
        train(module, optimizer, range(3 + steps, 4 + steps))
        steps += 1
        done = torch.tensor([int(saving.done() or steps > 5000)])
        dist.all_reduce(done, dist.ReduceOp.MIN)
        if done.item():
            break
    saving.result(timeout=30)
    assert not torch.equal(whole(module), expected), "the training did not go on"
    again, _ = load(path)
    assert torch.equal(whole(again), expected)
    return steps


def test_async_save_beside_training(ranks: Ranks, tmp_path: Path) -> None:
    steps = ranks.call(save_while_training, str(tmp_path / "own"), True)
    assert len(set(steps)) == 1
    assert 0 < steps[0] <= 5000


# ---------------------------------------------------------------- functional collectives


def collectives(x: torch.Tensor) -> list[torch.Tensor]:
    """Each traceable collective on a tensor of 4 rows."""
    group = dist.group.WORLD
    return [
        funcol.all_reduce(x * 2, "sum", group),
        funcol.all_reduce(x, "avg", group),
        funcol.all_reduce(x, "max", group),
        funcol.all_gather_single(x, 0, group),
        funcol.all_gather_single(x, 1, group),
        funcol.reduce_scatter_single(x, "sum", 0, group),
        funcol.all_to_all_single(x, None, None, group),
        funcol.broadcast(x, 1, group),
        *funcol.all_reduce_coalesced([x, x + 1], "sum", group),
    ]


def expected_collectives() -> list[torch.Tensor]:
    rank = dist.get_rank()
    a, b = (functional_input(r) for r in range(N))
    return [
        2 * (a + b),
        (a + b) / 2,
        torch.maximum(a, b),
        torch.cat([a, b]),
        torch.cat([a, b], 1),
        (a + b).chunk(N)[rank],
        torch.cat([part.chunk(N)[rank] for part in (a, b)]),
        b,
        a + b,
        a + b + 2,
    ]


def functional_input(rank: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))


def check_functional(backend: str) -> int:
    """In a rank: results as they should be; the number of graphs that were compiled."""
    x = functional_input(dist.get_rank())
    graphs = 0
    if backend == "eager":
        results = collectives(x)
    else:
        torch._dynamo.reset()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        results = torch.compile(collectives, backend=backend, fullgraph=True)(x)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    for index, (ours, theirs) in enumerate(zip(results, expected_collectives(), strict=True)):
        torch.testing.assert_close(torch.as_tensor(ours) + 0, theirs, msg=lambda m, i=index: f"collective {i}: {m}")
    return graphs


def test_functional_collectives(ranks: Ranks) -> None:
    ranks.call(check_functional, "eager")


def test_functional_collectives_traced(ranks: Ranks) -> None:
    assert ranks.call(check_functional, "aot_eager") == [1] * N


def test_functional_collectives_compiled(ranks: Ranks) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile's inductor needs a C++ compiler, and there is none")
    assert ranks.call(check_functional, "inductor", timeout_s=120.0) == [1] * N


# ---------------------------------------------------------------- torchrun

WORKER = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
import reducer

folder = Path(sys.argv[1])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
dist.init_process_group("reducer")
rank, n = dist.get_rank(), dist.get_world_size()
start = int((folder / "step").read_text()) if (folder / "step").exists() else 0
for step in range(start, 6):
    tensor = torch.full((1000,), float(rank + step))
    dist.all_reduce(tensor)
    assert torch.equal(tensor, torch.full((1000,), float(sum(r + step for r in range(n)))))
    if rank == 0:
        (folder / "step").write_text(str(step + 1))
    dist.barrier()
    if step == 2 and attempt == 0 and rank == 1:
        os._exit(7)
(folder / f"done-{rank}").write_text(f"{attempt} {start}")
dist.destroy_process_group()
"""


def test_torchrun_restarts(tmp_path: Path) -> None:
    """A worker dies once; torchrun starts both again, and they go on from their last step."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2", "--monitor-interval", "0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "exitcode: 7" in done.stderr or "exitcode  : 7" in done.stderr, done.stderr
    for rank in range(2):
        assert (tmp_path / f"done-{rank}").read_text() == "1 3"


# ---------------------------------------------------------------- TORCH_DISTRIBUTED_DEBUG=DETAIL


def detail() -> tuple[list[str], torch.Tensor]:
    """In a rank: errors of calls that do not match, then DDP's weights."""
    assert dist.get_debug_level() == dist.DebugLevel.DETAIL
    init_group("detail")
    rank = dist.get_rank()
    texts = []
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(torch.ones(10 + rank))
    texts.append(str(caught.value))
    with pytest.raises(RuntimeError) as caught:
        dist.barrier() if rank else dist.all_reduce(torch.ones(10))
    texts.append(str(caught.value))
    wrapped = DistributedDataParallel(model())
    train(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1), range(3))
    return texts, whole(wrapped)


def test_debug_level_detail_with_ddp_and_mismatches() -> None:
    with Ranks(N, {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, init=False) as fresh:
        fresh.call(dist.set_debug_level_from_env)
        results = fresh.call(detail)
    for rank, ((shapes, kinds), _) in enumerate(results):
        for text in (shapes, kinds):
            assert f"Detected mismatch between collectives on ranks. Rank {rank} is running" in text, text
        assert all(part in shapes for part in ("ALLREDUCE", "TensorShape=[10]", "TensorShape=[11]")), shapes
        # torch misreads the other rank's operation where one of the two has no tensor, on Gloo as well.
        assert f"OpType={'BARRIER' if rank else 'ALLREDUCE'}" in kinds, kinds
        assert "Op type: " in kinds, kinds
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], whole(model()))


# ---------------------------------------------------------------- several of them side by side


def check_second_group_in_a_thread() -> None:
    """A thread's collectives on a group of its own, while the main thread trains on the default one."""
    group = dist.new_group()
    failures: list[BaseException] = []

    def beside() -> None:
        try:
            for i in range(50):
                objects: list[Any] = [None] * N
                dist.all_gather_object(objects, {"rank": dist.get_rank(), "i": i}, group=group)
                assert objects == [{"rank": rank, "i": i} for rank in range(N)]
        except BaseException as error:  # for the main thread
            failures.append(error)

    thread = threading.Thread(target=beside)
    thread.start()
    module, optimizer = sharded()
    train(module, optimizer, range(10))
    thread.join(40)
    assert not thread.is_alive()
    assert not failures, failures


def test_objects_in_a_thread_beside_training(ranks: Ranks) -> None:
    ranks.call(check_second_group_in_a_thread)
