"""What stands on finished models: evaluation, prediction, export, records and cards, reports. `python -m zoo` calls
it.
"""
