"""Optimizers and ways to tune what a training depends on."""
