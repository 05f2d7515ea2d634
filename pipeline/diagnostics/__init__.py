"""Numbers that say how a run is doing: per-step metrics and text statistics."""
