"""What everybody may use: suggestions, checks, environment, files read without trust and written whole."""
