"""processes.py: several processes that run one command: an error on any is said once and ends all.

Without this, one process would end with an error and the others wait for it until a timeout.
"""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from benchmarks.files import BenchmarkError
from distributed import World


def say_and_leave(world: World, message: str) -> NoReturn:
    """End with an error that all processes know of. The main one says it."""
    if world.is_main:
        raise BenchmarkError(message)
    sys.exit(1)


def together(world: World, action: Callable, *arguments) -> Any:
    """What action(*arguments) returns on this process. An error on any ends all. Collective."""
    value = None
    problem = None
    try:
        value = action(*arguments)
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = [text for text in world.gather(problem) if text is not None]
    if problems:
        say_and_leave(world, problems[0])
    return value


def on_main(world: World, action: Callable, *arguments) -> Any:
    """What action(*arguments) returns on the main process, for all. Collective."""

    def act_on_main():
        return action(*arguments) if world.is_main else None

    return world.gather(together(world, act_on_main))[0]
