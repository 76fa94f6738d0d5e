"""Who is told of a run while it goes: experiment trackers, through accelerate."""
