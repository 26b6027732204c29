"""What each stage of a run does; their order is the business of :mod:`compressor.pipeline`."""
