"""``python -m compressor.cli``: the command without an installed script."""

from compressor.cli import main

main()
