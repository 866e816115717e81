"""Which layers gain from experts on ranges."""
