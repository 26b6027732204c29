"""ExecuTorch with XNNPACK: phones, boards, and this machine. See docs/targets/executorch.md.

Nothing is imported here: ``module.py`` and ``operators.py`` run in the tool chain's environment, the back end in ours.
"""
