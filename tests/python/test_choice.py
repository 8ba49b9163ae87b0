"""Which way a call goes: by the NICs that are given, by what was measured, by a table of `reducer tune`."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, init_group, standalone_reducers

from reducer.serve import query_stats


def make_group_error() -> str:
    """In a rank: why a group cannot be made."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011: the parent looks at it
        init_group()
    return str(caught.value)


def test_bandwidths_of_all_or_of_none() -> None:
    with standalone_reducers(2) as (slow, fast):
        alone = {"REDUCER_SERVERS": f"{slow}@1gbit,{fast}@1gbit"}
        with Ranks(2, alone, init=False) as fresh:
            for text in fresh.call(make_group_error):
                assert re.search(r"REDUCER_BANDWIDTH is not set on ranks 0 \(\S+\), 1 \(\S+\), and REDUCER_SERV", text)
        with Ranks(2, {"REDUCER_SERVERS": slow, "REDUCER_BANDWIDTH": "1gbit"}, init=False) as fresh:
            for text in fresh.call(make_group_error):
                assert f"has no bandwidths, and the ranks have REDUCER_BANDWIDTH; write {slow}@10gbit for each" in text
        both = {"REDUCER_BANDWIDTH": "1gbit"}, {"REDUCER_BANDWIDTH": "2gbit"}
        with Ranks(2, [dict(one) for one in both], init=False) as fresh:
            for text in fresh.call(make_group_error):
                assert "1000000000bit on rank 0 and 2000000000bit on rank 1, which share a host" in text


def push_a_mebibyte() -> None:
    tensor = torch.ones(1 << 18)
    dist.all_reduce(tensor)
    assert tensor.eq(dist.get_world_size()).all()


def test_a_faster_server_gets_more() -> None:
    with standalone_reducers(2) as (slow, fast):
        env = {
            "REDUCER_SERVERS": f"{slow}@1gbit,{fast}@3gbit",
            "REDUCER_BANDWIDTH": "1gbit",
            "REDUCER_ALGORITHM": "server",
        }
        with Ranks(2, env) as fresh:
            fresh.call(push_a_mebibyte)
            pushed = [query_stats(address)["pushed_bytes"] for address in (slow, fast)]
    assert pushed == [1 << 19, 3 << 19]
