"""A multi-tier KV cache store: engine device memory, host memory, SSD and remote storage behind one API.

Three layers: `integration` (other frameworks' interfaces), management (`kvmanager`, `kvtask`, `server`) and the engine
(`cache` decides, `transfer` moves, `storage` keeps). Start reading at `kvmanager.KVManager`.
"""
