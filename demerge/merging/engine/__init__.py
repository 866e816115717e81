"""The engine: a merge as a stream of chunks, shared by workers, or kept in memory."""
