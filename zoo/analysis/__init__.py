"""Probes: a number, a table or a picture about any model."""
