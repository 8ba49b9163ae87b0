"""PyTorch's own generic distributed suite, for a backend that it has never heard of.

The suite (`DistributedTest._DistTestBase`, in torch's wheel) reads the backend's name from the environment, once, while
it is imported: `load()` can therefore be called once in a process. What has to be bent, and why:

1. Decorators such as `BACKEND != "gloo"` skip a test by name. They are evaluated as if the backend were Gloo, so that
   whatever Gloo must pass on the CPU is also run here; what init_process_group gets is the true name. The tests of
   all_to_all run only for "mpi", in both of its forms: `seen_as` can say so, for Gloo too.
2. The lists of names that profile their collectives, and the sets of what a backend can do, get the name added:
   `backend_feature` has `plugin` for this.
3. `_test_accumulate_gradients_no_sync` chooses the CPU's model by name, and makes none for a name that it does not
   know: it alone sees "gloo" while it runs.
4. `dist.monitored_barrier` refuses every name but Gloo's, in Python, before the backend is asked: the same function
   without this refusal takes its place.
5. Ranks are forked and not spawned: importing torch anew in every rank of every test would take most of the time.

Of this, a backend that is built into torch needs the fifth only.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

BUILT_IN = ("gloo", "nccl", "ucc", "mpi")
# The mark that load() leaves on tests that skip themselves below 8 ranks.
_NEEDS_8 = "needs_8_ranks"


def load(backend: str, world_size: int, seen_as: str = "gloo") -> Any:
    """The suite's TestCase for `backend`, to be run by unittest. Every test makes its own ranks and group.

    `seen_as`: the name that decides which tests are skipped.
    """
    foreign = backend not in BUILT_IN
    os.environ.update(
        BACKEND=seen_as,
        WORLD_SIZE=str(world_size),
        INIT_METHOD="env://",
        OMP_NUM_THREADS="1",
    )
    import torch
    from torch.testing._internal import common_distributed

    torch.set_num_threads(1)
    # The only limit is the runner's, which can say where the ranks were.
    common_distributed.TIMEOUT_DEFAULT = 24 * 3600
    common_distributed.TIMEOUT_OVERRIDE.clear()
    _mark_tests_for_8(common_distributed)
    if foreign:
        importlib.import_module(backend)
        for feature in ("gpu", "cuda", "ddp", "subgroup", "plugin"):
            common_distributed.DistTestCases.backend_feature[feature].add(backend)
    from torch.testing._internal.distributed import distributed_test

    os.environ["BACKEND"] = distributed_test.BACKEND = backend
    if foreign:
        for names in (
            distributed_test.PROFILING_SUPPORTED_BACKENDS,
            distributed_test.CUDA_PROFILING_SUPPORTED_BACKENDS,
            distributed_test.SEND_RECV_PROFILING_SUPPORTED_BACKENDS,
        ):
            names.append(backend)
        _choose_the_cpu_model(distributed_test, backend)
        _open_monitored_barrier()

    class TorchSuite(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):
        def setUp(self) -> None:
            super().setUp()  # type: ignore[no-untyped-call]
            self._start_processes(torch.multiprocessing.get_context("fork").Process)

    return TorchSuite


def names_of(case: Any) -> list[str]:
    return sorted(name for name in dir(case) if name.startswith("test_"))


def needs_8_ranks(case: Any, name: str) -> bool:
    return bool(getattr(getattr(case, name), _NEEDS_8, False))


def skipped_at_once(case: Any, name: str) -> str:
    """Why unittest would skip the test without starting ranks; "" if it would not."""
    test = getattr(case, name)
    return str(getattr(test, "__unittest_skip_why__", "")) if getattr(test, "__unittest_skip__", False) else ""


def _mark_tests_for_8(common_distributed: Any) -> None:
    decorate = common_distributed.skip_if_small_worldsize

    def decorate_and_mark(function: Any) -> Any:
        decorated = decorate(function)
        setattr(decorated, _NEEDS_8, True)
        return decorated

    common_distributed.skip_if_small_worldsize = decorate_and_mark


def _choose_the_cpu_model(distributed_test: Any, backend: str) -> None:
    base = distributed_test.DistributedTest._DistTestBase
    helper = base._test_accumulate_gradients_no_sync

    def as_gloo(self: Any, *arguments: Any, **named: Any) -> Any:
        distributed_test.BACKEND = "gloo"
        try:
            return helper(self, *arguments, **named)
        finally:
            distributed_test.BACKEND = backend

    base._test_accumulate_gradients_no_sync = as_gloo


def _open_monitored_barrier() -> None:
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    def monitored_barrier(
        group: Any = dist.GroupMember.WORLD, timeout: Any = None, wait_all_ranks: bool = False
    ) -> None:
        if distributed_c10d._rank_not_in_group(group):
            return
        if timeout is None:
            timeout = distributed_c10d._get_default_timeout(dist.get_backend(group))
        elif isinstance(timeout, float):
            timeout = timedelta(seconds=timeout)
        chosen: Any = distributed_c10d._get_default_group() if group is None else group
        chosen.monitored_barrier(timeout, wait_all_ranks=wait_all_ranks)

    for module in (dist, distributed_c10d):
        module.monitored_barrier = monitored_barrier  # type: ignore[attr-defined]
