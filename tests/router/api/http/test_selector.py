"""Two tiers of events: connections cannot delay what the loop itself waits for."""

import asyncio
import contextlib
import itertools
import random
import selectors
import socket
from typing import Any, cast

import pytest
import uvicorn

from twostroke.router.api.http import connections
from twostroke.router.api.http.connections import Connections
from twostroke.router.api.http.selector import MAX_EVENTS, TieredSelector

NUM_CONNECTIONS = 100
REQUEST = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


def answer_of(client: socket.socket) -> bool:
    """Read until the body has come; False: the server closed before."""
    got = b""
    while not got.endswith(b"ok"):
        part = client.recv(4096)
        if not part:
            return False
        got += part
    return True


@pytest.fixture
def selector():
    tiered = TieredSelector()
    yield tiered
    tiered.close()


@pytest.fixture
def pairs():
    made = [socket.socketpair() for _ in range(NUM_CONNECTIONS)]
    yield made
    for pair in made:
        for end in pair:
            end.close()


def test_few_connections_are_taken_at_a_time_and_each_has_its_turn(selector: TieredSelector, pairs: list[Any]):
    waker, wakes = pairs[0]
    selector.register(waker, selectors.EVENT_READ, "first")
    for ours, theirs in pairs[1:]:
        selector.demote(ours.fileno())
        selector.register(ours, selectors.EVENT_READ, ours)
        theirs.send(b"x")
    seen: set[Any] = set()
    for turn in range(2 * NUM_CONNECTIONS // MAX_EVENTS):
        if turn % 2:
            wakes.send(b"x")
        ready = [key.data for key, _ in selector.select(0)]
        assert ("first" in ready) == bool(turn % 2), "what the loop waits for is taken at once"
        if turn % 2:
            waker.recv(1)
        assert len(ready) <= MAX_EVENTS + 1
        seen.update(ready)
    assert len(seen) == NUM_CONNECTIONS, "none is left out, though none was ever read"


def test_a_descriptor_is_in_one_tier_until_it_is_forgotten(selector: TieredSelector, pairs: list[Any]):
    (ours, theirs), *others = pairs
    selector.demote(ours.fileno())
    theirs.send(b"x")
    for other, its_peer in others:
        selector.demote(other.fileno())
        selector.register(other, selectors.EVENT_READ)
        its_peer.send(b"x")
    selector.register(ours, selectors.EVENT_READ)
    selector.unregister(ours)  # reading pauses
    selector.register(ours, selectors.EVENT_READ | selectors.EVENT_WRITE)  # and goes on
    assert len(selector.select(0)) == MAX_EVENTS
    selector.unregister(ours)
    selector.forget(ours.fileno())
    selector.register(ours, selectors.EVENT_READ, "again")
    assert selector.select(0)[0][0].data == "again"


def test_it_answers_as_the_standard_selector_does(selector: TieredSelector, pairs: list[Any]):
    """The same steps on both, of either tier: reads, writes, changes, hang-ups, what is unknown, what is closed."""
    for is_demoted in (False, True):
        told: list[list[Any]] = []
        for number, tried in enumerate((selectors.EpollSelector(), selector)):
            ours, theirs = pairs[2 * is_demoted + number]
            if is_demoted and tried is selector:
                selector.demote(ours.fileno())
            said: list[Any] = []
            told.append(said)
            with pytest.raises(KeyError):
                tried.get_key(ours)
            with pytest.raises(KeyError):
                tried.unregister(ours)
            with pytest.raises(KeyError):
                tried.modify(ours, selectors.EVENT_READ)
            key = tried.register(ours, selectors.EVENT_READ, "read")
            assert (key.fileobj, key.fd, tried.get_key(ours.fileno())) == (ours, ours.fileno(), key)
            with pytest.raises(KeyError):
                tried.register(ours, selectors.EVENT_READ)
            said.append([(key.data, events) for key, events in tried.select(0)])
            theirs.send(b"x")
            said.append([(key.data, events) for key, events in tried.select(1)])
            tried.modify(ours, selectors.EVENT_WRITE, "write")
            said.append([(key.data, events) for key, events in tried.select(-1)])
            tried.modify(ours, selectors.EVENT_READ | selectors.EVENT_WRITE, "both")
            theirs.close()
            said.append([(key.data, events) for key, events in tried.select(None)])
            said.append(len(tried.get_map()))
            ours.close()
            tried.unregister(key.fd)
            said.append((len(tried.get_map()), tried.select(0)))
        assert told[0] == told[1]
        assert told[0][1] == [("read", selectors.EVENT_READ)]


@pytest.mark.parametrize("seed", range(20))
def test_it_does_what_the_standard_selector_does_whatever_happens_to_the_files(seed: int):
    """Random steps on both, over four sockets that close, are closed by their peers, and leave their numbers to others.

    Both register the same sockets, and see the same of them: four are fewer than `MAX_EVENTS`.
    """
    rng = random.Random(seed)
    for _ in range(20):
        standard, tiered = selectors.EpollSelector(), TieredSelector()
        pairs = [socket.socketpair() for _ in range(4)]
        for _ in range(60):
            at = rng.randrange(4)
            ours, theirs = pairs[at]
            match step := rng.choice(("register", "modify", "unregister", "get_key", "select", "send", "hang up")):
                case "send" if theirs.fileno() >= 0:
                    with contextlib.suppress(OSError):
                        theirs.send(b"x")
                case "hang up":
                    rng.choice((ours, theirs)).close()
                    if rng.random() < 0.5:
                        ours.close()
                        theirs.close()
                        pairs[at] = socket.socketpair()  # mostly under the same numbers
                case "register" | "modify":
                    if rng.random() < 0.5 and ours.fileno() >= 0:
                        tiered.demote(ours.fileno())
                    words = (ours, rng.choice((1, 2, 3)), at)
                    assert done(standard, step, *words) == done(tiered, step, *words)
                case "unregister" | "get_key":
                    assert done(standard, step, ours) == done(tiered, step, ours)
                case "select":
                    assert done(standard, step, 0) == done(tiered, step, 0)
        standard.close()
        tiered.close()
        assert tiered._first.closed
        assert tiered._second.closed
        for pair in pairs:
            for end in pair:
                end.close()


def done(tried: selectors.BaseSelector, step: str, *words: Any) -> Any:
    """What a step gives, in an order that does not depend on the selector; or the kind of error."""
    try:
        found = getattr(tried, step)(*words)
    except (KeyError, ValueError, OSError) as error:
        return type(error)
    return sorted((key.fd, events) for key, events in found) if step == "select" else found


def test_a_server_over_it_answers_and_what_closes_at_once_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch):
    """Hundreds of connections are answered, then closed in one moment; another thread's calls come between."""
    monkeypatch.setattr(connections, "ACCEPTS_PER_WINDOW", 30)
    monkeypatch.setattr(connections, "ACCEPT_WINDOW_S", 0.05)
    accepted: dict[float, int] = {}  # of each window, by its end
    tiered = TieredSelector()
    turns: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def run() -> None:
        among = Connections(NUM_CONNECTIONS, 5.0, tiered)
        listener = socket.create_server(("127.0.0.1", 0))
        among.pace([listener.fileno()])

        def protocol(**known: Any) -> Any:
            made = among.protocol(**known)
            accepted[among._window_end_s] = accepted.get(among._window_end_s, 0) + 1
            return made

        server = uvicorn.Server(
            uvicorn.Config(app, http=cast(Any, protocol), ws="none", lifespan="off", log_level="critical", backlog=1)
        )
        running = asyncio.create_task(server._serve([listener]))
        loop = asyncio.get_running_loop()
        clients = [socket.create_connection(listener.getsockname()) for _ in range(NUM_CONNECTIONS)]
        for client in clients:
            client.sendall(REQUEST)
        for client in clients:
            assert await loop.run_in_executor(None, answer_of, client)
        assert len(among) == NUM_CONNECTIONS
        for client in clients:
            client.close()
        while len(among):
            turns.append(len(among))
            await asyncio.sleep(0)
        assert not tiered._demoted, "the number of a closed connection may name another file next"
        assert not among._idle
        assert not among._heads
        server.should_exit = server.force_exit = True
        await running

    async def bounded() -> None:
        async with asyncio.timeout(240):
            await run()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(tiered)) as runner:
        runner.run(bounded())
    gone = [before - after for before, after in itertools.pairwise(turns)]
    assert max(gone) <= MAX_EVENTS
    assert len(gone) >= NUM_CONNECTIONS // MAX_EVENTS
    assert sum(accepted.values()) == NUM_CONNECTIONS
    assert max(accepted.values()) <= 32  # asyncio makes the protocol a turn after it accepted
