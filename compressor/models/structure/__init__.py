"""The dependency graph of a module: which channels, neurons and heads can go, and what must go with them."""
