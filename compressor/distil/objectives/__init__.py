"""What a student can learn from its teacher: pure tensor functions with declared needs, found by entry point."""
