"""Graders of model answers, used by RL rewards and by evaluation. Importing this package imports nothing heavy."""
