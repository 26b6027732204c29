"""A real small language model, SmolLM2-135M-Instruct, and text of Debian's package descriptions."""
