"""Checks that look on and change nothing: power, canary, teacher hacking, label smoothing. numpy only."""
