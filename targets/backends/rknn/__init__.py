"""Target ``rknn``. See docs/targets/rknn.md.

Nothing is imported here: ``worker.py`` runs in the tool chain's environment, the back end in ours.
"""
