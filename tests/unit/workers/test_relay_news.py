"""News of ranks: what cannot be handed on is told as a loss."""

import pytest
from ray.exceptions import RayError

from serve.workers.launched_engine import RankEvent
from serve.workers.launchers.engine_host import relay_news


async def relay(news: list[list[RankEvent] | Exception]) -> tuple[list[RankEvent], list[str]]:
    heard: list[RankEvent] = []
    losses: list[str] = []

    async def next_news() -> list[RankEvent]:
        found = news.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def hand_on(events: list[RankEvent]) -> None:
        if (9, None) in events:
            raise KeyError(9)
        heard.extend(events)

    await relay_news(next_news, hand_on, losses.append)
    return heard, losses


@pytest.mark.parametrize("end", [[], RayError("the actor died")])
async def test_the_end_of_the_host_is_no_loss(end: list[RankEvent] | Exception) -> None:
    assert await relay([[(0, None), (1, None)], end]) == ([(0, None), (1, None)], [])


@pytest.mark.parametrize("odd", [[(9, None)], KeyError(9)])
async def test_news_that_cannot_be_handed_on_is_a_loss(odd: list[RankEvent] | Exception) -> None:
    heard, losses = await relay([[(0, None)], odd])
    assert heard == [(0, None)]
    assert losses == ["the news of its ranks is lost: KeyError: 9"]
