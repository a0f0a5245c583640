"""Evaluation harness. Importing this package imports nothing heavy."""
