"""The status page and the metrics: what they show, to whom, and that names stay names."""

import http.client
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedft.core.errors import EnvironmentFailure
from fedft.server.identity import Client
from fedft.server.messages import Waiting
from fedft.server.standing import Board, Standing, Tally, View
from fedft.server.status import _Metrics, showing
from fedft.server.status_page import HEADERS, page
from fedft.trackers import Tracker
from fedft.trackers.told import Told

SCRIPT = "<script>document.title='owned'</script>"


def record(round_: int, **changes: Any) -> dict[str, Any]:
    line = {
        "round": round_,
        "cohort": ["ann", "bob"],
        "failures": {},
        "train": {"loss": 1 / round_},
        "bytes": {"up": 1000, "down": 2000},
        "seconds": {"plan": 0.5, "train": 1.5},
    }
    return {**line, **changes}


def view(standing: Standing | None = None, **changes: Any) -> View:
    ann = Client("ann", 1, "", "", serial="1", joined="2030-01-01", expires="2031-02-03T00:00:00")
    clients = (ann, replace(ann, name="bob", node=2, examples=7))
    fields = {"clients": clients, "connected": frozenset({"ann"}), "uptime_s": 75.0, "over": False}
    shown = standing or Standing("fedavg-lora", 20)
    return View(**{**fields, "run": "lab", "standing": shown, **changes})


def text_of(html: str) -> str:
    return re.sub(r"<[^>]*>", " ", html.split("</style>")[1])


class TestStanding:
    def test_rounds_add_up(self) -> None:
        failed = record(2, failures={"timeout": ["bob"], "norm": ["ann"]}, eval={"accuracy": 0.5})
        standing = Standing("x", 20).after([record(1), failed])
        assert (standing.round, standing.up, standing.down) == (2, 2000, 4000)
        assert standing.seconds == {"plan": 1.0, "train": 3.0}
        assert standing.failures == {"timeout": 1, "norm": 1}
        assert standing.sites == {"ann": Tally(2, 1), "bob": Tally(2, 1)}
        assert standing.after([record(3)]).scores == {"accuracy": 0.5}

    def test_a_long_run_costs_no_more_than_a_short_one(self) -> None:
        standing = Standing("x", 10_000).after(map(record, range(1, 10_001)))
        assert standing.round == 10_000
        assert len(standing.recent) <= 30 and len(page(view(standing))) < 100_000

    def test_a_board_passes_on_what_it_hears_and_keeps_the_last_of_it(self) -> None:
        class Ears(Tracker):
            heard: list[object] = []

            def round(self, line: Any, replies: Any) -> None:
                self.heard.append(line["round"])

            def note(self, text: str) -> None:
                self.heard.append(text)

        board = Board(Ears())
        board.round(record(1), [])
        for number in range(100):
            board.note(f"note {number}")
        assert Ears.heard[:2] == [1, "note 0"]
        assert board.standing.round == 1 and board.standing.notes[-1][1] == "note 99"
        assert len(board.standing.notes) < 50


WAITING = Waiting("round 3", "answered", 3, ("bob",), 2, since=100.0, ends=700.0)


class Ears(Tracker):
    """Keeps the notes it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, text: str) -> None:
        self.heard.append(text)


class TestWaiting:
    def at(self, monkeypatch: pytest.MonkeyPatch, now: float) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: now)

    def test_a_line_now_and_then(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every ten seconds of the first minute, then every minute; not in the page's notes."""
        ears = Ears()
        board = Board(ears)
        board.doing = lambda name: "training round 3"
        spoken: list[int] = []
        for second in range(200):
            self.at(monkeypatch, 100.0 + second)
            before = len(ears.heard)
            board.waiting(WAITING)
            spoken += [second] * (len(ears.heard) - before)
        assert spoken == [10, 20, 30, 40, 50, 110, 170]
        assert ears.heard[3].startswith(
            "round 3: 2 of 3 answered; waiting for bob (training round 3), 40 s; gives up at "
        )
        assert board.standing.notes == () and board.standing.waiting is WAITING
        board.waiting(None)
        assert board.standing.waiting is None

    def test_whoever_is_to_connect_is_told_of_at_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ears = Ears()
        board = Board(ears)
        self.at(monkeypatch, 100.0)
        board.waiting(replace(WAITING, verb="connected"))
        assert "2 of 3 connected; waiting for bob, 0 s" in ears.heard[0]

    def test_many_names_are_a_few_and_a_number(self) -> None:
        many = replace(WAITING, missing=tuple(f"site-{k}" for k in range(100)))
        assert "site-4, 95 more, " in many.line()
        assert "never gives up" in replace(WAITING, ends=float("inf")).line()

    def test_the_page_and_the_metrics_say_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at(monkeypatch, 140.0)
        shown = view(
            replace(Standing("x", 20, 2), waiting=WAITING),
            doing={"bob": "training round 3", "ann": "waiting"},
            turned_away={"eve": f"grants too little {SCRIPT}"},
        )
        html = page(shown)
        said = " ".join(text_of(html).split())
        assert "2 of 3 answered; waiting for bob (training round 3), 40 s; gives up at" in said
        assert "ann connected, waiting" in said and "bob training round 3" in said
        assert "Turned away client why eve grants too little" in said and "<script" not in html
        families = {
            f.name: f.samples[0].value for f in _Metrics(lambda: shown).collect() if f.samples
        }
        assert families["fedft_waiting_clients"] == 1
        assert families["fedft_waiting_done"] == 2
        assert families["fedft_waiting_seconds"] == 40
        assert families["fedft_waiting_left_seconds"] == 560
        assert families["fedft_clients_turned_away"] == 1

    def test_nobody_is_waited_for_most_of_the_time(self) -> None:
        html = page(view())
        assert "waiting for" not in html.replace("waiting for the first round", "")
        assert "Turned away" not in html
        families = {f.name: f.samples[0].value for f in _Metrics(view).collect() if f.samples}
        assert families["fedft_waiting_clients"] == families["fedft_waiting_seconds"] == 0

    def test_notes_from_two_threads_are_all_kept(self) -> None:
        """A client is turned away on one thread while a round is committed on another."""
        board = Board(Told([]))
        threads = [
            Thread(target=lambda: [board.note("x") for _ in range(300)]),
            Thread(target=lambda: [board.round(record(k), []) for k in range(1, 301)]),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert board.standing.round == 300 and board.standing.up == 300_000
        assert len(board.standing.notes) == 12


class TestPage:
    def test_it_says_how_far_the_run_is_and_who_is_there(self) -> None:
        standing = Standing("lora-fair", 20).after(
            [record(1), record(2, failures={"timeout": ["bob"]}, eval={"accuracy": 0.625})]
        )
        shown = " ".join(text_of(page(view(standing))).split())
        assert "lora-fair" in shown and "round 2 of 20" in shown
        assert "clients connected 1 of 2" in shown and "bob away 7" in shown
        assert "0.625" in shown and "bob (timeout)" in shown and "until" in shown
        assert "2031-02-03" in shown and "1 min 15 s" in shown

    def test_it_has_something_to_say_before_the_first_round_and_after_the_last(self) -> None:
        assert "waiting for the first round" in page(view(Standing()))
        assert "over, after 3 rounds" in page(view(Standing("x", 5, 3), over=True))
        assert "fedft invite" in page(view(clients=()))

    @pytest.mark.parametrize("where", ["name", "why", "reason", "note", "run", "strategy"])
    def test_text_from_elsewhere_stays_text(self, where: str) -> None:
        """Row 46."""
        standing = Standing(
            SCRIPT if where == "strategy" else "x",
            notes=(("00:00:00", SCRIPT if where == "note" else "-"),),
        )
        failures = {SCRIPT if where == "reason" else "timeout": ["ann"]}
        name = SCRIPT if where == "name" else "ann"
        client = Client(name, 1, "", "", why=SCRIPT if where == "why" else "")
        html = page(
            view(
                standing.after([record(1, failures=failures)]),
                clients=(client,),
                run=SCRIPT if where == "run" else "lab",
            )
        )
        assert "<script" not in html
        assert "&lt;script&gt;" in html

    def test_it_fetches_nothing_and_may_run_nothing(self) -> None:
        html = page(view())
        assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", html)
        assert "url(" not in html and "@import" not in html
        policy = HEADERS["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "unsafe" not in policy and "script-src" not in policy


def fetch(url: str, path: str = "", host: str = "", method: str = "GET") -> tuple[int, str, Any]:
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=10)
    try:
        connection.request(method, f"/{path}", headers={"Host": host} if host else {})
        reply = connection.getresponse()
        return reply.status, reply.read().decode(), reply.headers
    finally:
        connection.close()


@pytest.mark.deploy
class TestServer:
    def test_the_page_comes_with_its_policy(self) -> None:
        with showing("127.0.0.1", 0, view) as url:
            status, body, headers = fetch(url)
            assert (status, body) == (200, page(view()))
            assert headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert fetch(url, method="HEAD")[:2] == (200, "")
            assert fetch(url, "../config.toml")[0] == 404
            assert fetch(url, method="POST")[0] == 501  # there is nothing that one could change

    def test_another_sites_page_cannot_read_it_by_a_name_that_points_here(self) -> None:
        """DNS rebinding."""
        with showing("127.0.0.1", 0, view) as url:
            assert fetch(url, host="evil.example")[0] == 421
            assert fetch(url, host="localhost:1")[0] == 200
            assert fetch(url, host="[::1]:1")[0] == 200

    def test_prometheus_reads_the_same_numbers(self) -> None:
        standing = Standing("x", 20).after(
            [record(1), record(2, failures={'time"out\n': ["bob"]}, eval={"accuracy": 0.5})]
        )
        with showing("127.0.0.1", 0, lambda: view(standing)) as url:
            _, body, headers = fetch(url, "metrics")
        assert headers["Content-Type"].startswith("text/plain")
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
        }
        assert found["fedft_rounds_total",] == 2
        assert found["fedft_round_seconds_sum",] == 4.0
        assert found["fedft_round_phase_seconds_total", "train"] == 3.0
        assert found["fedft_wire_bytes_total", "received"] == 2000
        assert found["fedft_failures_total", "other"] == 1  # what is no word is no label
        assert found["fedft_clients_connected",] == 1
        assert found["fedft_clients", "joined"] == 2
        assert found["fedft_evaluation", "accuracy"] == 0.5
        assert found["process_resident_memory_bytes",] > 1e6

    def test_a_port_that_is_taken_is_said(self) -> None:
        with showing("127.0.0.1", 0, view) as url:
            port = int(url.rsplit(":")[-1].strip("/"))
            with (
                pytest.raises(EnvironmentFailure, match="cannot show the status"),
                showing("127.0.0.1", port, view),
            ):
                pass

    def test_a_hanging_reader_holds_nobody_up(self) -> None:
        with showing("127.0.0.1", 0, view) as url:
            hanging = http.client.HTTPConnection(url.split("/")[2])
            hanging.connect()
            try:
                assert fetch(url)[0] == 200
            finally:
                hanging.close()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def dom(url: str, folder: Path) -> str:
    """The document as Chromium has it after loading."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder}", "--disable-background-networking", url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return ran.stdout


def naive(html: str) -> Callable[..., BaseHTTPRequestHandler]:
    """A server of the kind that this one is not: it shows what it was given."""

    class Naive(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, *_: Any) -> None: ...

    return Naive


@pytest.mark.deploy
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_site_called_script_is_shown_as_text_by_a_browser(tmp_path: Path) -> None:
    client = Client(SCRIPT, 1, "", "", why=SCRIPT)
    with showing("127.0.0.1", 0, lambda: view(clients=(client,))) as url:
        shown = dom(url, tmp_path / "one")
    assert "<title>lab" in shown and "&lt;script&gt;" in shown
    # Positive control: the same text runs where nobody escapes it.
    html = f"<title>lab</title><p>{SCRIPT}</p>"
    server = ThreadingHTTPServer(("127.0.0.1", 0), naive(html))  # type: ignore[arg-type]
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        with urllib.request.urlopen(url, timeout=10) as reply:
            assert SCRIPT in reply.read().decode()
        assert "<title>owned" in dom(url, tmp_path / "two")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
