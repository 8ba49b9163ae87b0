"""The native module that needs no torch."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import Buffer

version: str
"""The version that the native library was built as."""
torch_version: str
"""The version of torch that `_torch` was built for."""
protocol_version: int
min_chunk_bytes: int
max_chunk_bytes: int

def parse_size(text: str) -> int:
    """Bytes of "4MiB", "64KiB", "1GB" or "4096". ValueError says what is wrong."""

def parse_bandwidth(text: str) -> int:
    """Bits a second of "10gbit", "2.5gbit", "800mbit" or "1000000bit". ValueError says what is wrong."""

def parse_servers(text: str) -> list[str]:
    """The items of "host:port,host:port". ValueError names the item that is wrong."""

def parse_algorithm(text: str) -> str:
    """The algorithm's name, or the algorithms by size, as they are written everywhere.

    ValueError names the item that is wrong, or lists the algorithms that there are.
    """

def parse_transport(text: str) -> str:
    """The transport's name as it is written everywhere. ValueError lists them."""

def choose_algorithms(
    samples: Sequence[tuple[str, int, int, int, int, int, int, int]], ranks: int, hosts: int, servers: int
) -> str:
    """What `auto` does by these measurements (_torch.Sample) in a group of that shape: "0-64KiB:direct,64KiB-:mixed".

    ValueError: a measurement is not possible, or there is none.
    """

def recorded(reason: str) -> str:
    """What the flight recorder of this process holds, as JSON; "": there was none yet, or it is switched off."""

def host_label() -> str:
    """ "hostname:pid" of this process."""

def host_identity() -> str:
    """Equal for processes that can share memory: one machine, network namespace and user."""

def choose_bind_host(interface: str, peer_host: str) -> str:
    """The address of an interface (a name or an address), or if empty, that of the route to `peer_host`.

    ValueError lists the interfaces that exist.
    """

def resolve_servers(servers: Sequence[str]) -> list[str]:
    """Addresses for names; a name with several addresses counts as several servers. ConnectionError, ValueError."""

def reduce(dtype: str, op: str, inputs: Sequence[Buffer], out: Buffer) -> None:
    """out[i] = inputs[0][i] op inputs[1][i] op ..., from left to right, by the library's one definition.

    dtype: as torch names it, "float32", "bfloat16", "float8_e4m3fn" ...; op: "sum", "product", "min", "max", "band",
    "bor", "bxor" or "avg". All buffers are contiguous and of one size; `out` overlaps none of the inputs. TypeError,
    ValueError. Releases the GIL.
    """

def widen_float8(dtype: str, values: Buffer, out: Buffer) -> None:
    """What reduce() reads: float32 of as many "float8_e4m3fn" or "float8_e5m2". TypeError, ValueError."""

def narrow_float8(dtype: str, values: Buffer, out: Buffer) -> None:
    """How reduce() rounds float32 to "float8_e4m3fn" or "float8_e5m2", once at the end. TypeError, ValueError."""

def instruction_sets() -> list[str]:
    """What this machine can run, best first: "AVX3", "AVX2" ..."""

def pin_instruction_set(name: str) -> None:
    """Makes the kernels use one of instruction_sets(), in the whole process; "" returns to the best. ValueError."""

class EngineProbe:
    """An engine fed from memory, for benchmarks: `ranks` workers push `buffer_bytes` of float32 in chunks."""

    def __init__(self, ranks: int, chunk_bytes: int, buffer_bytes: int) -> None: ...
    def run(self) -> int:
        """Sums everything once. The bytes of memory moved: every contribution read, every result written."""

class AddProbe:
    """`a[i] += b[i]` over float32 arrays of `buffer_bytes` each."""

    def __init__(self, buffer_bytes: int) -> None: ...
    def run(self) -> int:
        """Adds once. The bytes of memory moved: two reads and a write."""

class Simulation:
    """A whole job on a simulated network: the library's own engine and exchange, timed by a model of NICs.

    Deterministic. Not thread-safe. Rates in bytes/s, 0 for `reducer_bytes_per_second`, `chunk_bytes` and
    `window_bytes`: as usual; 0 `cores`: processors cost no time. `check`: tensors of its own for each rank, and
    results compared. Both it and measure() run without the GIL and can be interrupted. InvalidArgument.
    """

    def __init__(
        self,
        *,
        workers: int,
        reducers: int,
        algorithm: str,
        bytes_per_second: float,
        reducer_bytes_per_second: float,
        latency_s: float,
        jitter_s: float,
        chunk_bytes: int,
        window_bytes: int,
        burst_bytes: int,
        cores: int,
        shared_cores: bool,
        frame_s: float,
        byte_s: float,
        seed: int,
        check: bool,
    ) -> None: ...
    def measure(self, nbytes: int, iterations: int) -> dict[str, Any]:
        """All-reduces of float32 in a row; keys as in csrc/simulate/simulation.h's Measurement."""

    def shape(self) -> dict[str, Any]:
        """What does not change with the tensor: algorithm, window, promised memory, connections."""
