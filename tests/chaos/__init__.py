"""Chaos: real daemons and training runs that are killed, stopped, cut off, drained and flooded."""
