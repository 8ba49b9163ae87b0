"""The structure of the source, enforced: who may include whom, and how long files and lines may be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A folder of csrc and the folders that it may include, itself aside. docs/architecture.md draws it. What carries the
# frames (transport/hosts) is known only to those that set a process up; the simulated network only to tests and to
# `simulate`, which sets up whole jobs on it.
MAY_INCLUDE: dict[str, frozenset[str]] = {
    "common": frozenset(),
    "kernels": frozenset({"common"}),
    "local": frozenset({"common", "kernels"}),
    "wire": frozenset({"common"}),
    "recorder": frozenset({"common", "wire"}),
    "engine": frozenset({"common", "kernels", "wire"}),
    "transport": frozenset({"common", "wire"}),
    "transport/net": frozenset({"common", "transport"}),
    "transport/tcp": frozenset({"common", "wire", "transport", "transport/net"}),
    "transport/grpc": frozenset({"common", "wire", "transport", "transport/net"}),
    "transport/hosts": frozenset({"common", "transport", "transport/net", "transport/tcp", "transport/grpc"}),
    "transport/sim": frozenset({"common", "wire", "transport"}),
    "server": frozenset({"common", "wire", "engine", "transport"}),
    "collective": frozenset({"common", "kernels", "local", "wire", "recorder", "engine", "transport", "server"}),
    "simulate": frozenset({"common", "transport", "transport/sim", "server", "collective"}),
    "runtime": frozenset({"common", "wire", "recorder", "transport", "transport/hosts", "server", "collective"}),
    "torch": frozenset({"common", "kernels", "wire", "engine", "transport", "server", "collective", "runtime"}),
    "python": frozenset(
        {"common", "kernels", "wire", "engine", "transport", "server", "collective", "runtime", "simulate"}
    ),
    "reducerd": frozenset(
        {"common", "transport", "transport/net", "transport/grpc", "transport/hosts", "server", "collective", "runtime"}
    ),
}

# Other libraries: how their headers begin, and the folders that may see them. All may see what is not named here.
_GRPC_FOLDERS = frozenset({"transport/grpc", "reducerd"})
_TORCH_FOLDERS = frozenset({"torch"})
_PYTHON_FOLDERS = frozenset({"torch", "python"})
LIBRARIES: dict[str, frozenset[str]] = {
    "grpc/": _GRPC_FOLDERS,
    "grpcpp/": _GRPC_FOLDERS,
    "google/protobuf/": _GRPC_FOLDERS,
    "absl/": _GRPC_FOLDERS,
    "torch/": _TORCH_FOLDERS,
    "ATen/": _TORCH_FOLDERS,
    "c10/": _TORCH_FOLDERS,
    "pybind11/": _PYTHON_FOLDERS,
    "Python.h": _PYTHON_FOLDERS,
    "hwy/": frozenset({"kernels"}),
}
GENERATED = re.compile(r"\w+(\.grpc)?\.pb\.h")

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?P<open>["<])(?P<path>[^">]+)[">]', re.MULTILINE)

FILE_LINES_MAX = 600
CPP_COLUMNS_MAX = 100
# In pieces, or this file would be found.
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")


@dataclass(frozen=True)
class Finding:
    """A broken rule, at a line of a file."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def cpp_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".cc", ".h"))


def layer_of(relative: Path) -> str:
    """The layer of a file or an include by its path below csrc: "engine", "transport/grpc"; "" if it is in none."""
    for folder in relative.parents:
        if folder.as_posix() in MAY_INCLUDE:
            return folder.as_posix()
    return ""


def judge_include(csrc: Path, layer: str, path: str, *, quoted: bool) -> str:
    """What is wrong with an include in a file of `layer`; "" if nothing is."""
    if quoted and (csrc / path).is_file():
        target = layer_of(Path(path))
        if target == layer or target in MAY_INCLUDE[layer]:
            return ""
        return f"{layer} may not include {target} ({path})"
    if quoted and GENERATED.fullmatch(path):
        return "" if layer in _GRPC_FOLDERS else f"{layer} may not include generated code ({path})"
    for prefix, folders in LIBRARIES.items():
        if path.startswith(prefix):
            return "" if layer in folders else f"{layer} may not include {prefix.rstrip('/')} ({path})"
    if quoted:
        return f'"{path}" is neither a path below csrc nor a known library (write own headers from csrc on)'
    return ""


def layering_findings(csrc: Path) -> Iterator[Finding]:
    for file in cpp_files(csrc):
        relative = file.relative_to(csrc)
        layer = layer_of(relative)
        if not layer:
            yield Finding(relative, 1, "belongs to no layer; give its folder a place in MAY_INCLUDE")
            continue
        text = file.read_text()
        for include in INCLUDE.finditer(text):
            problem = judge_include(csrc, layer, include["path"], quoted=include["open"] == '"')
            if problem:
                yield Finding(relative, text.count("\n", 0, include.start()) + 1, problem)


def style_findings(root: Path, files: list[Path]) -> Iterator[Finding]:
    for file in files:
        relative = file.relative_to(root)
        lines = file.read_text().splitlines()
        if len(lines) >= FILE_LINES_MAX:
            yield Finding(relative, len(lines), f"{len(lines)} lines, the limit is {FILE_LINES_MAX}")
        for number, line in enumerate(lines, start=1):
            # ruff measures Python's lines.
            if file.suffix in (".cc", ".h") and len(line) > CPP_COLUMNS_MAX:
                yield Finding(relative, number, f"{len(line)} columns, the limit is {CPP_COLUMNS_MAX}")
            if UNFINISHED.search(line):
                yield Finding(relative, number, f"unfinished: {line.strip()}")


def source_files(root: Path) -> list[Path]:
    folders = ("csrc", "tests", "benchmarks", "examples", "reducer", "tools")
    found = [
        path
        for folder in folders
        for path in (root / folder).rglob("*")
        if path.suffix in (".cc", ".h", ".proto", ".py", ".pyi", ".sh") or path.name == "CMakeLists.txt"
    ]
    return sorted([*found, root / "setup.py", root / "Makefile", root / "CMakeLists.txt"])


def report(findings: Iterator[Finding]) -> str:
    return "\n".join(str(finding) for finding in findings)


def test_layers_include_only_lower_ones() -> None:
    assert len(cpp_files(ROOT / "csrc")) > 40
    found = report(layering_findings(ROOT / "csrc"))
    assert not found, "\n" + found


def test_the_order_of_layers_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_INCLUDE):
        ready = {layer for layer, lower in MAY_INCLUDE.items() if layer not in done and lower <= done}
        assert ready, f"a cycle among {sorted(set(MAY_INCLUDE) - done)}"
        done |= ready


def test_files_are_short_narrow_and_finished() -> None:
    files = source_files(ROOT)
    assert len(files) > 80
    found = report(style_findings(ROOT, files))
    assert not found, "\n" + found


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A small csrc in which nothing is wrong."""
    for name, text in {
        "common/status.h": "#pragma once\n#include <string>\n",
        "engine/engine.h": '#include "common/status.h"\n',
        "transport/transport.h": '#include "common/status.h"\n',
        "transport/grpc/stream.cc": '#include <grpcpp/grpcpp.h>\n#include "reducer.pb.h"\n',
        "transport/sim/sim.h": '#include "transport/transport.h"\n',
        "torch/backend.h": "#include <torch/extension.h>\n",
        "torch/module.cc": '#include "torch/backend.h"\n#include "engine/engine.h"\n',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_right_tree_has_no_findings(planted: Path) -> None:
    assert report(layering_findings(planted)) == ""


@pytest.mark.parametrize(
    ("name", "include", "complaint"),
    [
        ("common/bad.cc", '"engine/engine.h"', "common may not include engine"),
        ("engine/bad.cc", '"transport/transport.h"', "engine may not include transport"),
        ("engine/bad.cc", "<grpcpp/grpcpp.h>", "engine may not include grpcpp"),
        ("server/bad.cc", '"transport/sim/sim.h"', "server may not include transport/sim"),
        ("collective/bad.cc", '"transport/grpc/stream.cc"', "collective may not include transport/grpc"),
        ("collective/bad.cc", '"reducer.pb.h"', "collective may not include generated code"),
        ("server/bad.cc", "<torch/extension.h>", "server may not include torch"),
        ("python/bad.cc", '"torch/backend.h"', "python may not include torch"),
        ("runtime/bad.cc", "<ATen/ATen.h>", "runtime may not include ATen"),
        ("engine/bad.cc", '"engine.h"', "write own headers from csrc on"),
        ("transport/shm/bad.cc", '"common/status.h"', ""),
        ("novel/bad.cc", '"common/status.h"', "belongs to no layer"),
    ],
)
def test_a_planted_include_is_found(planted: Path, name: str, include: str, complaint: str) -> None:
    path = planted / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"// planted\n  #  include {include}\n")
    found = report(layering_findings(planted))
    assert complaint in found
    assert (found.count(name) == 1) if complaint else (found == "")


def test_planted_style_is_found(tmp_path: Path) -> None:
    long_file, wide_file, open_file = tmp_path / "long.py", tmp_path / "wide.cc", tmp_path / "open.h"
    long_file.write_text("pass\n" * FILE_LINES_MAX)
    wide_file.write_text("\n" + "/" * (CPP_COLUMNS_MAX + 1) + "\n")
    open_file.write_text("// TO" + "DO: everything\n")
    found = [str(finding) for finding in style_findings(tmp_path, [long_file, wide_file, open_file])]
    assert len(found) == 3
    assert found[0].startswith(f"long.py:{FILE_LINES_MAX}: ")
    assert found[1].startswith("wide.cc:2: ")
    assert found[2].startswith("open.h:1: unfinished")
