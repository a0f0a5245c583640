"""Infrastructure shared by the papers. Importing this package imports nothing heavy."""
