"""Policies: velocity fields v(x, sigma, condition) with named weight slots."""
