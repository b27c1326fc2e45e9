"""Compiles the modules that every hit runs through with mypyc, which mypy brings: `compile_fast_path.py FOLDER`.

FOLDER holds the package `distributor_node`, as a file tree without links: `site-packages`, or a copy of the sources.
The extension modules are put beside the sources and imported in their place. Compiling needs a C compiler, running does
not. Everything works without them.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from mypyc.build import mypycify
from setuptools import Distribution
from setuptools.command.build_ext import build_ext

MODULES = (
    "services/api/access_log.py",
    "services/api/accesses.py",
    "services/api/assets/decision.py",
    "services/api/fast_path/handler.py",
    "services/api/fast_path/object_cache.py",
    "services/api/fast_path/protocol.py",
    "services/api/headers.py",
    "services/api/request_log.py",
    "shared/domain/conditionals.py",
)


def compile_in(folder: Path) -> None:
    os.chdir(folder)
    with tempfile.TemporaryDirectory(prefix="compile-") as build:
        extensions = mypycify(
            [*(f"distributor_node/{module}" for module in MODULES), "--follow-imports=silent"],
            opt_level="3",
            target_dir=build,
        )
        command = build_ext(Distribution({"name": "fast-path", "packages": [], "ext_modules": extensions}))
        command.inplace, command.build_temp, command.build_lib = True, build, build
        command.ensure_finalized()
        command.run()


if __name__ == "__main__":
    compile_in(Path(sys.argv[1]).resolve())
