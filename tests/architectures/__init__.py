"""The architecture sweep: a tiny model of every type, trained for three steps, and what the monitor saw of it."""
