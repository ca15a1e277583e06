"""Other frameworks' interfaces to the store, and the options users give it there."""
