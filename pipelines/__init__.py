"""The programs, one per stage. Importing this package is free: `rlhf --help` answers before torch
is loaded.
"""
