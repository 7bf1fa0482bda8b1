"""The `illada` command, and `python -m illada`."""

import signal
import sys


def main() -> int:
    """Run the command.

    Ctrl-C while its modules are imported, or at the exit, ends the process at once and quietly.
    """
    quiet = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if quiet:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from illada import cli

    if quiet:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return cli.main()
    except KeyboardInterrupt:  # a second one, while the first was answered
        return 130
    finally:
        if quiet:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
