"""From a configuration to a trained, tracked, saved and resumable model."""
