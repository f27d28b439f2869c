"""command.py: how a command ends: in one line, whatever ends it, and not in a traceback."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def command(*expected: type[Exception], advice: str = "") -> Iterator[None]:
    """What a command does: a decorator of its main function, or a block in it.

    An expected error is said in one line, with exit status 1, and so is a lack of memory. So is
    Ctrl-C, with status 130 and the advice on how to go on. A reader of standard output that has
    left, as `| head -1` does, ends the command without a word.
    """
    try:
        yield
    except BrokenPipeError:
        pass
    except KeyboardInterrupt:
        print(f"stopped{advice}", file=sys.stderr)
        sys.exit(130)
    except expected as error:
        # Imported here, since a score of responses needs nothing that opens pictures.
        from rows import printable

        sys.exit(printable(f"error: {error}"))
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        from rows import first_line

        sys.exit(
            f"error: out of memory ({first_line(error)}); smaller images, shorter responses or "
            "fewer of them at once take less"
        )
    finally:
        _flush_output()


def _is_lack_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules:
        return False
    from model import is_out_of_memory

    return is_out_of_memory(error)


def _flush_output() -> None:
    """Write what standard output still holds, or drop it where nobody reads it any more.

    Otherwise Python would try once more when it ends, and complain.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
