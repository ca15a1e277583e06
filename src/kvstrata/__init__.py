"""The command line, the demo stack and its workload: thin glue over `folovllm`, `flexkv` and `kvrouter`."""
