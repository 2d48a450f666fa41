"""Measurements behind every figure that the zoo states: `python -m zoo benchmark FAMILY NAME`.

Each is a function that takes a results folder and yields lines of text as it goes; `zoo.cli` lists them. Rows are kept
in CSV files, each with its date, commit, threads, how they wait, load and machine; a second run continues where the
first one stopped, and the table in RESULTS.md is written from the rows.
"""
