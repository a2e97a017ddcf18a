"""The networks that judges stand on, each opened from a folder or a hub id."""
