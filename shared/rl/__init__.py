"""Reinforcement learning: loss pipeline, baseline losses, advantages, trainers."""
