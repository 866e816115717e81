"""What a merge did to its experts: the diagnosis and the report."""
