"""What marks a row that only pads a batch, so that every process takes equally many steps."""

IGNORE_INDEX = -100
"""Target of a padded row: the value that `torch.nn.functional.cross_entropy` leaves out by default."""
