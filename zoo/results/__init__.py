"""Measurements and runs: CSV rows, timing, and the tables generated from them."""
