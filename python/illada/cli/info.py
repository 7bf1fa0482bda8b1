"""`illada info`: what is installed and built."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

from illada.cli.signals import importing


def add_parser(commands: Any) -> None:
    """Add the command to the `illada` parser."""
    parser = commands.add_parser("info", help="show what is installed and built", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    facts = _facts()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        print(f"{name:<16} {value if value not in (None, '', []) else 'none'}")
    return 0


def _variants() -> str | None:
    """Return the choices among kernels that differ from the default, or why they cannot be made."""
    from illada import _native
    from illada.ops import variants

    try:
        return variants.describe() if _native.has_cuda() else None
    except ValueError as error:
        return str(error)


def _facts() -> dict[str, Any]:
    """Return what is installed and what was built; a missing part is reported, not raised."""
    import illada

    with importing():
        import torch

    facts: dict[str, Any] = {"illada": illada.__version__, "python": platform.python_version()}
    try:
        build = illada.build_info()
        facts["native module"] = f"built with {build['compiler']}, OpenMP {'on' if build['openmp'] else 'off'}"
        facts["cpu kernels"] = build["cpu_isa"]
        facts["cuda toolkit"] = build["cuda_version"] or f"none: this build has no CUDA kernels ({build['no_cuda']})"
        facts["cuda archs"] = build["cuda_archs"]
        facts["cutlass"] = build["cutlass_version"]
        facts["cuda variants"] = _variants()
    except ImportError as error:
        facts["native module"] = str(error).splitlines()[0]
    facts["torch"] = torch.__version__
    facts["threads"] = torch.get_num_threads()
    facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for package in ("numpy", "tokenizers", "safetensors", "matplotlib"):
        try:
            from importlib.metadata import version

            facts[package] = version(package)
        except ImportError:
            facts[package] = None
    return facts
