"""Errors of the command line and the demo stack."""


class KVStrataError(Exception):
    """Base of every error this package raises on purpose."""


class StackError(KVStrataError):
    """A process of the stack did not start or died; the message carries the end of its log."""
