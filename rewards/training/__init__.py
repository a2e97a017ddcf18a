"""What a reward model is trained on and with: pure functions and records, no loop and no files but
the data sets.
"""
