"""The native module that is built for one minor version of torch."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Backend, Work

Sample = tuple[str, int, int, int, int, int, int, int]
"""Algorithm, chunk and window (0: the library's), ranks, hosts, servers, bytes, nanoseconds of an all-reduce."""

class Runtime:
    """A hold on the transport of this process and on the reducer inside it, which its groups share."""

    def __init__(
        self,
        *,
        bind_host: str,
        congestion_control: str,
        transport: str,
        tls_cert: str,
        tls_key: str,
        tls_ca: str,
        token_file: str,
        recorder_entries: int,
        recorder_dir: str,
        recorder_signal: int,
        warns: bool,
    ) -> None:
        """Listens at a free port of `bind_host`, an address of this machine. ConnectionError, RuntimeError, ValueError.

        The tls_* and token_file are paths, "" for none.
        """

    @property
    def address(self) -> str:
        """ "host:port" where other workers reach this process."""

class BackendOptions(Backend.Options):
    """What a group was made with: `options` of its backend (a copy), and for split_group and shrink_group."""

    algorithm: str
    chunk_bytes: int
    window_bytes: int
    checksum: bool
    @property
    def servers(self) -> list[str]: ...
    def __copy__(self) -> BackendOptions: ...
    def __deepcopy__(self, memo: dict[int, object]) -> BackendOptions: ...

class ReducerBackend(Backend):
    """This rank's place in a group."""

    def __init__(
        self,
        *,
        runtime: Runtime,
        job: bytes,
        name: str,
        rank: int,
        world_size: int,
        workers: list[str],
        servers: list[str],
        places: list[str],
        hosts: list[str],
        worker_bandwidths: list[int],
        server_bandwidths: list[int],
        samples: Sequence[Sample],
        measures: bool,
        algorithm: str,
        transport: str,
        chunk_bytes: int,
        window_bytes: int,
        checksum: bool,
        warns: bool,
        connect_timeout: timedelta,
        heartbeat: timedelta,
        failover: bool,
        timeout: timedelta,
        global_ranks: list[int],
    ) -> None:
        """`job`: 16 bytes, equal on all ranks and new for each instance; `workers`: addresses by rank; `places`: equal
        texts are ranks that share a host; `hosts`: their names for messages. ValueError."""

    @property
    def options(self) -> BackendOptions: ...
    @property
    def algorithm(self) -> str:
        """The algorithm in use, or the algorithms by size, "auto" resolved."""

    @property
    def job(self) -> bytes:
        """16 bytes, equal on all ranks; those of a shrunk or split group follow from its parent's and its ranks."""
    @property
    def workers(self) -> list[str]:
        """Where the reducer inside each worker listens, by rank."""
    def abort_work(self, work: Work) -> None:
        """Gives one call up, on this rank and so on all: the others get an error that says so; the group goes on."""

    def comm_split_count(self) -> int: ...
    def perform_nocolor_split(self, device: object) -> None:
        """Nothing: ranks that are not in a split have nothing to do for it."""

    def _add_ephemeral_timeout(self, timeout: timedelta) -> None:
        """More time for the next call, once."""

    def _verify_work_timeout(self, work: Work, timeout: timedelta) -> bool: ...
    def _group_start(self) -> None: ...
    def _group_end(self) -> None: ...
    def _is_initialized(self) -> bool: ...
    @property
    def uid(self) -> int: ...
    def explain(self, nbytes: int) -> list[dict[str, Any]]:
        """What `auto` expects of an all-reduce of so many bytes, each way; [] if it has no measurements.

        "algorithm", "chunk_bytes", "window_bytes" (0: the library's), seconds for the parts of the model "messages_s",
        "frames_s", "wire_s", "work_s", the "correction" by what was measured, "seconds", and whether it is "chosen".
        """

    def measure(self) -> list[Sample]:
        """Measures the ways of a group made with `measures`, on all ranks before the first call; the same on all."""

    def counters(self) -> dict[str, int]:
        """operations, pushed_bytes, pulled_bytes, outstanding_bytes_max and its bound window_bytes."""

def shutdown_all() -> None:
    """Leaves every group of this process."""
