"""Where bytes live: the pool of the CPU tier."""
