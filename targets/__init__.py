"""All that a device needs: compile, run, measure, gate, report, package. Knows nothing of how a student was made."""
