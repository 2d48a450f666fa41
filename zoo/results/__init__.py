"""Rows of measurements and runs, how they are timed, and the tables written from them."""
