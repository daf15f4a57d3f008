"""In front of gradio: to each session its own files, and no request or answer that leads elsewhere.

    request -> cookie, drawn at random: the session
    upload       -> a new directory of its own -> its path; the session is its owner
    message      -> each path that it names must be an upload of the session, or an example
    GET of file= -> likewise

Gradio itself believes the paths of a message, and copies the files to where it serves them; its
upload directory is one for all. So this stands before it, and passes nothing on that it has not
understood.
"""

import json
import os
import re
import secrets
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

UPLOAD, FILE = "/gradio_api/upload", "/gradio_api/file"
MAX_MESSAGE = 1_000_000  # bytes; images do not go in messages
MAX_IMAGES = 8  # of one upload, and of one message
EVERYONE = "everyone"  # owns the examples
# What a browser may load for this page: what this server gives, and nothing else.
POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
          "'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src "
          "'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'")


class SecurityMiddleware:
    """An ASGI app around another, which keeps its files below `directory` (a real path).

    cookie: its name. Two servers on one machine need two: a cookie is sent to every port.
    largest: bytes of an uploaded file. uploads: a set that gets the path of each one.
    """

    def __init__(self, app, directory: Path, cookie: str, largest: int, uploads: set, examples):
        self.app, self.directory, self.cookie = app, directory, cookie
        self.largest, self.uploads = largest, uploads
        self.owners = dict.fromkeys(examples, EVERYONE)  # path -> session
        self.pages = {}  # path of an upload -> the open page (gradio's session_hash) that named it

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        session = request.cookies.get(self.cookie, "")
        known = re.fullmatch("[0-9a-f]{64}", session)
        session = session if known else secrets.token_hex(32)
        scope["new_file"] = lambda name: self.new_file(session, name)  # for the page's own images

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = POLICY
                headers["referrer-policy"] = "no-referrer"
                if not known:
                    headers.append("set-cookie", f"{self.cookie}={session}; Path=/; HttpOnly; "
                                   "SameSite=Lax")
            await send(message)

        answer, (_, is_file, path) = self.app, scope["path"].partition(FILE)
        try:
            if is_file and not self.may_read(path[1:], session):
                raise HTTPException(403, "this file is not of your session, or no longer here")
            if scope["path"] == UPLOAD and scope["method"] == "POST":
                check_length(request, MAX_IMAGES * self.largest + MAX_MESSAGE)
                answer = JSONResponse(await self.upload(request, session))
            elif scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                check_length(request, MAX_MESSAGE)
                receive = replay(await self.checked_body(request, session), receive)
        except HTTPException as refusal:
            answer = JSONResponse({"detail": refusal.detail}, refusal.status_code)
        except ClientDisconnect:  # nobody is there to be answered
            return
        await answer(scope, receive, send_with_headers)

    def may_read(self, path, session: str) -> bool:
        return (isinstance(path, str) and self.owners.get(path) in (session, EVERYONE)
                and os.path.isfile(path))

    def new_file(self, session: str, name: str) -> str:
        """The path of a file that is to be written, in a directory that no other shares."""
        directory = self.directory / secrets.token_hex(16)
        directory.mkdir()
        path = str(directory / name)
        self.owners[path] = session
        return path

    async def checked_body(self, request: Request, session: str) -> bytes:
        """A message's body, written anew: gradio cannot read other things in it than are checked
        here, and of a file's description nothing is left but its path."""
        paths = []

        def path_alone(value: dict) -> dict:
            if "path" not in value:
                return value
            paths.append(value["path"])
            return {"path": value["path"], "meta": {"_type": "gradio.FileData"}}

        try:
            message = json.loads(await request.body() or "null", object_hook=path_alone)
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, "expected a message in JSON") from error
        page = message.get("session_hash") if isinstance(message, dict) else None
        for path in paths:
            if not self.may_read(path, session) or (
                    self.owners[path] == session and self.pages.setdefault(path, page) != page):
                raise HTTPException(403, "this image was not uploaded in this session, or is no "
                                    "longer here: upload it, with the cookie that the page has set")
        return json.dumps(message).encode()

    async def upload(self, request: Request, session: str) -> list[str]:
        """Write the files of a form -> their paths."""
        try:
            async with request.form(max_files=MAX_IMAGES) as form:
                files = [file for _, file in form.multi_items() if not isinstance(file, str)]
                if not files:
                    raise HTTPException(400, "expected multipart/form-data with images")
                if any(file.size > self.largest for file in files):
                    raise HTTPException(413, f"an image has at most {self.largest:,} bytes")
                paths = []
                for file in files:
                    # Other characters could make another name, in a URL or a file system.
                    name = re.sub(r"[^\w. -]", "_", file.filename)[-60:].strip(". ")
                    paths.append(self.new_file(session, name or "file"))
                    Path(paths[-1]).write_bytes(await file.read())
        except MultiPartException as error:
            raise HTTPException(400, error.message) from error
        self.uploads.update(paths)
        return paths


def check_length(request: Request, limit: int) -> None:
    """The server itself reads no more of a request than it says at its beginning."""
    length = request.headers.get("content-length", "")
    if (not length.isdecimal() or int(length) > limit
            or "transfer-encoding" in request.headers):  # goes before the length
        raise HTTPException(413, f"expected a Content-Length of at most {limit:,} bytes")


def replay(body: bytes, receive):
    """An ASGI receive that gives the body, and then what the first one gives."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again():
        return waiting.pop() if waiting else await receive()

    return receive_again
