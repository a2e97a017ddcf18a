"""placeholder"""
def gate(value, low=0.3, high=0.7):
    """0 below `low`, 1 from `high`, straight between: an edit not done has kept nothing."""
    return min(1.0, max(0.0, (value - low) / (high - low)))
