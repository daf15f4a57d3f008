"""python -m extras.convert SOURCE OUT: a layout that the loader does not read -> public files."""

import argparse
from pathlib import Path

from extras.convert.public_files import convert


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m extras.convert",
                                     description=__doc__.partition(": ")[2])
    parser.add_argument("source", type=Path, help="a directory, or MiniMind's .pth")
    parser.add_argument("out", type=Path, help="new directory")
    flags = parser.parse_args(arguments)
    if flags.out.exists():
        raise SystemExit(f"{flags.out} is there already: give a new directory")
    try:
        convert(flags.source, flags.out)
    except (OSError, ValueError) as error:
        raise SystemExit(f"extras.convert: {error}") from error
    print(f"written to {flags.out}: {', '.join(sorted(p.name for p in flags.out.iterdir()))}")


if __name__ == "__main__":
    main()
