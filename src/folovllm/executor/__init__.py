"""How many workers there are and where: the engine core talks to `abstract.Executor`, which `factory` chose."""
