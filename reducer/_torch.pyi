"""The native module that is built for one minor version of torch."""

from datetime import timedelta

from torch._C._distributed_c10d import Backend

class Runtime:
    """A hold on the transport of this process and on the reducer inside it, which its groups share."""

    def __init__(self, bind_host: str, congestion_control: str) -> None:
        """Listens at a free port of `bind_host`, an address of this machine. ConnectionError, RuntimeError."""

    @property
    def address(self) -> str:
        """ "host:port" where other workers reach this process."""

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
        algorithm: str,
        chunk_bytes: int,
        window_bytes: int,
        checksum: bool,
        connect_timeout: timedelta,
        timeout: timedelta,
        global_ranks: list[int],
    ) -> None:
        """`job`: 16 bytes, equal on all ranks and new for each instance; `workers`: addresses by rank. ValueError."""

    @property
    def options(self) -> Backend.Options: ...
    @property
    def algorithm(self) -> str:
        """The algorithm in use, "auto" resolved."""

    def counters(self) -> dict[str, int]:
        """operations, pushed_bytes, pulled_bytes, outstanding_bytes_max and its bound window_bytes."""

def shutdown_all() -> None:
    """Leaves every group of this process."""
