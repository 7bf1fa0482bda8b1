#!/usr/bin/env python3
"""A launcher of nvcc that records what ptxas says and the PTX of each file.

With the records, `ptxas.py` need not compile again.

cmake -DCMAKE_CUDA_COMPILER_LAUNCHER="python3;cmake/ptxas_record.py;FOLDER" ...
python3 cmake/ptxas.py --recorded FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main(folder: str, command: list[str]) -> int:
    """Run the compiler; for a compilation (-c), write FOLDER/<object>.json.

    Warnings and exit status are passed on.
    """
    if "-c" not in command or "-o" not in command:
        return subprocess.run(command).returncode
    source, target = command[command.index("-c") + 1], Path(command[command.index("-o") + 1]).name
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as kept:
        extra = ["-Xptxas", "-v", "--keep", "--keep-dir", kept]
        done = subprocess.run([*command, *extra], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        ptx = [path.read_text() for path in sorted(Path(kept).glob("*.ptx"))]
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        return done.returncode
    warnings = [line for line in done.stdout.splitlines() if not line.startswith("ptxas info")]
    if any(line.strip() and "bytes stack frame" not in line for line in warnings):
        print("\n".join(warnings), file=sys.stderr)
    record = {"source": source, "seconds": time.monotonic() - began, "output": done.stdout, "ptx": ptx}
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{target}.json").write_text(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
