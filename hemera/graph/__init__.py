"""Snakemake's graph of a cohort: what would run and why, and records of what ran."""
