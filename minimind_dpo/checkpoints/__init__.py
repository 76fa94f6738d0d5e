"""How the state of a run is kept."""
