"""How many workers there are and where: the engine core talks to `abstract.Executor` only."""
