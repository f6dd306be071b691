"""Uploading and opening by name, against a stand-in of the hub on this machine."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

import qcore
from qcore.tools import hub


class Hub(ThreadingHTTPServer):
    """Repositories as {name: {revision: {file: bytes}}}; large files go through the LFS part of the protocol."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.objects, self.tokens, self.refuses = {}, {}, [], False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value=None, status=200, headers=None, body=None):
        data = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for key, each in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, each)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        server, path, data = self.server, self.path.split("?")[0], self.body()
        server.tokens.append(self.headers.get("Authorization"))
        if server.refuses:
            return self.answer({"error": "no"}, 403, {"X-Error-Message": "You may not write here"})
        if path == "/api/repos/create":
            wanted = json.loads(data)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            server.repos.setdefault(name, {"main": {}})
            return self.answer({"url": f"{server.url}/{name}", "name": name, "id": "1"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)", path)
        if found is None and path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{server.url}/lfs/{each['oid']}", "header": {}}}}
                for each in json.loads(data)["objects"]
            ]
            return self.answer(
                {"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"}
            )
        if found is None:
            return self.answer({"error": path}, 404)
        name, what, revision = found.group(1), found.group(2), unquote(found.group(3))
        if what == "branch":
            server.repos[name].setdefault(revision, {})
            return self.answer({})
        if what == "preupload":
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(data)["files"]
            ]
            return self.answer({"files": files})
        for line in data.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                server.repos[name][revision][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                server.repos[name][revision][value["path"]] = server.objects[value["oid"]]
        return self.answer(
            {"success": True, "commitOid": "c" * 40, "commitUrl": f"{server.url}/{name}/commit/{'c' * 40}"}
        )

    def do_PUT(self):
        data = self.body()
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_GET(self):
        path = unquote(self.path.split("?")[0])
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if info:
            files = self.revision(info.group(1), info.group(3))
            if files is None:
                return self.answer(
                    {"error": "absent"},
                    404,
                    {"X-Error-Code": "RevisionNotFound" if info.group(1) in self.server.repos else "RepoNotFound"},
                )
            if info.group(2) == "tree":
                return self.answer(
                    [{"type": "file", "path": each, "size": len(data), "oid": "0"} for each, data in files.items()]
                )
            return self.answer(
                {
                    "id": info.group(1),
                    "sha": self.sha(info.group(3)),
                    "siblings": [{"rfilename": each} for each in files],
                }
            )
        if file:
            files = self.revision(file.group(1), file.group(2))
            if files is None or file.group(3) not in files:
                return self.answer({"error": "absent"}, 404, {"X-Error-Code": "EntryNotFound"})
            data = files[file.group(3)]
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": self.sha(file.group(2)),
                "Content-Type": "application/octet-stream",
            }
            return self.answer(headers=headers, body=data)
        return self.answer({"error": path}, 404)

    do_HEAD = do_GET

    def revision(self, name, revision):
        revisions = self.server.repos.get(name, {})
        return revisions.get(
            revision, next((files for each, files in revisions.items() if self.sha(each) == revision), None)
        )

    def sha(self, revision):
        return hashlib.sha1(revision.encode()).hexdigest() if len(revision) != 40 else revision


@pytest.fixture
def server():
    made = Hub()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def online(server, tmp_path):
    """A function that runs Python in a process which takes the stand-in for the hub."""

    def run(code, expect=0):
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "secret",
                       "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == expect, result.stderr
        return result.stdout if expect == 0 else result.stderr

    return run


@pytest.fixture(scope="module")
def gptq(llama_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("hub") / "gptq"
    return qcore.quantize(llama_folder, "rtn", group_size=32, output=target)


def test_a_folder_goes_up_whole_and_comes_down_by_name_and_revision(server, online, gptq):
    code = f"""
import qcore, torch
print(qcore.push_to_hub({str(gptq)!r}, "org/tiny", evaluation={{"perplexity": 12.3456, "kl": 0.0123}}))
print(qcore.push_to_hub({str(gptq)!r}, "org/tiny", revision="v2", message="second"))
first = qcore.load({str(gptq)!r}); ids = torch.arange(9)[None]
for name, revision in (("org/tiny", None), ("org/tiny", "v2")):
    model = qcore.load(name, revision=revision)
    assert torch.equal(model(ids).logits, first(ids).logits)
print(qcore.convert("org/tiny", {str(gptq.parent / "converted")!r}, "awq"))
"""
    out = online(code).splitlines()
    assert out[0] == f"{server.url}/org/tiny/commit/{'c' * 40}"
    files = server.repos["org/tiny"]
    assert set(files) == {"main", "v2"}
    for name, data in files["main"].items():
        assert name == "README.md" or data == (gptq / name).read_bytes()
    assert set(files["main"]) == {*(file.name for file in gptq.iterdir()), "README.md"}
    assert "| perplexity | 12.35 |" in files["main"]["README.md"].decode()
    assert "perplexity" not in files["v2"]["README.md"].decode()
    assert set(server.tokens) == {"Bearer secret"}


def test_a_float_model_of_the_hub_is_quantized_by_name(server, online, llama_folder, tmp_path):
    server.repos["org/float"] = {"main": {file.name: file.read_bytes() for file in llama_folder.iterdir()}}
    code = f"""
import qcore
qcore.quantize("org/float", "rtn", group_size=32, output={str(tmp_path / "out")!r})
model = qcore.quantize("org/float", "rtn", group_size=32)
print(qcore.push_to_hub(model, "org/small", format="awq", private=True))
"""
    online(code)
    assert qcore.inspect(tmp_path / "out")["provenance"]["model"] == "org/float"
    config = json.loads(server.repos["org/small"]["main"]["config.json"])
    assert config["quantization_config"]["quant_method"] == "awq"
    card = server.repos["org/small"]["main"]["README.md"].decode()
    assert "base_model: org/float" in card


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ('qcore.load("org/absent")', "the hub gave no model of that name"),
        ('qcore.load("org/tiny", revision="v9")', "the hub gave no model of that name"),
        ('qcore.push_to_hub(FOLDER, "no name at all")', "could not be uploaded to no name at all"),
    ],
)
def test_what_the_hub_has_not_is_an_error_of_ours(server, online, gptq, call, says):
    server.repos["org/tiny"] = {"main": {"config.json": b"{}"}}
    code = (
        f"import qcore\nFOLDER = {str(gptq)!r}\ntry:\n    {call}\nexcept qcore.ModelError as error:\n    print(error)"
    )
    assert says in online(code)


def test_a_refusal_of_the_hub_is_told(server, online, gptq):
    server.refuses = True
    code = f"import qcore\ntry:\n    qcore.push_to_hub({str(gptq)!r}, 'org/tiny')\nexcept qcore.ModelError as error:\n    print(error)"
    assert "could not be uploaded to org/tiny: " in online(code)


def test_a_float_folder_does_not_go_up(llama_folder):
    with pytest.raises(qcore.CheckpointError, match="is not quantized"):
        qcore.push_to_hub(llama_folder, "org/tiny")


def test_the_card_says_how_it_was_made_and_how_to_load_it(gptq, tmp_path):
    card = hub.model_card(gptq, "org/tiny")
    for text in (
        "| algorithm | rtn |",
        "4 bits, group 32, sym",
        'qcore.load("org/tiny")',
        'LLM("org/tiny")',
        'GPTQModel.load("org/tiny")',
    ):
        assert text in card
    assert "llama-cli" not in card
    assert 'llama-cli -m "org/tiny/model.gguf"' in hub.model_card(
        qcore.convert(gptq, tmp_path / "gguf", "gguf"), "org/tiny"
    )
