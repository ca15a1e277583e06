"""How the store and the processes that hold device memory speak: private sockets, typed messages, deadlines."""
