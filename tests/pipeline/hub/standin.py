"""A Hub on this machine: what huggingface_hub's client calls to publish and to load, and the failures of the real one.

It keeps what it is sent by hash, checks every size and hash, and refuses what is wrong, so that what a test finds there
was really sent.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from socket import SHUT_RDWR
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

CANARY = "hf_CanaryCanaryCanaryCanary0123"  # the token that it takes, which must be found nowhere
_STALL = 30.0  # seconds, or until the server closes
_REPO = "/api/models/<owner>/<name>"
URLS = Map(
    [
        Rule("/api/whoami-v2", endpoint="whoami"),
        Rule("/api/repos/create", endpoint="create"),
        Rule("/api/validate-yaml", endpoint="validate"),
        Rule("/api/collections", endpoint="collect"),
        Rule("/api/collections/<owner>/<slug>", endpoint="collection"),
        Rule("/api/collections/<owner>/<slug>/items", endpoint="collect_item"),
        Rule(_REPO, endpoint="info", defaults={"revision": "main"}),
        Rule(f"{_REPO}/revision/<revision>", endpoint="info"),
        Rule(f"{_REPO}/tree/<revision>", endpoint="tree"),
        Rule(f"{_REPO}/preupload/<revision>", endpoint="preupload"),
        Rule(f"{_REPO}/commit/<revision>", endpoint="commit"),
        Rule("/<owner>/<name>.git/info/lfs/objects/batch", endpoint="batch"),
        Rule("/lfs/<sha256>", endpoint="upload"),
        Rule("/lfs/<sha256>/verify", endpoint="verify"),
        Rule("/lfs/<sha256>/complete", endpoint="complete"),
        Rule("/lfs/<sha256>/part/<int:number>", endpoint="upload_part"),
        Rule("/<owner>/<name>/resolve/<revision>/<path:path>", endpoint="resolve"),
    ],
    redirect_defaults=False,
)


def answer(value: Any, status: int = 200, **headers: str) -> Response:
    shown = {key.replace("_", "-"): text for key, text in headers.items()}
    return Response(json.dumps(value), status, shown, content_type="application/json")


def refusal(status: int, said: str, code: str | None = None) -> Response:
    headers = {"X_Error_Message": said} | ({"X_Error_Code": code} if code else {})
    return answer({"error": said}, status, **headers)


class Refused(Exception):
    """What stops a request, wherever it is found."""

    def __init__(self, status: int, said: str, code: str | None = None):
        self.response = refusal(status, said, code)


def git_name(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class File:
    """A file of a commit; its bytes lie in the Hub's store."""

    sha256: str
    size: int
    name: str  # git's, of the content or of the pointer to it
    lfs: bool

    @staticmethod
    def of(content: bytes, lfs: bool) -> "File":
        digest = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
        return File(digest, len(content), git_name(pointer if lfs else content), lfs)

    def listed(self, path: str) -> dict[str, Any]:
        """As one of a repository's siblings."""
        lfs = {"lfs": {"sha256": self.sha256, "size": self.size, "pointerSize": 130}} if self.lfs else {}
        return {"rfilename": path, "size": self.size, "blobId": self.name, **lfs}

    def told(self, path: str) -> dict[str, Any]:
        """As an entry of a tree."""
        lfs = {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 130}} if self.lfs else {}
        return {"type": "file", "path": path, "size": self.size, "oid": self.name, **lfs}


@dataclass
class Repo:
    """Commits, the newest last: each an id and the files it has."""

    private: bool
    gated: bool = False
    commits: list[tuple[str, dict[str, File]]] = field(default_factory=list)

    def add(self, files: dict[str, File]) -> str:
        seed = json.dumps([len(self.commits), sorted((path, file.sha256) for path, file in files.items())])
        self.commits.append((hashlib.sha1(seed.encode()).hexdigest(), files))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, File]]:
        for oid, files in reversed(self.commits):
            if revision in ("main", oid):
                return oid, files
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass
class Failure:
    """What goes wrong with the next requests whose method and path hold `part`.

    how: "answer" with the status; "cut" the connection in the middle of the request; "lose" the answer after doing
    what was asked; "stall" without an answer.
    """

    part: str
    status: int = 500
    times: int = 1
    how: str = "answer"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    said: str = "the stand-in was told to fail"


class Hub:
    """The server. repos, blobs (by sha256) and collections are what it keeps; requests is what it was asked."""

    def __init__(self, token: str = CANARY, account: str = "user"):
        self.token, self.account = token, account
        self.multipart: int | None = None  # bytes of a part, of what is larger
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.lock, self.closing, self.url = threading.Lock(), threading.Event(), ""

    @contextmanager
    def serving(self) -> Iterator["Hub"]:
        server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Quiet)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            self.closing.set()
            server.shutdown()
            server.server_close()

    def fail(self, part: str, **how: Any) -> None:
        self.failures.append(Failure(part, **how))

    def content(self, repo: str, path: str) -> bytes:
        return self.blobs[self.repos[repo].at("main")[1][path].sha256]

    def put(self, repo: str, path: str, content: bytes) -> None:
        """What somebody else commits."""
        made = self.repos.setdefault(repo, Repo(private=False))
        file = File.of(content, path.endswith(".safetensors"))
        self.blobs[file.sha256] = content
        made.add({**(made.commits[-1][1] if made.commits else {}), path: file})

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        request = Request(environ)
        asked = f"{request.method} {request.path}"
        with self.lock:
            self.requests.append(asked)
            failure = next((found for found in self.failures if found.times and found.part in asked), None)
            if failure:
                failure.times -= 1
        if failure and failure.how in ("cut", "stall"):
            self._break_off(request, failure.how)
        body = request.get_data()  # all of it: an answer before that would look like a broken connection
        if failure and failure.how == "answer":
            found = refusal(failure.status, failure.said, failure.code)
            found.headers.update(failure.headers)
        else:
            found = self._answer(request, body)
        if failure and failure.how == "lose":
            self._break_off(request, "cut")
        return found(environ, start_response)

    def _break_off(self, request: Request, how: str) -> None:
        if how == "stall":
            self.closing.wait(_STALL)
        else:
            request.stream.read((request.content_length or 0) // 2)
        request.environ["werkzeug.socket"].shutdown(SHUT_RDWR)
        raise ConnectionAbortedError

    def _answer(self, request: Request, body: bytes) -> Response:
        try:
            endpoint, values = URLS.bind_to_environ(request.environ).match()
            with self.lock:
                return getattr(self, f"do_{endpoint}")(request, body, **values)
        except Refused as refused:
            return refused.response
        except HTTPException as error:
            return refusal(error.code or 500, str(error))

    def _sign_in(self, request: Request, owner: str | None = None) -> None:
        given = request.headers.get("Authorization")
        if given != f"Bearer {self.token}":
            raise Refused(401, "Invalid credentials in Authorization header")
        if owner not in (None, self.account):
            raise Refused(403, f"You don't have the rights to write under the namespace {owner!r}")

    def _repo(self, request: Request, owner: str, name: str) -> Repo:
        """A repository that the request may read; a private one is not told of to others."""
        repo = self.repos.get(f"{owner}/{name}")
        known = request.headers.get("Authorization") == f"Bearer {self.token}"
        if repo is None or (repo.private and not known):
            raise Refused(404 if known else 401, "Repository not found", "RepoNotFound")
        return repo

    def do_whoami(self, request: Request, body: bytes) -> Response:
        self._sign_in(request)
        return answer({"type": "user", "name": self.account, "orgs": []})

    def do_create(self, request: Request, body: bytes) -> Response:
        wanted = json.loads(body)
        owner = wanted["organization"] or self.account
        self._sign_in(request, owner)
        repo = f"{owner}/{wanted['name']}"
        if repo in self.repos:
            return answer({"error": "You already created this model repo", "url": f"{self.url}/{repo}"}, 409)
        made = self.repos[repo] = Repo(private=wanted.get("visibility") == "private" or wanted.get("private", False))
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.blobs[hashlib.sha256(attributes).hexdigest()] = attributes
        made.add({".gitattributes": File.of(attributes, lfs=False)})
        return answer({"url": f"{self.url}/{repo}", "name": repo, "id": repo})

    def do_validate(self, request: Request, body: bytes) -> Response:
        block = REGEX_YAML_BLOCK.search(json.loads(body)["content"])
        try:
            metadata = yaml.safe_load(block[2]) if block else {}
        except yaml.YAMLError as error:
            return answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        errors = [] if isinstance(metadata, dict) else [{"message": "the metadata is no object"}]
        return answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def do_info(self, request: Request, body: bytes, owner: str, name: str, revision: str) -> Response:
        repo = self._repo(request, owner, name)
        oid, files = repo.at(revision)
        when = f"2026-01-01T00:00:{[found for found, _ in repo.commits].index(oid):02}.000Z"
        told = {"id": f"{owner}/{name}", "sha": oid, "private": repo.private, "lastModified": when, "gated": repo.gated}
        whole = "blobs" in request.args
        siblings = [file.listed(path) if whole else {"rfilename": path} for path, file in files.items()]
        return answer(told | {"siblings": siblings})

    def do_tree(self, request: Request, body: bytes, owner: str, name: str, revision: str) -> Response:
        _, files = self._repo(request, owner, name).at(revision)
        return answer([file.told(path) for path, file in files.items()])

    def do_preupload(self, request: Request, body: bytes, owner: str, name: str, revision: str) -> Response:
        self._sign_in(request, owner)
        _, files = self._repo(request, owner, name).at(revision)
        modes = []
        for wanted in json.loads(body)["files"]:
            path, lfs = wanted["path"], wanted["path"].endswith(".safetensors") or wanted["size"] > 10**7
            there = files.get(path)
            oid = {"oid": there.sha256 if there.lfs else there.name} if there else {}
            modes.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **oid})
        return answer({"files": modes})

    def do_batch(self, request: Request, body: bytes, owner: str, name: str) -> Response:
        self._sign_in(request, owner)
        self._repo(request, owner, name)
        return answer({"transfer": "basic", "objects": [self._object(one) for one in json.loads(body)["objects"]]})

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where an object is to be sent; nowhere if it is there."""
        oid, size = wanted["oid"], wanted["size"]
        if oid in self.blobs:
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": f"{self.url}/lfs/{oid}"}
        if self.multipart and size > self.multipart:
            numbers = range(1, -(-size // self.multipart) + 1)
            header = {str(number): f"{self.url}/lfs/{oid}/part/{number}" for number in numbers}
            upload = {"href": f"{self.url}/lfs/{oid}/complete", "header": header | {"chunk_size": str(self.multipart)}}
        actions = {"upload": upload, "verify": {"href": f"{self.url}/lfs/{oid}/verify"}}
        return {"oid": oid, "size": size, "actions": actions}

    def _keep(self, sha256: str, content: bytes) -> Response:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(422, "the content is not what its hash says")
        self.blobs[sha256] = content
        return answer({})

    def do_upload(self, request: Request, body: bytes, sha256: str) -> Response:
        return self._keep(sha256, body)

    def do_upload_part(self, request: Request, body: bytes, sha256: str, number: int) -> Response:
        self.parts[sha256, number] = body
        return answer({}, ETag=hashlib.md5(body).hexdigest())

    def do_complete(self, request: Request, body: bytes, sha256: str) -> Response:
        told = {part["partNumber"]: part["etag"] for part in json.loads(body)["parts"]}
        sent = {number: content for (oid, number), content in self.parts.items() if oid == sha256}
        if told != {number: hashlib.md5(content).hexdigest() for number, content in sent.items()}:
            raise Refused(422, "the parts are not those that were sent")
        return self._keep(sha256, b"".join(sent[number] for number in sorted(sent)))

    def do_verify(self, request: Request, body: bytes, sha256: str) -> Response:
        self._sign_in(request)
        told = json.loads(body)
        if told != {"oid": sha256, "size": len(self.blobs.get(sha256, b""))} or sha256 not in self.blobs:
            raise Refused(422, "there is no such object")
        return answer({})

    def do_commit(self, request: Request, body: bytes, owner: str, name: str, revision: str) -> Response:
        self._sign_in(request, owner)
        repo = self._repo(request, owner, name)
        head, files = repo.at(revision)
        header, *lines = [json.loads(line) for line in body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"]:
            raise Refused(400, "a commit begins with its header")
        if header["value"].get("parentCommit", head) != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        changed = dict(self._changed(line["key"], line["value"]) for line in lines)
        oid = repo.add({**files, **changed})
        return answer({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{owner}/{name}/commit/{oid}"})

    def _changed(self, key: str, value: dict[str, Any]) -> tuple[str, File]:
        if key == "file":
            content = base64.b64decode(value["content"], validate=True)
            self.blobs[hashlib.sha256(content).hexdigest()] = content
            return value["path"], File.of(content, lfs=False)
        if key != "lfsFile" or len(self.blobs.get(value["oid"], b"")) != value["size"]:
            raise Refused(422, f"{key} {value['path']} was not uploaded")
        return value["path"], File.of(self.blobs[value["oid"]], lfs=True)

    def do_resolve(self, request: Request, body: bytes, owner: str, name: str, revision: str, path: str) -> Response:
        repo = self._repo(request, owner, name)
        if repo.gated:
            raise Refused(403, "Access to this model is restricted", "GatedRepo")
        oid, files = repo.at(revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        file = files[path]
        found = Response(self.blobs[file.sha256], content_type="application/octet-stream")
        found.headers["X-Repo-Commit"] = oid
        found.set_etag(file.sha256 if file.lfs else file.name)
        return found.make_conditional(request, accept_ranges=True, complete_length=file.size)

    def _collection(self, owner: str, slug: str) -> dict[str, Any]:
        if f"{owner}/{slug}" not in self.collections:
            raise Refused(404, "Collection not found")
        return self.collections[f"{owner}/{slug}"]

    def do_collect(self, request: Request, body: bytes) -> Response:
        wanted = json.loads(body)
        self._sign_in(request, wanted["namespace"])
        slug = f"{wanted['namespace']}/{wanted['title'].lower().replace(' ', '-')}-0123456789abcdef01234567"
        if slug in self.collections:
            return answer({"error": "This collection already exists", "slug": slug}, 409)
        made = {"slug": slug, "title": wanted["title"], "owner": {"name": wanted["namespace"]}, "items": []}
        more = {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "theme": "blue", "upvotes": 0}
        self.collections[slug] = made | more | {"private": wanted["private"]}
        return answer(self.collections[slug])

    def do_collection(self, request: Request, body: bytes, owner: str, slug: str) -> Response:
        return answer(self._collection(owner, slug))

    def do_collect_item(self, request: Request, body: bytes, owner: str, slug: str) -> Response:
        self._sign_in(request, owner)
        collection, item = self._collection(owner, slug), json.loads(body)["item"]
        if item["id"] not in self.repos:
            raise Refused(404, "There is no such item")
        if any(found["id"] == item["id"] for found in collection["items"]):
            return refusal(409, "Item already in collection")
        collection["items"].append({**item, "_id": str(len(collection["items"])), "position": len(collection["items"])})
        return answer(collection)


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *arguments: Any) -> None:
        """Silence: the base class writes each request to stderr."""
