"""Training loops that are not reinforcement learning, and checkpoints."""
