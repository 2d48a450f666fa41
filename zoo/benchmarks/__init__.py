"""Measurements behind every figure that the zoo states: one module per family, run as `python -m zoo benchmark FAMILY`.

A module has `COMMANDS`, a dictionary from a command's name to a function that takes a results folder and yields lines
of text as it goes. Rows are kept in CSV files and a second run continues where the first one stopped.
"""
