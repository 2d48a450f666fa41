"""Shared helpers: suggestions, argument checks, environment, safe reading and atomic writing of files."""
