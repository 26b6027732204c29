"""``compress-for-device``: the only place that prints or exits. A command parses, calls, prints."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the command: every error on purpose becomes one text on stderr and an exit code."""
    import typer

    from compressor.cli.app import app
    from compressor.errors import CompressError

    try:
        code = app(standalone_mode=False)
    except CompressError as error:
        from compressor.cli.output import fail

        sys.exit(fail(error))
    except KeyboardInterrupt:
        print("\ninterrupted; finished stages are kept, and the same command resumes", file=sys.stderr)
        sys.exit(130)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        from compressor.cli.output import usage_error

        known = usage_error(error)
        if known is None:
            raise
        sys.exit(known)
    sys.exit(code if isinstance(code, int) else 0)
