"""Faults that several rooms' tests inject."""
import resource
from contextlib import contextmanager


@contextmanager
def file_size_limit(limit):
    """A disk that is full: no file of this process may grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
