"""One folder per paper. Importing this package imports nothing heavy."""
