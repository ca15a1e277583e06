"""`python -m folovllm`: the same as the `folovllm` script."""

from folovllm.entrypoints.cli import main

if __name__ == "__main__":
    main()
