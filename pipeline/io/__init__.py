"""Everything that touches files, clocks, devices or servers."""
