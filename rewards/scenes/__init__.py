"""A procedural world with known truth: specs, pictures and an oracle."""
