"""The shelf's routes, through a real server."""

import http.client
import io
import json
import urllib.error

import numpy as np
import pytest
from PIL import Image

from .shelf_files import DEMO_BASE, FOLDER, fill, folder_of
from .workflows import demo_loader, node, saving, training

SHELF = "/forget-me-not/shelf"


@pytest.fixture(scope="module")
def folder(server):
    yield fill(server.base)
    for path in folder_of(server.base).iterdir():
        path.unlink()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def entry(server, name, place=FOLDER):
    found = server.get(SHELF)["patches"]
    return next(each for each in found if each["name"] == f"{place}/{name}")


def given(server, name):
    return {"folder": entry(server, name)["folder"], "name": f"{FOLDER}/{name}"}


def refused(call, status=400):
    """The sentence of an answer that refuses."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        call()
    body = caught.value.read()
    assert caught.value.code == status
    return json.loads(body)["error"] if status == 400 else body


def raw(server, path, body, kind, length=True):
    """Status of a POST as any page of the web could send it."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        headers = {"Content-Type": kind} if kind else {}
        content = body if length else iter([body])
        connection.request("POST", path, content, headers, encode_chunked=not length)
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_list(server, folder):
    dog = entry(server, "dog.safetensors")
    assert dog["concepts"] == [["dog", "object", "", ""]] and dog["base"] == DEMO_BASE
    assert dog["scores"] == {"UA": 0.97, "IRA": 0.914, "M-Score": 0.4123}
    assert dog["measured"] == ["Demo model", ["dog"]]
    assert entry(server, "santa.safetensors")["family"] == "sdxl"
    assert entry(server, "junk.safetensors")["problem"] == "damaged"
    assert server.get("/api" + SHELF) == server.get(SHELF)


def test_a_saved_patch_brings_its_thumbnail(server):
    """Save Forget Patch takes pictures, one before and one after."""
    prompt = demo_loader() | training(training_seed=71) | saving("shelf/shown")
    prompt["red"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0xFF0000)
    prompt["blue"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0x0000FF)
    prompt["both"] = node("ImageBatch", image1=["red", 0], image2=["blue", 0])
    prompt["save"]["inputs"]["thumbnail"] = ["both", 0]
    name = server.run(prompt)["save"]["text"][0]
    found = entry(server, name.removeprefix("shelf/"), "shelf")
    assert found["base"] == DEMO_BASE and found["folder"] == 1
    data = server.get(f"{SHELF}/picture", folder=1, name=name)
    picture = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    assert picture.shape == (64, 128, 3)
    assert np.abs(picture[32, 16] - (255, 0, 0)).max() < 12
    assert np.abs(picture[32, 112] - (0, 0, 255)).max() < 12


def test_a_picture_is_sent_as_one(server, folder):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    place = entry(server, "dog.safetensors")["folder"]
    connection.request("GET", f"{SHELF}/picture?folder={place}&name=shelf%20tests/dog.safetensors")
    answer = connection.getresponse()
    assert answer.read()[:3] == b"\xff\xd8\xff"
    assert answer.getheader("Content-Type") == "image/jpeg"
    assert answer.getheader("X-Content-Type-Options") == "nosniff"
    connection.close()


@pytest.mark.parametrize("place", ["", "x", "-1", "9", "99999", "²", "9" * 6000])
def test_no_picture(server, folder, place):
    name = f"{FOLDER}/dog.safetensors"
    get = server.get
    assert "There is no patch" in refused(lambda: get(f"{SHELF}/picture", folder=place, name=name))


def test_bases(server, folder):
    def base(kind, name):
        return server.get("/forget-me-not/base", kind=kind, name=name)

    sketch = base("demo", "")["sketch"]
    assert base("demo", "") == {"family": "demo", "base": DEMO_BASE, "sketch": sketch}
    assert len(sketch) == 14
    checkpoints = server.base / "models" / "checkpoints"
    (checkpoints / "shelf copy.safetensors").symlink_to(
        server.base / "custom_nodes" / "forget-me-not" / "demo" / "fmn-demo.safetensors"
    )
    (checkpoints / "shelf old.ckpt").write_bytes(b"a pickle")
    (checkpoints / "shelf bad.safetensors").write_bytes(b"bad")
    try:
        assert base("checkpoints", "shelf copy.safetensors") == base("demo", "")
        assert base("checkpoints", "shelf old.ckpt") == {"family": "", "base": "", "sketch": []}
        told = refused(lambda: base("checkpoints", "shelf bad.safetensors"))
        assert "damaged or not a safetensors file" in told
    finally:
        for name in ("shelf copy.safetensors", "shelf old.ckpt", "shelf bad.safetensors"):
            (checkpoints / name).unlink()
    for kind, name in (
        ("checkpoints", "../../output/x.safetensors"), ("checkpoints", "/etc/passwd"),
        ("loras", "x"), ("", ""), ("../..", "x"),
    ):  # fmt: skip
        assert "There is no" in refused(lambda kind=kind, name=name: base(kind, name))


def test_notes_rename_delete(server, folder):
    server.post(f"{SHELF}/notes", given(server, "gogh.safetensors") | {"notes": "good\nat 0.8"})
    assert entry(server, "gogh.safetensors")["notes"] == "good\nat 0.8"
    others = given(server, "gogh.safetensors") | {"notes": "bad", "before": ""}
    assert "changed elsewhere" in refused(lambda: server.post(f"{SHELF}/notes", others))
    answer = server.post(f"{SHELF}/rename", given(server, "gogh.safetensors") | {"to": "van"})
    assert answer == {"done": f"{FOLDER}/van.safetensors"}
    assert entry(server, "van.safetensors")["notes"] == "good\nat 0.8"
    listed = server.get("/models/forget_patches")
    assert f"{FOLDER}/van.safetensors" in listed and f"{FOLDER}/gogh.safetensors" not in listed
    gone = server.post(f"{SHELF}/delete", given(server, "van.safetensors"))
    assert gone == {"done": ["van.safetensors", "van.fmn.json"]}
    assert "van.safetensors" not in files(folder)


@pytest.mark.parametrize("what", ["rename", "delete", "notes"])
@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "../../forget_patches/x.safetensors", None, 3]
)
def test_nothing_but_what_is_listed(server, folder, what, name):
    secret = folder.parent.parent / "secret.safetensors"
    secret.write_bytes(b"mine")
    before = files(folder)
    body = {"folder": 0, "name": name, "to": "new", "notes": "new"}
    assert "There is no patch" in refused(lambda: server.post(f"{SHELF}/{what}", body))
    assert secret.read_bytes() == b"mine" and files(folder) == before
    secret.unlink()


@pytest.mark.parametrize("to", ["../up", "a/b", "con", "", None, "cat"])
def test_bad_new_names(server, folder, to):
    before = files(folder)
    body = given(server, "dog.safetensors") | {"to": to}
    assert refused(lambda: server.post(f"{SHELF}/rename", body))
    assert files(folder) == before


def test_other_sites_cannot_make_a_browser_do_it(server, folder):
    """A form of another site has one of three types; JSON it may not send without asking."""
    body = json.dumps(given(server, "dog.safetensors")).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        assert raw(server, f"{SHELF}/delete", body, kind) == 415
    assert "dog.safetensors" in files(folder)


def test_odd_requests(server, folder):
    json_type = "application/json"
    for body in (b"", b"{", b"[]", b"3", b"\xff", b"[" * 60_000):
        assert raw(server, f"{SHELF}/delete", body, json_type) == 400
    assert raw(server, f"{SHELF}/delete", b" " * 100_000, json_type) == 413
    assert raw(server, f"{SHELF}/delete", b"{}", json_type, length=False) == 411
    assert "Notes are a text" in refused(
        lambda: server.post(f"{SHELF}/notes", given(server, "dog.safetensors") | {"notes": 3})
    )


def test_a_file_is_known_by_either_slash(pack, monkeypatch):
    """On Windows ComfyUI's list has backslashes; the shelf and workflows from elsewhere do not."""
    patch = pack("nodes.patch")
    known = patch.LoadForgetPatch.validate_inputs
    monkeypatch.setattr(patch.os, "sep", "\\")
    monkeypatch.setattr(patch.folder_paths, "get_filename_list", lambda kind: ["new\\dog"])
    monkeypatch.setattr(patch.folder_paths, "get_full_path", lambda kind, name: f"C:\\{name}")
    assert known("new/dog") is known("new\\dog") is known(file=None) is known() is True
    assert known("new/cat").startswith("There is no patch 'new/cat' in models/forget_patches")


def test_no_traceback_in_the_log(server, folder):
    """What is refused is refused on purpose."""
    assert "fmn/shelf" not in server.log_text() and "nodes/shelf" not in server.log_text()
