"""Metrics shared by training and evaluation. Importing this package imports nothing heavy."""
