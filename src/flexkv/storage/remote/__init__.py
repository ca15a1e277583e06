"""The remote tier: blocks by key in a store that several machines share; `factory.open_remote_store` opens one."""
