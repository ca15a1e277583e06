"""Building blocks that every dense architecture shares."""
