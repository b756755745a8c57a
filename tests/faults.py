"""Faults that several rooms' tests inject."""
import contextlib, os, resource, signal
from contextlib import contextmanager


@contextmanager
def file_size_limit(limit):
    """A disk that is full: no file of this process may grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def forked(function, *arguments) -> int:
    """A copy of this process that calls `function` and ends, with code 1 if that raises; its number. What was compiled and imported it has already."""
    process = os.fork()
    if process: return process
    code = 1
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere): function(*arguments)
        code = 0
    except BaseException: pass   # a test looks at the code alone
    finally: os._exit(code)


def killed_before_file_operation(function, folder, number) -> bool:
    """Call `function(folder)` in a process that is killed before its file operation `number`; False if it has fewer."""
    def run(folder):
        left = [number]
        def counted(operation):
            def wrapper(*arguments, **options):
                if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return operation(*arguments, **options)
            return wrapper
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync"): setattr(os, name, counted(getattr(os, name)))
        function(folder)
    return os.WIFSIGNALED(os.waitpid(forked(run, folder), 0)[1])
