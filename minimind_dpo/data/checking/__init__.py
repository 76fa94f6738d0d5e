"""`minimind-dpo data check`: what is wrong with preference data, found in one pass and before a run is spent on it."""
