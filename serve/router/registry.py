"""Boards of this process, where both of their users find them.

A module-level table, against the rule: Ray Serve makes the request router of a deployment by itself, from a class that
it pickled by value, and hands it nothing but JSON; so there is no other way to hand it an object of the gateway. This
module is pickled by reference, and is one in each process. The gateway puts its boards here before it touches a handle.
"""

from collections.abc import Callable

from serve.router.board import RoutingBoard

_boards: dict[tuple[str, str], RoutingBoard] = {}


def register(app_name: str, deployment: str, board: RoutingBoard) -> None:
    """Make a board known as that of a model's deployment."""
    _boards[app_name, deployment] = board


def unregister(app_name: str, deployment: str) -> None:
    """Forget a board."""
    _boards.pop((app_name, deployment), None)


def find_or_make(app_name: str, deployment: str, make: Callable[[], RoutingBoard]) -> RoutingBoard:
    """Return the board of a deployment; a process that is no gateway gets one of its own."""
    board = _boards.get((app_name, deployment))
    if board is None:
        board = _boards[app_name, deployment] = make()
    return board
