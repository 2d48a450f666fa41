"""Learners: fitted in closed form, by ridge solves and sums, without steps along gradients."""
