"""The embedded demo: a small world, a tiny MiniMind that talks about it, and pairs that make it listen."""
