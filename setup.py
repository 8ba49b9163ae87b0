"""Builds the native parts with CMake and puts them into the package.

`pip install --no-build-isolation .` (or `-e .`); see the Makefile. The build goes to build/package and is incremental.
Environment: MAX_JOBS (compilers at once, default 2), CMAKE_ARGS (more options for CMake).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One "extension": all that CMake installs (libreducer, _core, _torch, bin/reducer-server)."""

    def run(self) -> None:
        build = ROOT / "build" / "package"
        prefix = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            "-DREDUCER_PYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS", "2")
        targets = ["reducer", "reducer-server", "reducer_core", "reducer_torch"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build, "-j", jobs, "--target", *targets], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", prefix], check=True)

    def get_outputs(self) -> list[str]:
        return []


setup(
    ext_modules=[Extension("reducer._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
