"""`python -m gearcpp` is the `gearcpp` command."""

from __future__ import annotations

import sys


def main() -> None:
    """The command: `gearcpp.cli.main`, whose imports take a while, in which Ctrl-C ends it as quietly as later."""
    try:
        from gearcpp.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
