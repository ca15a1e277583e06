"""What a KV block is called everywhere: its chained hash, and the events that announce it.

Read in this order: `hashing` (token ids -> chained block hashes, bit for bit vLLM's) with `extra_keys` (what enters a
hash beside tokens), `events` (the structs and their two wire layouts), `publisher` (events -> ZMQ, with a replay
socket), `replay` (the client of that socket). `errors` lists what can go wrong; `_native` is csrc/kvblocks.
"""
