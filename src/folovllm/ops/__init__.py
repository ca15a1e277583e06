"""The operations a model is written in: `abstract.Ops` is their contract, one file per implementation."""
