"""The data plane: runs the op graphs that the cache layer plans, one worker per path."""
