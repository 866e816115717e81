"""What goes into a merge: experts, their denoisers and other components, and the statistics that a method asks for."""
