"""A rank of the reliability benchmarks: `reducer bench`'s, and with it the loops of chaos, recovery and soak.

Times that it tells are of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
import torch.distributed as dist
from reliability_calls import draw_calls, start
from reliability_values import Samples, same_bits, scale_of

from reducer._bench import rank as bench

Message = dict[str, Any]

_SMALL_COUNT = 16
# Small all-reduces of a soak that are under way together.
_UNDER_WAY = 64


class ReliabilityRank(bench.Rank):
    """Commands beside those of `reducer bench`."""

    def __init__(self) -> None:
        super().__init__()
        self._samples: dict[str, Samples] = {}

    def _do_open_placed(self, name: str, environment: dict[str, str], places: list[str], timeout_s: float) -> Message:
        """Makes a group of reducer whose ranks are at `places` (equal texts: on one host; none: where they are)."""
        began = time.monotonic()
        if places:
            environment = {**environment, "REDUCER_TEST_PLACE": places[self._rank]}
        self._do_open(name, "reducer", environment, timeout_s)
        self._samples[name] = Samples(tuple(places or ["here"] * self._world_size))
        return {"seconds": time.monotonic() - began}

    def _do_close_group(self, name: str) -> Message:
        dist.destroy_process_group(self._groups.pop(name))
        return {}

    def _do_counters(self, name: str) -> Message:
        return self._counters(name)

    def _do_chaos(self, name: str, seed: int, until: float) -> Message:
        """Mixed collectives, several under way, until a time; all ranks end with the same one."""
        group, samples = self._groups[name], self._samples[name]
        dice = random.Random(seed)
        batches: list[tuple[float, float]] = []
        longest: Message = {"seconds": 0.0, "began": 0.0, "call": "none"}
        collectives = nbytes = wrong = 0
        first_wrong = None
        going = torch.ones(1)
        while going.item():
            began = time.monotonic()
            started = [start(call, samples, group) for call in draw_calls(dice, collectives, self._world_size)]
            going.fill_(float(began < until))
            last = dist.all_reduce(going, op=dist.ReduceOp.MIN, group=group, async_op=True)
            for each in started:
                each.work.wait()
                seconds = time.monotonic() - began
                if seconds > longest["seconds"]:
                    longest = {"seconds": seconds, "began": began, "call": str(each.call)}
            last.wait()
            batches.append((began, time.monotonic() - began))
            for each in started:
                compared, right = each.check()
                nbytes += compared
                if not right:
                    wrong += 1
                    first_wrong = first_wrong or f"{each.call} at {began:.3f}"
            collectives += len(started)
        return {
            "collectives": collectives,
            "nbytes": nbytes,
            "wrong": wrong,
            "first_wrong": first_wrong,
            "batches": batches,
            "longest": longest,
            "counters": self._counters(name),
        }

    def _do_rounds(self, name: str, nbytes: int, until: float, servers: int | None = None) -> Message:
        """Rounds of a small and a large all-reduce, until a time or all ranks have so many standalone reducers.

        Tells when each round began and ended, and when this rank had them all (None: it had not).
        """
        group = self._groups[name]
        sample = self._samples[name].of(nbytes // 4, torch.float32)
        mine = sample.parts[self._rank]
        tensor = torch.empty_like(mine)
        rounds: list[tuple[float, float]] = []
        wrong = 0
        there_at = None
        flags = torch.zeros(_SMALL_COUNT)
        while True:
            began = time.monotonic()
            if there_at is None and servers is not None and self._counters(name)["servers"] == servers:
                there_at = began
            # Whose time is over stops all; who is not there yet keeps all going.
            flags[0], flags[1] = float(began >= until), float(there_at is None)
            scale = scale_of(len(rounds))
            torch.mul(mine, scale, out=tensor)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
            dist.all_reduce(tensor, group=group)
            rounds.append((began, time.monotonic()))
            wrong += not same_bits(tensor, sample.total * scale)
            if flags[0].item() or not flags[1].item():
                return {"rounds": rounds, "wrong": wrong, "there_at": there_at}

    def _do_soak(self, name: str, small: int, large: int, nbytes: int) -> Message:
        """So many small and large all-reduces, every result compared."""
        group, samples = self._groups[name], self._samples[name]
        few, many = samples.of(_SMALL_COUNT, torch.float32), samples.of(nbytes // 4, torch.float32)
        wrong = 0
        rows = torch.empty(_UNDER_WAY, _SMALL_COUNT)
        done = 0
        while done < small:
            used = min(_UNDER_WAY, small - done)
            scales = torch.tensor([scale_of(done + index) for index in range(used)]).unsqueeze(1)
            torch.mul(few.parts[self._rank].expand(used, -1), scales, out=rows[:used])
            works = [dist.all_reduce(row, group=group, async_op=True) for row in rows[:used]]
            for work in works:
                work.wait()
            wrong += int((rows[:used] != few.total * scales).any(1).sum())
            done += used
        tensor = torch.empty_like(many.total)
        for number in range(large):
            torch.mul(many.parts[self._rank], scale_of(number), out=tensor)
            dist.all_reduce(tensor, group=group)
            wrong += not same_bits(tensor, many.total * scale_of(number))
        return {"wrong": wrong}

    def _counters(self, name: str) -> dict[str, int]:
        native: Any = self._groups[name]._get_backend(torch.device("cpu"))
        return dict(native.counters())


if __name__ == "__main__":
    bench.main(ReliabilityRank())
