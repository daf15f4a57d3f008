"""In front of gradio: to each session its own files, and no request or answer that leads elsewhere.

    request -> cookie (drawn at random) -> the session's own directory, named by the cookie's hash
    upload       -> own directory/random name/the file's name -> its path, in the answer
    message      -> every path that it names must lie in the own directory, or be an example
    GET of file= -> likewise

Gradio itself believes the paths of a message, and copies the files to where it serves them; it
compares them with its upload directory only after launch(), which a server of one's own never
calls, and its upload directory is one for all. So this stands before it, and passes nothing on that
it has not understood.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path

from gradio.route_utils import GradioMultiPartParser
from gradio.routes import file_upload_statuses
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

UPLOAD, FILE = "/gradio_api/upload", "/gradio_api/file"
MAX_MESSAGE = 1_000_000  # bytes; images do not go in messages
MAX_FILES = 100  # in one upload
EXAMPLES = "examples"  # the directory whose files are for everyone
OWN = "own_files"  # where a request's scope holds the session's directory
# What a browser may load for this page: what this server gives, and nothing else.
POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
          "'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src "
          "'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'")


class Refused(Exception):
    """status, reason: what is answered."""


class SecurityMiddleware:
    """An ASGI app around another, which keeps its files below `directory` (a real path).

    cookie: its name. Two servers on one machine need two: a cookie is sent to every port.
    largest: bytes of an uploaded file. uploads: a set that gets the path of each one.
    hosts: the names by which this server may be called; None: any. A page elsewhere could make its
    own name point to this machine (DNS rebinding), and the browser would let it read the answers.
    """

    def __init__(self, app, directory: Path, cookie: str, largest: int, uploads: set, hosts):
        self.app, self.directory, self.cookie = app, directory, cookie
        self.largest, self.uploads, self.hosts = largest, uploads, hosts
        self.used = {}  # path of an upload -> the open page (gradio's session_hash) that named it

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        known = re.search(rf"(?:^|;) *{self.cookie}=([0-9a-f]{{64}}) *(?:;|$)",
                          "; ".join(request.headers.getlist("cookie")))
        key = known[1] if known else secrets.token_hex(32)
        # The page shows a path, and may pass it on; the key cannot be guessed from it.
        own = self.directory / hashlib.sha256(key.encode()).hexdigest()
        headers = [(b"content-security-policy", POLICY.encode()),
                   (b"referrer-policy", b"no-referrer")]
        if not known:
            headers.append((b"set-cookie", f"{self.cookie}={key}; Path=/; HttpOnly; SameSite=Lax"
                            .encode()))

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *headers]
            await send(message)

        try:
            if self.hosts and host_name(request.headers.get("host", "")) not in self.hosts:
                raise Refused(403, "not the name of this server")
            _, is_file, path = scope["path"].partition(FILE)
            if is_file and not self.may_read(path[1:], own):
                raise Refused(403, "this file is not of your session, or no longer here")
            if scope["path"] == UPLOAD and scope["method"] == "POST":
                answer = JSONResponse(await self.upload(request, own))
                await answer(scope, receive, send_with_headers)
                return
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                receive = replay(await self.checked_body(request, own), receive)
        except Refused as refusal:
            status, reason = refusal.args
            await JSONResponse({"detail": reason}, status)(scope, receive, send_with_headers)
        except ClientDisconnect:  # nobody is there to be answered
            pass
        else:
            await self.app({**scope, OWN: own}, receive, send_with_headers)

    def may_read(self, path, own: Path) -> bool:
        """Whether a session may have this file. The text alone decides first: the disk is not
        searched at a path from elsewhere."""
        return (isinstance(path, str) and "\0" not in path and os.path.normpath(path) == path
                and path.startswith((f"{own}{os.sep}", f"{self.directory / EXAMPLES}{os.sep}"))
                and os.path.realpath(path) == path and os.path.isfile(path))

    async def checked_body(self, request: Request, own: Path) -> bytes:
        """A message's body, written anew: gradio cannot read other things in it than are checked
        here."""
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_MESSAGE:
                raise Refused(413, f"a message has at most {MAX_MESSAGE:,} bytes")
        try:
            message = json.loads(body or b"null")
            page = message.get("session_hash") if isinstance(message, dict) else None
            return json.dumps(self.clean(message, own, page)).encode()
        except (ValueError, RecursionError) as error:
            raise Refused(400, "expected a message in JSON") from error

    def clean(self, value, own: Path, page):
        """The value, with nothing left of a file's description but its path."""
        if isinstance(value, list):
            return [self.clean(part, own, page) for part in value]
        if not isinstance(value, dict):
            return value
        if "path" not in value:
            return {name: self.clean(part, own, page) for name, part in value.items()}
        path = value["path"]
        if not self.may_read(path, own) or (path.startswith(f"{own}{os.sep}")
                                            and self.used.setdefault(path, page) != page):
            raise Refused(403, "this image was not uploaded in this session, or is no longer "
                          "here: upload it, with the cookie that the page has set")
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    async def upload(self, request: Request, own: Path) -> list[str]:
        """Write the files of a form -> their paths."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Refused(400, "expected multipart/form-data")
        number = request.query_params.get("upload_id")  # of the progress bar
        if number:
            file_upload_statuses.track(number)
        parser = GradioMultiPartParser(
            request.headers, request.stream(), max_files=MAX_FILES, max_file_size=self.largest,
            upload_id=number, upload_progress=file_upload_statuses if number else None)
        parser.upload_dir = self.directory  # what is broken off is deleted with it
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise Refused(413 if "maximum allowed size" in error.message else 400,
                          error.message) from error
        paths = []
        for _, file in form.multi_items():
            if isinstance(file, str):  # a field that is no file
                continue
            file.file.close()
            # Other characters could make another name, in a URL or a file system.
            name = re.sub(r"[^\w. -]", "_", file.filename)[-60:].strip(". ")
            paths.append(str(new_file(own, name or "file")))
            shutil.move(file.file.name, paths[-1])
        self.uploads.update(paths)
        return paths


def host_name(header: str) -> str:
    """"localhost:7860" -> "localhost", "[::1]:7860" -> "::1"."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def new_file(own: Path, name: str) -> Path:
    """A path of this name, in a new directory that no other file shares."""
    directory = own / secrets.token_hex(16)
    directory.mkdir(parents=True)
    return directory / name


def replay(body: bytes, receive):
    """An ASGI receive that gives the body, and then what the first one gives."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again():
        return waiting.pop() if waiting else await receive()

    return receive_again
