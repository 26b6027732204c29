"""Target ``coreml``. See docs/targets/coreml.md.

Nothing is imported here: ``worker.py``, ``program.py`` and ``operators.py`` run in the tool chain's environment, the
back end in ours.
"""
