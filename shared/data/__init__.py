"""Data: catalog and resolver, generated verifiable tasks."""
