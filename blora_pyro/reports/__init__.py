"""Progress of a run, shown on a terminal."""
