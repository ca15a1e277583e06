"""What engine comparisons share: the checkpoint, the processes under test, the machine's limits, vLLM's environment."""
