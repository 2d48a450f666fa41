"""Tools for trained models, behind `python -m zoo`: evaluation, prediction, export, records, cards, reports."""
