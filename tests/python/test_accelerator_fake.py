"""The fake accelerator is late, hides its memory, and poisons what is free: a bug in a backend cannot pass by luck."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Iterator

import accelerator
import pytest
import torch
from accelerator.worlds import stays_busy
from ranks import RankFailure, Ranks

COUNT = 1000


@pytest.fixture(scope="module")
def process() -> Iterator[Ranks]:
    """A process of its own: a device cannot be unloaded."""
    accelerator.build()
    with Ranks(1, init=False) as ranks:
        ranks.call(accelerator.load)
        yield ranks


def numbers(device: str = "cpu") -> torch.Tensor:
    return torch.arange(COUNT, dtype=torch.float32).to(device)


def is_poison(tensor: torch.Tensor) -> bool:
    return bool(tensor.cpu().isnan().all())


def check_launches_return_at_once() -> None:
    x = numbers("fake")
    with torch.fake.slow(50):
        begin = time.monotonic()
        y = (x + 1) * 2
        launched_s = time.monotonic() - begin
        assert not torch.fake.current_stream().query()
        torch.fake.synchronize()
        ended_s = time.monotonic() - begin
    assert launched_s < 0.1 <= ended_s
    assert torch.equal(y.cpu(), (numbers() + 1) * 2)


def check_kernels_promote_as_on_the_host() -> None:
    for host in (torch.arange(5), torch.arange(5) > 2, torch.ones(5, dtype=torch.float16)):
        for other in (2, 2.5, torch.tensor(3.0, dtype=torch.float64), torch.ones(5, dtype=torch.int32)):
            there = other.to("fake") if isinstance(other, torch.Tensor) and other.dim() else other
            for got, expected in ((host.to("fake") + there, host + other), (host.to("fake") * there, host * other)):
                assert got.dtype == expected.dtype
                assert torch.equal(got.cpu(), expected)
    assert torch.equal((torch.arange(5).to("fake") - 1).cpu(), torch.arange(5) - 1)


def check_pinned_copies_are_late() -> None:
    host = numbers().pin_memory()
    assert host.is_pinned()
    assert not numbers().is_pinned()
    with torch.fake.gate() as gate:
        there = host.to("fake", non_blocking=True)
        back = torch.zeros(COUNT, pin_memory=True)
        back.copy_(there, non_blocking=True)
        host.fill_(7)
        assert not back.any()
        gate.open()
        torch.fake.synchronize()
    assert bool((back == 7).all())


def check_blocking_and_pageable_copies_wait() -> None:
    for host, non_blocking in ((numbers(), True), (numbers().pin_memory(), False)):
        with torch.fake.slow(30):
            begin = time.monotonic()
            there = host.to("fake", non_blocking=non_blocking)
            host.fill_(7)
            back = torch.empty(COUNT, pin_memory=not non_blocking)
            back.copy_(there, non_blocking=non_blocking)
            assert torch.equal(back, numbers())
            assert time.monotonic() - begin >= 0.06


def check_an_event_orders_two_streams() -> None:
    one, other = torch.Stream("fake"), torch.Stream("fake")
    assert one != other
    for ordered in (True, False):
        event = torch.Event("fake")
        with torch.fake.stream(one), torch.fake.gate() as gate:
            x = torch.full((COUNT,), 3.0, device="fake")
            event.record()
            assert not event.query()
            with torch.fake.stream(other):
                if ordered:
                    event.wait()
                y = x + 1
                x.record_stream(other)
                if ordered:
                    assert stays_busy(other)
                else:
                    other.synchronize()
            gate.open()
            event.synchronize()
            assert event.query()
        other.synchronize()
        assert is_poison(y) != ordered
        if ordered:
            assert bool((y.cpu() == 4).all())


def check_an_event_is_what_was_recorded_when_it_was_waited_for() -> None:
    event, other = torch.Event("fake"), torch.Stream("fake")
    event.record()
    other.wait_event(event)
    with torch.fake.gate() as gate:
        event.record()
        other.synchronize()
        assert not event.query()
        gate.open()
        event.synchronize()


def check_streams_belong_to_threads_and_devices() -> None:
    default = torch.fake.current_stream()
    assert default == torch.fake.current_stream("fake:0") != torch.fake.current_stream("fake:1")
    stream = torch.Stream("fake:1")
    with torch.fake.stream(stream):
        assert torch.fake.current_stream("fake:1") == stream
        assert torch.fake.current_stream("fake:0") == default
    assert torch.fake.current_stream("fake:1") != stream
    with stream:
        assert torch.fake.current_stream() == stream
    assert torch.fake.current_stream() == default


def check_freed_memory_is_poisoned_unless_recorded() -> None:
    side = torch.Stream("fake")
    for recorded in (True, False):
        x = numbers("fake")
        address = x.data_ptr()
        with torch.fake.stream(side), torch.fake.gate() as gate:
            y = x + 0
            if recorded:
                x.record_stream(side)
            before = torch.fake.device_bytes()
            del x
            assert (torch.fake.device_bytes() == before) == recorded
            again = torch.empty(COUNT, device="fake")
            assert recorded == (again.data_ptr() != address)
            gate.open()
        side.synchronize()
        assert is_poison(y) != recorded
        if recorded:
            assert torch.equal(y.cpu(), numbers())


def check_memory_follows_its_own_stream_without_being_recorded() -> None:
    with torch.fake.gate() as gate:
        x = torch.full((COUNT,), 2.0, device="fake")
        y = x + 1
        del x
        gate.open()
    assert bool((y.cpu() == 3).all())


def check_pinned_memory_outlives_its_copies() -> None:
    host = numbers().pin_memory()
    with torch.fake.gate() as gate:
        there = host.to("fake", non_blocking=True)
        before = torch.fake.pinned_bytes()
        del host
        assert torch.fake.pinned_bytes() == before
        gate.open()
    assert torch.equal(there.cpu(), numbers())
    assert torch.fake.pinned_bytes() < before


def check_new_memory_is_poison() -> None:
    assert is_poison(torch.empty(12345, device="fake"))
    assert bool(torch.empty(12345, pin_memory=True).isnan().all())
    assert bool((torch.empty(12345, dtype=torch.int64, device="fake").cpu() == -1).all())


def check_devices_wait_for_each_other_in_a_copy() -> None:
    with torch.fake.gate() as gate:
        x = torch.full((COUNT,), 2.0, device="fake:0")
        y = x.to("fake:1")
        assert y.device == torch.device("fake:1")
        assert stays_busy(torch.fake.current_stream("fake:1"))
        z = y + 1
        gate.open()
    assert bool((z.cpu() == 3).all())
    with pytest.raises(RuntimeError, match="an operand is on the device fake:0, the result on fake:1"):
        y.add_(x)
    with pytest.raises(RuntimeError, match="there is no device fake:2"):
        torch.empty(1, device="fake:2")


def check_uploads_are_held_and_copies_remembered() -> None:
    torch.fake.synchronize()
    torch.fake.take_copies()
    torch.fake.reset_pinned_bytes_max()
    begin = torch.fake.pinned_bytes_max()
    host = numbers().pin_memory()
    with torch.fake.uploads_held():
        there = host.to("fake", non_blocking=True)
        assert torch.fake.take_copies() == []
        assert stays_busy(torch.fake.current_stream())
    there.cpu()
    assert [(copy.upload, copy.pinned, copy.nbytes) for copy in torch.fake.take_copies()] == [
        (True, True, 4 * COUNT),
        (False, False, 4 * COUNT),
    ]
    assert torch.fake.pinned_bytes_max() >= begin + 4 * COUNT


def check_a_future_gives_its_callback_a_stream_that_waits() -> None:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[torch.device("fake:0")])
    streams = []

    def callback(done: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
        streams.append(torch.fake.current_stream())
        return done.value() + 1

    after = future.then(callback)
    with torch.fake.gate() as gate:
        future.set_result(torch.full((COUNT,), 2.0, device="fake"))
        result = after.wait()
        assert streams[0] != torch.fake.current_stream()
        assert stays_busy(streams[0])
        gate.open()
    assert bool((result.cpu() == 3).all())


def check_every_layout_and_dtype_travels() -> None:
    for dtype in (torch.float16, torch.int64, torch.bool, torch.complex64):
        host = (torch.arange(24) % 5).to(dtype).reshape(4, 6)
        if dtype == torch.complex64:
            host = host * (1 + 2j)
        there = host.to("fake")
        for view in (there.t(), there[1:3, ::2], there[0, 0], there.expand(2, 4, 6), there.conj()):
            same = torch.as_strided(host, view.size(), view.stride(), view.storage_offset())
            same = same.conj() if view.is_conj() else same
            assert torch.equal(view.cpu(), same)
            assert torch.equal(view.contiguous().cpu(), same)
    torch.view_as_real(there)[..., 1] = 0  # of complex64, the last of them
    assert not there.cpu().imag.any()
    there.t().copy_(torch.ones(6, 4))
    assert bool((there.cpu() == 1).all())
    shrunk = numbers("fake")
    shrunk.resize_(2 * COUNT)
    assert torch.equal(shrunk[:COUNT].cpu(), numbers())
    assert is_poison(shrunk[COUNT:])


def check_operations_without_a_kernel_and_autograd() -> None:
    torch.manual_seed(3)
    layer = torch.nn.Linear(6, 3)
    x = torch.randn(5, 6)
    layer(x).square().sum().backward()
    expected = [parameter.grad for parameter in layer.parameters()]
    layer = layer.to("fake")
    layer.zero_grad()  # to None
    layer(x.to("fake")).square().sum().backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.device.type == "fake"
        torch.testing.assert_close(parameter.grad.cpu(), gradient)
    assert "device='fake:0'" in repr(x.to("fake"))


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_fake(process: Ranks, check: object) -> None:
    assert callable(check)
    process.call(check)


def read_device_memory() -> None:
    accelerator.load()
    x = numbers("fake")
    # The kernel refuses before it crashes: so does a socket.
    libc = ctypes.CDLL(None, use_errno=True)
    read_end, write_end = os.pipe()
    assert libc.write(write_end, ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(4)) == -1
    assert ctypes.get_errno() == errno.EFAULT
    os.close(read_end)
    os.close(write_end)
    ctypes.string_at(x.data_ptr(), 4)


def test_host_code_that_reads_device_memory_dies() -> None:
    accelerator.build()
    with (
        pytest.raises(RankFailure, match=r"(?s)exit code -11.*host code touched device memory"),
        Ranks(1, init=False) as process,
    ):
        process.call(read_device_memory)
