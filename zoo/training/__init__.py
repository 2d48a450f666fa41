"""Training runs: from a configuration to a trained, tracked, saved and resumable model."""
