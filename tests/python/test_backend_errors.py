"""What goes wrong is said on every rank, soon, with names, and nothing else breaks."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from control_client import PROTOCOL_VERSION
from fake_reducer import FakeReducer
from ranks import Ranks, init_group, standalone_reducers
from servers import serving

import reducer

Op = dist.ReduceOp
N = 3


@pytest.fixture(scope="module", params=["local", "direct", "server", "mixed", "ring"])
def ranks(request: pytest.FixtureRequest, module_reducers: Callable[..., list[str]]) -> Iterator[Ranks]:
    count = {"server": 2, "mixed": 1}.get(request.param, 0)
    env = {"REDUCER_ALGORITHM": request.param, "REDUCER_SERVERS": ",".join(module_reducers(count))}
    with Ranks(N, env) as all_ranks:
        yield all_ranks


@pytest.fixture(scope="module")
def plain() -> Iterator[Ranks]:
    with Ranks(2) as all_ranks:
        yield all_ranks


def group() -> Any:
    return dist.distributed_c10d._get_default_group()


# ---------------------------------------------------------------- ranks that disagree

# What all ranks but the last call, what the last one calls, and what the text must name.
MISMATCHES: dict[str, tuple[str, str, list[str]]] = {
    "count": ("all_reduce 1000", "all_reduce 10", ["1000 elements", "10 elements"]),
    "large count": ("all_reduce 200000", "all_reduce 10", ["200000 elements", "10 elements"]),
    "dtype": ("all_reduce 10", "all_reduce_int 10", ["float32", "int32"]),
    "operation": ("all_reduce 10", "all_reduce_max 10", ["sum", "max"]),
    "root": ("broadcast 10 0", "broadcast 10 1", ["root 0", "root 1"]),
    "collective": ("all_reduce 10", "broadcast 10 0", ["all_reduce", "broadcast"]),
    "gather and all_gather": ("all_gather 10", "all_reduce 10", ["all_gather", "all_reduce"]),
    "barrier": ("barrier", "all_reduce 10", ["barrier", "all_reduce"]),
}


def perform(call: str) -> torch.Tensor:
    name, *numbers = call.split()
    count = int(numbers[0]) if numbers else 0
    tensor = torch.full((count,), 3, dtype=torch.int32 if name.endswith("int") else torch.float32)
    if name == "broadcast":
        dist.broadcast(tensor, int(numbers[1]))
    elif name == "all_gather":
        dist.all_gather([torch.empty_like(tensor) for _ in range(dist.get_world_size())], tensor)
    elif name == "barrier":
        dist.barrier()
    else:
        dist.all_reduce(tensor, Op.MAX if name.endswith("max") else Op.SUM)
    return tensor


def disagree(most: str, last: str) -> tuple[str, float]:
    """In a rank: the error of a call that the ranks do not agree on, and how long it took; then a call that works."""
    n, rank = dist.get_world_size(), dist.get_rank()
    began = time.monotonic()
    with pytest.raises(dist.DistBackendError) as caught:
        perform(last if rank == n - 1 else most)
    took = time.monotonic() - began
    for count in (5, 50_000):
        tensor = torch.ones(count)
        dist.all_reduce(tensor)
        assert torch.equal(tensor, torch.full((count,), float(n))), "the group does not work any more"
    return str(caught.value), took


@pytest.mark.parametrize("kind", list(MISMATCHES))
def test_mismatch(ranks: Ranks, kind: str) -> None:
    most, last, names = MISMATCHES[kind]
    results = ranks.call(disagree, most, last)
    texts = [text for text, _ in results]
    for rank, (text, took) in enumerate(results):
        assert text.startswith(f"[rank {rank}, group default] ")
        assert all(name in text for name in names), text
        assert all(re.search(rf"rank {r} \(", text) for r in range(N)), text
        assert took < 10
    assert len({text.split("]", 1)[1] for text in texts}) == 1, "the ranks got different texts"


def disagree_again(times: int, count: int) -> str:
    """In a rank: large calls that differ, one after another with large calls that work; the last error."""
    n, rank = dist.get_world_size(), dist.get_rank()
    text = ""
    for i in range(times):
        odd = rank == n - 1
        tensor = torch.ones(count + (i % 2 if odd else 0))
        work = dist.all_reduce(tensor, Op.MAX if odd else Op.SUM, async_op=True)
        assert work is not None
        with pytest.raises(dist.DistBackendError, match="ranks made different calls") as caught:
            work.wait()
        text = str(caught.value)
        # At once, while what was under way of the failed call still arrives.
        tensor = torch.ones(count)
        dist.all_reduce(tensor)
        assert torch.equal(tensor, torch.full((count,), float(n)))
    return text


def test_many_mismatches_of_large_tensors(ranks: Ranks) -> None:
    """What a failed call had under way must not count twice against the window."""
    for text in ranks.call(disagree_again, 20, 2_000_000):
        assert f"rank {N - 1} (" in text


def keep_input(same_count: bool) -> None:
    """In a rank: a call that fails leaves its tensor as it was. The last rank comes when the others are at work."""
    n, rank = dist.get_world_size(), dist.get_rank()
    odd = rank == n - 1
    before = torch.arange(300_000 + (odd and not same_count), dtype=torch.float32) + rank
    tensor = before.clone()
    dist.barrier()
    if odd:
        time.sleep(0.1)
    with pytest.raises(dist.DistBackendError, match="ranks made different calls"):
        dist.all_reduce(tensor, Op.MAX if odd and same_count else Op.SUM)
    assert torch.equal(tensor, before)
    # Nothing arrives later, either.
    dist.barrier()
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("same_count", [True, False], ids=["other operation", "other count"])
def test_inputs_stay_as_they_were(ranks: Ranks, same_count: bool) -> None:
    ranks.call(keep_input, same_count)


# ---------------------------------------------------------------- ranks that do not come


def stay_away(timeout_s: float) -> str:
    """In a rank: the last one does not come to a collective of a group with a short timeout."""
    short = dist.new_group(timeout=timedelta(seconds=timeout_s))
    text = ""
    if dist.get_rank() != dist.get_world_size() - 1:
        began = time.monotonic()
        with pytest.raises(dist.DistBackendError) as caught:
            dist.all_reduce(torch.ones(10), group=short)
        text = str(caught.value)
        assert timeout_s * 0.9 <= time.monotonic() - began < timeout_s + 5
    dist.barrier()
    return text


def test_timeout_names_the_missing_rank(ranks: Ranks) -> None:
    texts = ranks.call(stay_away, 1.0)
    for rank, text in enumerate(texts[:-1]):
        assert text.startswith(f"[rank {rank}, ")
        assert f"rank {N - 1}" in text
        assert "all_reduce(sum, float32, 10 elements)" in text


def wait_for_death() -> str:
    with pytest.raises(dist.DistBackendError) as caught:
        for _ in range(1000):
            dist.all_reduce(torch.ones(10))
    return str(caught.value)


@pytest.mark.parametrize(("algorithm", "servers"), [("local", 0), ("direct", 0), ("mixed", 1)])
def test_a_rank_that_dies_is_named(algorithm: str, servers: int) -> None:
    with standalone_reducers(servers) as addresses:
        fresh = Ranks(3, {"REDUCER_ALGORITHM": algorithm, "REDUCER_SERVERS": ",".join(addresses)})
        try:
            fresh.call(dist.barrier)
            fresh.kill_rank(2)
            began = time.monotonic()
            texts = fresh.call(wait_for_death, only=[0, 1])
            assert time.monotonic() - began < 15
        finally:
            fresh.kill()
    for text in texts:
        assert "rank 2" in text, text


def make_group_error(pg_options: dict[str, Any] | None = None) -> tuple[str, str, float]:
    """In a rank: the error of making a group, its kind, and how long that took."""
    began = time.monotonic()
    options = reducer.Options(**pg_options) if pg_options is not None else None
    with pytest.raises(Exception) as caught:  # noqa: PT011: the parent looks at it
        init_group(pg_options=options)
    names = " ".join(kind.__name__ for kind in type(caught.value).__mro__)
    return str(caught.value), names, time.monotonic() - began


def test_a_rank_that_does_not_come_to_make_the_group() -> None:
    with Ranks(3, init=False, group_timeout_s=2.0) as fresh:
        results = fresh.call(make_group_error, only=[0, 1])
    for text, kinds, took in results:
        assert "rank 2 of 3 did not come within 2 s" in text
        assert "TimeoutError" in kinds
        assert took < 15


def without_shared_memory(settings: dict[str, str]) -> tuple[str, str]:
    """In a rank: no file may grow, and so there is no memory to share; what a sum says, and what did it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    os.environ.update(settings)
    init_group()
    tensor = torch.ones(1000)
    try:
        dist.all_reduce(tensor)
        dist.all_reduce(tensor)
    except dist.DistBackendError as error:
        return str(error), ""
    assert torch.equal(tensor, torch.full((1000,), 4.0))
    # The calls that waited for shared memory have gone to the network; that all others will is said a moment later.
    deadline = time.monotonic() + 10
    while (algorithm := str(group()._get_backend(torch.device("cpu")).algorithm)) == "local":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return "", algorithm


def test_without_shared_memory_the_network_does_it_and_one_rank_says_so() -> None:
    with Ranks(2, init=False) as fresh:
        assert fresh.call(without_shared_memory, {}) == [("", "direct")] * 2
        logs = fresh.logs()
    assert logs.count("cannot share memory") == 1, logs
    assert "File too large" in logs


def test_without_shared_memory_shm_is_an_error() -> None:
    with Ranks(2, init=False) as fresh:
        for text, _ in fresh.call(without_shared_memory, {"REDUCER_TRANSPORT": "shm"}):
            assert "REDUCER_TRANSPORT is 'shm', and the ranks of this host cannot share memory" in text


# ---------------------------------------------------------------- settings

MALFORMED: dict[str, tuple[dict[str, str], str]] = {
    "no port": ({"REDUCER_SERVERS": "localhost:7000,myhost"}, "REDUCER_SERVERS: 'myhost' has no port; write host:port"),
    "bad port": ({"REDUCER_SERVERS": "a:7x"}, "REDUCER_SERVERS: 'a:7x' has the port '7x'"),
    "empty item": ({"REDUCER_SERVERS": "a:1,,b:2"}, "REDUCER_SERVERS: item 2 is empty"),
    "twice": ({"REDUCER_SERVERS": "a:1,a:1"}, "REDUCER_SERVERS: 'a:1' stands there twice"),
    "algorithm": ({"REDUCER_ALGORITHM": "tree"}, "REDUCER_ALGORITHM: 'tree' is no algorithm; there are auto, direct"),
    "size": ({"REDUCER_CHUNK_BYTES": "4 potatoes"}, "REDUCER_CHUNK_BYTES: '4 potatoes' is no size"),
    "chunk too small": ({"REDUCER_CHUNK_BYTES": "100"}, "REDUCER_CHUNK_BYTES: 100 is outside of 4KiB to 16MiB"),
    "transport": (
        {"REDUCER_TRANSPORT": "pigeon"},
        "REDUCER_TRANSPORT: 'pigeon' is no transport; there are auto, grpc, tcp, shm",
    ),
    "seconds": ({"REDUCER_CONNECT_TIMEOUT": "soon"}, "REDUCER_CONNECT_TIMEOUT: 'soon' is no number of seconds"),
    "switch": ({"REDUCER_CHECKSUM": "perhaps"}, "REDUCER_CHECKSUM: 'perhaps' is neither on nor off"),
    "log": ({"REDUCER_LOG": "loud"}, "REDUCER_LOG: 'loud' is not among"),
    "interface": ({"REDUCER_INTERFACE": "nosuch0"}, "REDUCER_INTERFACE: "),
    "range without end": (
        {"REDUCER_ALGORITHM": "0-64KiB:direct"},
        "REDUCER_ALGORITHM: no algorithm is given from 64KiB on; end with a range like 64KiB-:direct",
    ),
    "ranges with a gap": (
        {"REDUCER_ALGORITHM": "0-64KiB:direct,1MiB-:mixed"},
        "REDUCER_ALGORITHM: no algorithm is given for 64KiB-1MiB, before '1MiB-:mixed'",
    ),
    "ranges that overlap": (
        {"REDUCER_ALGORITHM": "0-2MiB:direct,1MiB-:mixed"},
        "REDUCER_ALGORITHM: '0-2MiB:direct' and '1MiB-:mixed' overlap",
    ),
    "range of an unknown algorithm": (
        {"REDUCER_ALGORITHM": "0-64KiB:direct,64KiB-:tree"},
        "REDUCER_ALGORITHM: in '64KiB-:tree': 'tree' is no algorithm; there are auto, direct",
    ),
    "range of server without servers": (
        {"REDUCER_ALGORITHM": "0-64KiB:direct,64KiB-:server"},
        "REDUCER_ALGORITHM: '64KiB-:server' needs standalone reducers, and REDUCER_SERVERS is empty",
    ),
    "bandwidth": ({"REDUCER_BANDWIDTH": "10"}, "REDUCER_BANDWIDTH: '10' is no bandwidth; write it as in 10gbit"),
    "bandwidth of a server": (
        {"REDUCER_SERVERS": "a:1@10gbit,b:2@fast"},
        "REDUCER_SERVERS: 'b:2@fast': 'fast' is no bandwidth",
    ),
    "bandwidth of some servers": (
        {"REDUCER_SERVERS": "a:1@10gbit,b:2"},
        "REDUCER_SERVERS: 'b:2' has no bandwidth and others have; write b:2@10gbit, or none",
    ),
    "local over the network": (
        {"REDUCER_ALGORITHM": "local", "REDUCER_TRANSPORT": "grpc"},
        "the algorithm 'local' is shared memory, and REDUCER_TRANSPORT is 'grpc'",
    ),
    "server without servers": ({"REDUCER_ALGORITHM": "server"}, "'server' needs standalone reducers"),
}


@pytest.mark.parametrize("kind", list(MALFORMED))
def test_malformed_settings(kind: str) -> None:
    env, expected = MALFORMED[kind]
    # On one rank only, the first or the last in turn: the others must not wait for it until the timeout.
    wrong = len(kind) % 2
    environments = [env if rank == wrong else {} for rank in range(2)]
    with Ranks(2, environments, init=False) as fresh:
        results = fresh.call(make_group_error)
    for text, kinds, took in results:
        assert expected in text, text
        assert "ValueError" in kinds
        assert took < 10
    assert f"rank {wrong} (" in results[1 - wrong][0], "the other rank does not say whose setting is wrong"


def test_malformed_option_names_the_option() -> None:
    with Ranks(2, init=False) as fresh:
        results = fresh.call(make_group_error, {"window_bytes": "wide"})
        for text, kinds, _ in results:
            assert "reducer.Options(window_bytes): 'wide' is no size" in text
            assert "ValueError" in kinds
        # The failed attempt leaves nothing behind that a second one would stumble over.
        fresh.call(init_group)
        fresh.call(dist.barrier)


def test_settings_that_differ() -> None:
    environments = [{"REDUCER_ALGORITHM": "direct"}, {"REDUCER_ALGORITHM": "ring"}, {"REDUCER_ALGORITHM": "direct"}]
    environments[1]["REDUCER_CHUNK_BYTES"] = "64KiB"
    with Ranks(3, environments, init=False) as fresh:
        results = fresh.call(make_group_error)
    for rank, (text, kinds, took) in enumerate(results):
        assert text.startswith(f"[rank {rank}, group default] the group is set up differently on its ranks: ")
        assert re.search(r"REDUCER_ALGORITHM is 'direct' on ranks 0 \(\S+\), 2 \(\S+\) and 'ring' on rank 1 \(", text)
        assert re.search(r"REDUCER_CHUNK_BYTES is '0' on ranks 0 .* and '65536' on rank 1 ", text)
        assert "ValueError" in kinds
        assert took < 10


def test_options_go_before_the_environment() -> None:
    with Ranks(1, {"REDUCER_ALGORITHM": "nonsense"}, init=False) as fresh:
        assert fresh.call(algorithm_with_option, "ring") == ["ring"]


def test_algorithms_by_size_as_an_option() -> None:
    with Ranks(1, {"REDUCER_ALGORITHM": "nonsense"}, init=False) as fresh:
        given, written = "1MiB-:ring, 0-1024KiB:direct", "0-1MiB:direct,1MiB-:ring"
        assert fresh.call(algorithm_with_option, given) == [written]


def algorithm_with_option(algorithm: str) -> str:
    init_group(pg_options=reducer.Options(algorithm=algorithm))
    name: str = group()._get_backend(torch.device("cpu")).algorithm
    return name


def wrong_options() -> None:
    with pytest.raises(ValueError, match=r"pg_options is a dict; the backend 'reducer' takes reducer\.Options"):
        init_group(pg_options={"algorithm": "ring"})


def test_options_of_another_type() -> None:
    with Ranks(1, init=False) as fresh:
        fresh.call(wrong_options)


# ---------------------------------------------------------------- reducers that do not answer


def first_collective() -> tuple[str, float]:
    init_group()
    began = time.monotonic()
    with pytest.raises(dist.DistBackendError) as caught:
        dist.all_reduce(torch.ones(100_000))
    return str(caught.value), time.monotonic() - began


def test_unreachable_reducer_names_the_address() -> None:
    # Bound and not listening: nobody else can take the port while the test runs.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        env = {"REDUCER_SERVERS": address, "REDUCER_CONNECT_TIMEOUT": "1", "REDUCER_ALGORITHM": "server"}
        with Ranks(2, env, init=False) as fresh:
            results = fresh.call(first_collective)
    for rank, (text, took) in enumerate(results):
        assert text.startswith(f"[rank {rank}, group default] ")
        assert address in text, text
        assert took < 15


def sum_of_ones() -> float:
    """In a rank: makes the group and gets a sum over all ranks."""
    init_group()
    tensor = torch.ones(100_000)
    dist.all_reduce(tensor)
    return tensor.sum().item()


def test_reducers_that_start_after_the_workers() -> None:
    late_s = 2.0
    with contextlib.ExitStack() as stack:
        # Bound and not listening: nobody else takes the ports, and a reducer, which reuses addresses as this does, may.
        ports = [stack.enter_context(socket.socket()) for _ in range(2)]
        for port in ports:
            port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{port.getsockname()[1]}" for port in ports]
        fresh = stack.enter_context(
            Ranks(2, {"REDUCER_SERVERS": ",".join(addresses), "REDUCER_ALGORITHM": "server"}, init=False)
        )
        pool = stack.enter_context(ThreadPoolExecutor(1))
        sums = pool.submit(fresh.call, sum_of_ones, timeout_s=30.0)
        with pytest.raises(FutureTimeoutError):
            sums.result(late_s)
        for address in addresses:
            stack.enter_context(serving(listen=address))
        assert sums.result(40) == [200_000.0] * 2
        # A reducer ends sooner without workers.
        fresh.end()


def test_a_reducer_of_another_version_is_named_on_every_rank() -> None:
    with FakeReducer(protocol_version=PROTOCOL_VERSION + 1) as fake:
        env = {"REDUCER_SERVERS": fake.address, "REDUCER_ALGORITHM": "server"}
        with Ranks(3, env, init=False) as fresh:
            results = fresh.call(first_collective)
    for rank, (text, took) in enumerate(results):
        assert text.startswith(f"[rank {rank}, group default] ")
        assert f"this reducer (fake-host:1) speaks protocol version {PROTOCOL_VERSION + 1}" in text, text
        assert f"the worker speaks {PROTOCOL_VERSION}" in text, text
        assert took < 10
    assert sorted(fake.ranks_seen) == [0, 1, 2]


def collective_error() -> str:
    with pytest.raises(dist.DistBackendError) as caught:
        dist.all_reduce(torch.ones(100_000))
    return str(caught.value)


def test_reducer_over_its_memory_limit() -> None:
    with standalone_reducers(1, "--memory-limit", "64KiB") as addresses:
        env = {"REDUCER_SERVERS": addresses[0], "REDUCER_ALGORITHM": "server"}
        with Ranks(2, env) as fresh:
            texts = fresh.call(collective_error)
    for text in texts:
        assert "memory" in text, text
        assert "limit" in text, text


def test_names_that_do_not_exist() -> None:
    with Ranks(2, {"REDUCER_SERVERS": "no-such-host.invalid:7000"}, init=False) as fresh:
        results = fresh.call(make_group_error)
    for text, _, _ in results:
        assert "REDUCER_SERVERS" in text
        assert "no-such-host.invalid" in text


# ---------------------------------------------------------------- arguments


def check_arguments() -> None:
    n = dist.get_world_size()
    pg = group()
    options = dist.AllreduceOptions()

    with pytest.raises(ValueError, match=r"all_reduce: tensors is a list of 2 tensors, exactly one is needed"):
        pg.allreduce([torch.ones(1), torch.ones(1)], options)
    for dtype in (torch.float8_e8m0fnu, torch.complex32):
        with pytest.raises(TypeError, match=r"all_reduce: nothing can be computed in the dtype .*; it can only be"):
            pg.allreduce([torch.empty(3, dtype=dtype)], options)
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with pytest.raises((TypeError, NotImplementedError), match="(?i)quantized"):  # torch itself says it
        dist.broadcast(quantized, 0)
    for op in (Op.BAND, Op.BOR, Op.BXOR):
        with pytest.raises(TypeError, match=r"the operation 'b\w+' has no meaning on the dtype float32"):
            dist.all_reduce(torch.ones(3), op)
    options.reduceOp = Op.MAX
    with pytest.raises(TypeError, match=r"the operation 'max' has no meaning on the dtype complex64"):
        pg.allreduce([torch.ones(3, dtype=torch.complex64)], options)
    with pytest.raises(TypeError, match="PREMUL_SUM wants floating-point or complex tensors, not Int"):
        dist.all_reduce(torch.ones(3, dtype=torch.int32), dist._make_nccl_premul_sum(2.0))
    with pytest.raises(ValueError, match="only SUM is supported on sparse tensors"):
        dist.all_reduce(torch.eye(3).to_sparse(), Op.MAX)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        dist.all_reduce(torch.ones(1).expand(4))
    with pytest.raises((TypeError, NotImplementedError), match="(?i)sparse"):
        dist.broadcast(torch.eye(3).to_sparse(), 0)

    broadcast = dist.BroadcastOptions()
    broadcast.rootRank = n
    with pytest.raises(ValueError, match=rf"broadcast: root is {n}, the ranks of this group are 0 to {n - 1}"):
        pg.broadcast([torch.ones(1)], broadcast)
    with pytest.raises(ValueError, match=r"all_gather: outputs has 1 tensors, one for each of the 2 ranks is needed"):
        dist.all_gather([torch.ones(1)], torch.ones(1))
    with pytest.raises(ValueError, match=r"all_gather: outputs\[\d\] has 2 elements, 3 are needed"):
        dist.all_gather([torch.ones(2) for _ in range(n)], torch.ones(3))
    with pytest.raises(ValueError, match=r"all_gather_into_tensor: output has 5 elements, 6 are needed"):
        pg._allgather_base(torch.ones(5), torch.ones(3))
    with pytest.raises(TypeError, match=r"output has the dtype int64, the other tensors have float32"):
        pg._allgather_base(torch.ones(6, dtype=torch.int64), torch.ones(3))
    with pytest.raises(ValueError, match=r"reduce_scatter_tensor: input has 5 elements, 6 are needed"):
        pg._reduce_scatter_base(torch.ones(3), torch.ones(5))
    with pytest.raises(ValueError, match=r"input has 3 rows, which cannot be split equally over 2 ranks"):
        dist.all_to_all_single(torch.ones(4), torch.ones(3))
    with pytest.raises(ValueError, match=r"input has 3 rows, but its split sizes add up to 4"):
        dist.all_to_all_single(torch.ones(4), torch.ones(3), [2, 2], [2, 2])
    with pytest.raises(ValueError, match=r"send: tag is -1, it must not be negative"):
        dist.send(torch.ones(1), (dist.get_rank() + 1) % n, tag=-1)

    # None of these calls has used up a number: the ranks still agree.
    tensor = torch.ones(4)
    dist.all_reduce(tensor)
    assert torch.equal(tensor, torch.full((4,), float(n)))


def test_arguments(plain: Ranks) -> None:
    plain.call(check_arguments)


def failing_future() -> str:
    """In a rank: a future carries the same error as wait()."""
    work = dist.all_reduce(torch.ones(10 + dist.get_rank()), async_op=True)
    assert work is not None
    future = work.get_future().then(lambda done: done.value())
    with pytest.raises(RuntimeError) as caught:
        future.wait()
    with pytest.raises(dist.DistBackendError):
        work.wait()
    assert not work.is_success()
    return str(caught.value)


def test_futures_carry_errors(plain: Ranks) -> None:
    for text in plain.call(failing_future):
        assert "10 elements" in text
        assert "11 elements" in text
