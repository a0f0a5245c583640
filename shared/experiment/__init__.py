"""Artifacts, studies, launcher, records, statistics, claims, canaries, tables, plots."""
