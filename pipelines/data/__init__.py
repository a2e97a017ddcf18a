"""Data sets of the programs."""
