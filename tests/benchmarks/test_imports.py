"""Every module of the benchmarks can be imported: what they take of the package is there."""

from __future__ import annotations

import importlib
import pkgutil

import benchmarks


def test_every_module_of_the_benchmarks_imports() -> None:
    names = [module.name for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]
    assert {"benchmarks.gpu_check.verify", "benchmarks.suite.machine"} <= set(names)
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)
