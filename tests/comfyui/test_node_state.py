"""What nodes remember and send, in this process: with a stand-in for the server, and with none."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest


@pytest.fixture
def live(pack):
    return pack("nodes.live_training")


@pytest.fixture
def server(pack, live, monkeypatch):
    """A server that notes what it sends. ``server.node`` is the node that is running."""
    page, sent = pack("nodes.page"), []
    server = SimpleNamespace(
        client_id="me",
        node="1",
        sent=sent,
        app={live.STATES: live.TrainingStates()},
        send_sync=lambda event, data, client: sent.append((event, data, client)),
        prompt_queue=SimpleNamespace(currently_running={}),
    )

    def context():
        return SimpleNamespace(node_id=server.node, prompt_id="p")

    monkeypatch.setattr(page, "PromptServer", SimpleNamespace(instance=server))
    monkeypatch.setattr(page, "get_executing_context", context)
    return server


def test_a_curve_stays_small_and_keeps_both_ends(live):
    curve = live.Curve()
    for index in range(1, 5001):
        curve.add(index, index / 3)
        assert len(curve.points) <= live.MOST_POINTS and curve.points[-1][0] == index
    indices = [index for index, _ in curve.points]
    assert indices[0] <= 64 and len(indices) > live.MOST_POINTS // 3
    gaps = {b - a for a, b in zip(indices, indices[1:-1])}
    assert len(gaps) == 1
    curve.add(5001, float("nan"))
    assert curve.points[-1] == (5000, 1666.67)


def test_what_a_curve_has_handed_out_does_not_change(live):
    """The server's thread may be writing it out while the node adds points."""
    curve, handed_out = live.Curve(), []
    for index in range(1, 1001):
        curve.add(index, 1.0)
        handed_out.append((curve.points, list(curve.points)))
    assert all(list(points) == copy for points, copy in handed_out)


def test_only_the_last_states_are_kept(live, server):
    states = server.app[live.STATES]
    for number in range(live.MOST_NODES + 5):
        server.node = str(number)
        with live.LiveTraining("x" * 10_000) as shown:
            shown.note("y" * 10_000)
    kept = [state["node"] for state in states.of("me")]
    assert kept == [str(number) for number in range(5, live.MOST_NODES + 5)]
    assert states.of("somebody else") == []
    assert [data["status"] for _, data, _ in server.sent[:2]] == ["running", "done"]
    assert all(len(json.dumps(data)) < 2000 for _, data, _ in server.sent)


def test_what_was_sent_does_not_change(live, server):
    with live.LiveTraining("dog") as shown:
        for _ in range(3):
            shown.note("a note")
            shown.send()
    assert [data["note"] for _, data, _ in server.sent] == ["", *["a note"] * 4]
    assert [data["status"] for _, data, _ in server.sent] == [*["running"] * 4, "done"]


def test_a_run_that_a_program_queued_tells_nobody(live, server, pack):
    server.client_id = None
    with live.LiveTraining("dog"):
        pack("nodes.page").show_text("step 1")
    assert server.sent == [] and server.app[live.STATES].of(None) == []


def test_without_a_server_the_nodes_are_there_all_the_same(pack, live, monkeypatch):
    """As in tools that import the pack to read its nodes, or that call one."""
    monkeypatch.setattr(pack("nodes.page"), "PromptServer", type("PromptServer", (), {}))
    with ThreadPoolExecutor(1) as pool:  # in this thread the browser's loop may be running
        nodes = pool.submit(asyncio.run, pack("nodes").ForgetMeNot().get_node_list()).result()
    assert len(nodes) > 30 and all(node.define_schema().node_id for node in nodes)
    pack("nodes.page").show_text("step 1")
    with live.LiveTraining("dog") as shown:
        shown.send()


def test_deleted_files_change_a_folder_once(pack, tmp_path):
    made = pack("nodes.batch").FilesMade()
    files = [tmp_path / name for name in ("dog", "cat")]
    for file in files:
        file.touch()
    assert made.version(tmp_path) == 0
    made.add(tmp_path, files)
    assert made.version(tmp_path) == 0
    files[0].unlink()
    lost = made.version(tmp_path)
    assert lost != 0 and made.version(tmp_path) == lost
    files[0].touch()
    made.add(tmp_path, files)
    assert made.version(tmp_path) == lost


def test_a_forgotten_folder_is_not_taken_for_unchanged(pack, tmp_path):
    made = pack("nodes.batch").FilesMade(most=2)
    versions = {}
    for name in ("a", "b", "c", "d"):
        folder = tmp_path / name
        versions[name] = made.version(folder)
        made.add(folder, [])
    assert made.version(tmp_path / "a") != versions["a"]
    assert made.version(tmp_path / "b") != versions["b"]
    assert made.version(tmp_path / "d") == versions["d"]
