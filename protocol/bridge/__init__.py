"""Two networks made one swarm: what passes between the two sides of a bridge, and by which rules."""
