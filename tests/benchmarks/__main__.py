"""Run one benchmark: ``python -m tests.benchmarks NAME`` calls ``main()`` of the module NAME beside this file."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> int:
    names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print(f"usage: python -m tests.benchmarks NAME [options], one of: {', '.join(names)}", file=sys.stderr)
        return 2
    importlib.import_module(f"{__package__}.{sys.argv[1]}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
