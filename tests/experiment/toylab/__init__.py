"""A torch-free experiment for the tests of the launcher: an importable package, as papers are."""
