"""Model analysis: probes compute a number, a table or a picture for any model; plots draw."""
