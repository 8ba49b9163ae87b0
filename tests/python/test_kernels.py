"""The arithmetic of the newer element types, on every instruction set, against torch's and numpy's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from reducer import _core

FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
NAN = 0x7F

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

pytestmark = pytest.mark.usefixtures("instruction_set")


@pytest.fixture(params=_core.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    _core.pin_instruction_set(request.param)
    yield
    _core.pin_instruction_set("")


def widened(dtype: str, values: Bytes) -> Floats:
    out = np.empty(values.size, dtype=np.float32)
    _core.widen_float8(dtype, values, out)
    return out


def narrowed(dtype: str, values: Floats) -> Bytes:
    out = np.empty(values.size, dtype=np.uint8)
    _core.narrow_float8(dtype, values, out)
    return out


def torch_narrowed(dtype: str, values: Floats) -> Bytes:
    """As torch converts, but for the sign of a NaN, which reducer always drops."""
    bits = torch.from_numpy(values).to(FLOAT8[dtype]).view(torch.uint8).numpy().copy()
    bits[np.isnan(values)] = NAN
    return bits


def check_narrowing(dtype: str, values: Floats) -> None:
    actual, expected = narrowed(dtype, values), torch_narrowed(dtype, values)
    wrong = np.flatnonzero(actual != expected)
    assert wrong.size == 0, (
        f"{values[wrong[0]]!r} becomes {actual[wrong[0]]:#x}, not {expected[wrong[0]]:#x}; {wrong.size} are wrong"
    )


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_float8_is_read_as_torch_does(dtype: str) -> None:
    every = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(every).view(FLOAT8[dtype]).float().numpy()
    actual = widened(dtype, every)
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    assert np.isnan(expected).sum() == (2 if dtype == "float8_e4m3fn" else 6)
    numbers = ~np.isnan(expected)
    assert np.array_equal(actual.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
    assert np.array_equal(narrowed(dtype, actual), np.where(numbers, every, NAN))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_boundaries_of_float8_are_rounded_as_torch_does(dtype: str) -> None:
    numbers = widened(dtype, np.arange(128, dtype=np.uint8))
    numbers = numbers[np.isfinite(numbers)]
    # Halves of steps are exact in float32. Beyond the last number lies one more step.
    beyond = 2 * numbers[-1] - numbers[-2]
    grid = np.append(numbers, beyond)
    places = np.concatenate([grid, (grid[:-1] + grid[1:]) / 2])
    bits = places.view(np.uint32).astype(np.int64)
    near = (bits[:, None] + np.arange(-3, 4)).ravel()
    near = near[near >= 0].astype(np.uint32)
    check_narrowing(dtype, np.concatenate([near, near | np.uint32(1 << 31)]).view(np.float32))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float32_of_every_size_is_rounded_as_torch_does(dtype: str) -> None:
    # An odd stride through all 2^32 patterns: 4 million, of every exponent, NaNs and infinities among them.
    check_narrowing(dtype, np.arange(0, 1 << 32, 1021, dtype=np.uint32).view(np.float32))
    specials = [np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38]
    check_narrowing(dtype, np.array(specials, dtype=np.float32))
    # Where the type has its numbers, the same many again.
    random = np.random.default_rng(8)
    sizes = np.exp2(random.uniform(-20, 18, 1 << 20))
    check_narrowing(dtype, (sizes * random.choice([-1.0, 1.0], 1 << 20)).astype(np.float32))


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("op", ["sum", "avg", "product", "min", "max"])
def test_float8_is_reduced_in_float32_and_rounded_once(dtype: str, op: str) -> None:
    random = np.random.default_rng(5)
    inputs = [random.integers(0, 256, 10_007, dtype=np.uint8) for _ in range(5)]
    rows = [torch.from_numpy(values).view(FLOAT8[dtype]).float() for values in inputs]
    total = rows[0]
    for row in rows[1:]:
        match op:
            case "product":
                total = total * row
            case "min":
                total = torch.minimum(total, row)
            case "max":
                total = torch.maximum(total, row)
            case _:
                total = total + row
    if op == "avg":
        total = total / len(rows)
    out = np.empty(10_007, dtype=np.uint8)
    _core.reduce(dtype, op, inputs, out)
    expected = torch_narrowed(dtype, total.numpy())
    if op in ("min", "max"):  # of +0 and -0 torch does not say which
        out[out == 0x80] = 0
        expected[expected == 0x80] = 0
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("dtype", UNSIGNED)
def test_unsigned_integers_are_reduced_modulo_their_range(dtype: str) -> None:
    random = np.random.default_rng(6)
    highest = np.iinfo(dtype).max
    inputs = [random.integers(0, highest, 1003, dtype=dtype, endpoint=True) for _ in range(3)]
    stacked = np.stack(inputs)
    total = stacked.sum(0, dtype=dtype)
    expected = {
        "sum": total,
        "avg": total // np.array(3, dtype=dtype),
        "product": stacked.prod(0, dtype=dtype),
        "min": stacked.min(0),
        "max": stacked.max(0),
        "band": np.bitwise_and.reduce(stacked),
        "bor": np.bitwise_or.reduce(stacked),
        "bxor": np.bitwise_xor.reduce(stacked),
    }
    for op, result in expected.items():
        out = np.empty_like(result)
        _core.reduce(dtype, op, inputs, out)
        assert np.array_equal(out, result), op


def test_conversions_refuse() -> None:
    with pytest.raises(TypeError, match="float16 is no float8"):
        _core.narrow_float8("float16", np.zeros(4, np.float32), np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match="values has 12 bytes, out has 4; a float32 has 4"):
        _core.narrow_float8("float8_e5m2", np.zeros(3, np.float32), np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match="values has 4 bytes, out has 12; a float32 has 4"):
        _core.widen_float8("float8_e5m2", np.zeros(4, np.uint8), np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="band has no meaning on float8_e5m2"):
        _core.reduce("float8_e5m2", "band", [bytes(8)], bytearray(8))
