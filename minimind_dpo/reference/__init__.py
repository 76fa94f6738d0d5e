"""Against what: where reference log-probabilities come from."""
