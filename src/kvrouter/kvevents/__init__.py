"""The event path: sockets -> order per pod -> index.

`zmq_subscriber` reads every pod's socket in one thread, `adapters` says whose message it is, `pool` hands it to the
worker that owns that pod, `recovery` decides what its sequence number means, and the index's applier enters it.
`subscriber_manager` adds and removes pods while all of that runs.
"""
