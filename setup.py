"""Builds the native part with CMake; everything else is in pyproject.toml.

The build folder is build/native in the source tree, so that a second build compiles only what changed,
for `pip install .`, `pip install -e .` and `setup.py build_ext --inplace` alike. From the environment:

    MAX_JOBS     compilations at once (default: the number of cores)
    CMAKE_ARGS   more arguments for CMake, as a shell would read them
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent
BUILD = SOURCE / "build" / "native"
PACKAGE = "reducer"


def tool(name: str, package: str) -> str:
    """The path of a program, or the end with what to install."""
    path = shutil.which(name)
    if path is None:
        raise SystemExit(
            f"reducer is built with {name}, which is not here: install {package} (on Debian 12 "
            "`make setup` does; docs/dependencies.md has the list)"
        )
    return path


def forget_other_tree(build: Path) -> None:
    """Removes a build folder that was configured for another place: CMake refuses a copied one."""
    cache = build / "CMakeCache.txt"
    if not cache.exists():
        return
    home = f"CMAKE_HOME_DIRECTORY:INTERNAL={SOURCE}"
    if home not in cache.read_text().splitlines():
        shutil.rmtree(build)


class CMakeBuild(build_ext):  # type: ignore[misc]  # setuptools has no types
    """build_ext that leaves the native files to CMake, and its install rules say where they go."""

    def run(self) -> None:
        prefix = SOURCE if self.inplace else Path(self.build_lib).resolve()
        forget_other_tree(BUILD)
        cmake, ninja = tool("cmake", "cmake"), tool("ninja", "ninja-build")
        arguments = [
            *("-S", str(SOURCE), "-B", str(BUILD), "-G", "Ninja"),
            "-DREDUCER_PYTHON=ON",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, *arguments], check=True)
        subprocess.run([ninja, "-C", str(BUILD), "-j", jobs], check=True)
        subprocess.run([cmake, "--install", str(BUILD), "--prefix", str(prefix)], check=True)

    def get_outputs(self) -> list[str]:
        """The installed files, by CMake's own account."""
        manifest = BUILD / "install_manifest.txt"
        return manifest.read_text().split() if manifest.exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is built elsewhere and copied: in an editable install CMake writes in place."""
        return {}


setup(
    # Named for setuptools only, which has to know that the wheel is for one platform.
    ext_modules=[Extension(f"{PACKAGE}._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
