"""``compress-for-device``: the only place that prints or exits. A command parses, calls, prints."""

from __future__ import annotations

import os
import sys

# Threads of torch's OpenMP spin while they wait for each other. Beside another job that takes a core each wait costs a
# time slice: a training step of a small transformer took 756 ms instead of 450 (2 cores; 278 and 269 alone).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded, which is later


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
