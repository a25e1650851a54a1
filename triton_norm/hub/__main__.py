"""Writes a folder for the Hugging Face Hub's kernels: layers for `kernelize`, and the functions."""

import argparse
import sys
from pathlib import Path

from triton_norm.hub import folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m triton_norm.hub", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write `build` and README.md to")
    path = parser.parse_args().folder
    try:
        builds = folder.write(path)
    except FileExistsError:
        print(f"{parser.prog}: {path / 'build'} exists", file=sys.stderr)
        return 1
    print("\n".join(map(str, builds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
