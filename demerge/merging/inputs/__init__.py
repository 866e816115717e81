"""What goes into a merge: experts, their denoisers and other parts, statistics for methods."""
