"""The phases of a run's search."""

from enum import Enum
from typing import Any


class SearchPhase(Enum):
    """Where a run's search stands; `ParsingModule` alone moves it on, from one member to the next.

    A run without a search is done from the start.
    """

    SEARCHING = "searching"
    HOLDING_OUT = "holding out"
    """The receptive field is final; the held-out images come back with the next epoch."""
    DONE = "done"

    @classmethod
    def saved_in(cls, checkpoint: dict[str, Any]) -> "SearchPhase":
        """The phase that a training's checkpoint was saved in.

        >>> SearchPhase.saved_in({"search": {"search": {"done": True}, "holding_out": True}})
        <SearchPhase.HOLDING_OUT: 'holding out'>
        """
        saved = checkpoint.get("search")
        if saved is None:
            return cls.DONE
        if not saved["search"]["done"]:
            return cls.SEARCHING
        return cls.HOLDING_OUT if saved.get("holding_out") else cls.DONE
