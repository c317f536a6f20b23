"""For how many dynamic heads a prompt reserves host pages: the worst case while there is room, and else an estimate.

The scheduler reserves before the forward knows how many heads are dynamic. Where their number is a share of all heads,
worst case and estimate are the same; with a threshold, the worst case is seldom met. All ranks decide alike, so nothing
here may depend on what a rank alone knows.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Hashable
from fractions import Fraction

from sglang_hybridkv.requests.geometry import PromptGeometry
from sglang_hybridkv.requests.ledger import Reservation

_PROMPTS = 64  # that are remembered of each settings
_SETTINGS = 64
_MARGIN = Fraction(9, 8)


class RecentPlans:
    """What share of the heads that might be dynamic were so in the last prompts of each settings."""

    def __init__(self) -> None:
        self._shares: collections.OrderedDict[Hashable, collections.deque[Fraction]] = collections.OrderedDict()

    def note(self, settings: Hashable, reservation: Reservation, num_dynamic: int) -> None:
        """One more prompt, whose plan has, or would have had, `num_dynamic` dynamic heads on the neediest rank."""
        most = reservation.geometry.max_dynamic_heads
        if reservation.caps_plan and num_dynamic == reservation.most_dynamic < most:
            num_dynamic = min(2 * num_dynamic, most)  # it may have wanted more: nobody knows how many
            if num_dynamic == 0:
                return
        if most == 0:
            return
        shares = self._shares.pop(settings, collections.deque(maxlen=_PROMPTS))
        shares.append(Fraction(num_dynamic, most))
        self._shares[settings] = shares  # as the one that was used last
        if len(self._shares) > _SETTINGS:
            self._shares.popitem(last=False)

    def estimate(self, settings: Hashable, most: int) -> int:
        """Of `most` heads, the largest share of recent prompts and an eighth of it; all where nothing is known."""
        shares = self._shares.get(settings)
        # One at least: who gets none shows nothing of what it wanted, and would never get any again.
        return most if not shares else min(most, max(1, math.ceil(max(shares) * _MARGIN * most)))


def heads_to_reserve(
    geometry: PromptGeometry, estimate: int, *, free_pages: int, num_pages: int, head_pages_per_page: int
) -> int:
    """Dynamic heads for which a prompt reserves host pages, of which `free_pages` of `num_pages` are free.

    The worst case while less than half of the store is taken, so that a plan depends on prompt and settings alone as
    long as there is room. Then the `estimate`. In either case no more than is free.
    """
    most = min(geometry.max_dynamic_heads, free_pages * head_pages_per_page // geometry.num_prompt_pages)
    is_ample = 2 * (num_pages - free_pages) < num_pages
    return most if is_ample else min(most, estimate)
