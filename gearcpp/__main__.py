"""`python -m gearcpp` is the `gearcpp` command."""

from __future__ import annotations

import sys


def main() -> None:
    """The command: `gearcpp.cli.main`, whose imports take a while, in which Ctrl-C ends it as quietly as later."""
    try:
        try:
            from gearcpp.cli import main as run
        except ModuleNotFoundError:
            if sys.argv[1:] != ["plugin-path"]:
                raise
            # A wheel that was installed without what it depends on, for the library in it.
            from gearcpp.native import library_path

            print(library_path())
            return
        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
