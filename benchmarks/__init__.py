"""Programs that measure the toolkit, side by side with others where there are others."""
