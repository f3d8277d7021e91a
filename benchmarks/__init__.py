"""Measurements beside peers; each writes JSON to benchmarks/results/."""
