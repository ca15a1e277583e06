"""Where every KV block of a fleet is, and which pod to ask.

Events from the engines (`kvevents`) fill an index (`kvblock`); a prompt becomes token ids (`tokenization`), then block
keys, then per-pod scores (`indexer.Indexer`); the `proxy` sends each request to the pod that costs least.
"""
